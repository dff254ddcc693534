"""What an episode of several turns happens in: gives the messages that begin it, and answers the
model's turns until it is done. A task that is judged by a verifier is the one-turn case.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from glm_jax.rollouts.task import Reward, Task

NO_REWARD = Reward(0.0, {})


class Start(NamedTuple):
    """messages: the conversation up to the model's first turn. tools: that the model may call."""

    messages: Sequence[Mapping]
    tools: Sequence[Mapping] = ()


class Step(NamedTuple):
    """messages: the user's or tools' answers to the model's turn, which it goes on after; empty
    where the episode is done. reward: of this turn; an episode's is the sum of its turns'.
    """

    messages: Sequence[Mapping]
    done: bool
    reward: Reward = NO_REWARD


class Environment(Protocol):
    """One episode: made when it begins. Methods may be async where they wait; they run beside the
    engine, in a thread of their own. An exception ends the episode as ENVIRONMENT_ERROR.

    One that holds processes or files also has close(), which is called once when the episode has
    ended, however it did: after a time-out or where its group is cancelled, beside a call of step
    that goes on.
    """

    def reset(self, task: Task, seed: int) -> Start | Awaitable[Start]:
        """seed: of the rollout; all that is random in the environment comes from it."""
        ...

    def step(self, message: Mapping) -> Step | Awaitable[Step]:
        """message: the assistant's, as data.chat_output.parse gives it."""
        ...


# Writes the assistant's next message after the conversation so far.
Agent = Callable[[Sequence[Mapping]], Mapping]


@dataclasses.dataclass(frozen=True)
class Kind:
    """make: a new episode's environment. check: raises ValueError naming the first task that the
    environment cannot use. expert: earns 1 in every task; None: there is none. expert_of: the
    same for one task, where an expert has to know its answer.
    """

    make: Callable[[], Environment]
    check: Callable[[Sequence[Task]], None]
    expert: Agent | None = None
    expert_of: Callable[[Task], Agent] | None = None

    def expert_for(self, task: Task) -> Agent | None:
        return self.expert_of(task) if self.expert_of is not None else self.expert


def answer_of(function: Callable, *args) -> Any:
    """What a method of an environment returns, or what it returns after a wait."""
    result = function(*args)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable) -> Any:
    return await result
