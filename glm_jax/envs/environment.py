"""What an episode of several turns happens in: gives the messages that begin it, and answers the
model's turns until it is done. A task that is judged by a verifier is the one-turn case.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

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


@runtime_checkable
class Harness(Protocol):
    """One episode of an agent that others wrote, which calls the model by OpenAI's chat API.

    run() lasts as long as the episode and may be async; it has a thread of its own, as an
    environment has. Every call is recorded, and its tokens are trained on
    (docs/guides/train_an_agent.md). It may have close(), as an environment may.
    """

    def run(self, task: Task, address: str, seed: int) -> Reward | Awaitable[Reward]:
        """address: base URL for the client; any API key and model name do. A call is answered with
        an error once the episode has ended, by a limit or a turn that cannot be read.
        """
        ...


# Writes the assistant's next message after the conversation so far.
Agent = Callable[[Sequence[Mapping]], Mapping]


@dataclasses.dataclass(frozen=True)
class Kind:
    """make: a new episode's environment or harness. check: raises ValueError naming the first task
    that it cannot use. expert: makes the agent that earns 1 in a task, for one episode; None: there
    is none, as of a harness.
    """

    make: Callable[[], Environment | Harness]
    check: Callable[[Sequence[Task]], None]
    expert: Callable[[Task], Agent] | None = None


def answer_of(function: Callable, *args) -> Any:
    """What a method of an environment returns, or what it returns after a wait."""
    result = function(*args)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable) -> Any:
    return await result
