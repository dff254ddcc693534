"""What an episode of several turns happens in: gives the messages that begin it, and answers the
model's turns until it is done. A task that is judged by a verifier is the one-turn case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from glm_jax.rewards import verifiers
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
    """One episode: made when it begins. Both methods may be async where they wait; they run beside
    the engine, in a thread of their own. An exception ends the episode as ENVIRONMENT_ERROR.
    """

    def reset(self, task: Task, seed: int) -> Start | Awaitable[Start]:
        """seed: of the rollout; all that is random in the environment comes from it."""
        ...

    def step(self, message: Mapping) -> Step | Awaitable[Step]:
        """message: the assistant's, as data.chat_output.parse gives it."""
        ...


@dataclasses.dataclass(frozen=True)
class Kind:
    """make: a new episode's environment. check: raises ValueError naming the first task that the
    environment cannot use.
    """

    make: Callable[[], Environment]
    check: Callable[[Sequence[Task]], None]


ENVIRONMENTS: dict[str, Kind] = {}  # by the name that a task gives as its verifier


def check(tasks: Sequence[Task]) -> None:
    """Raises ValueError naming the first task whose environment or verifier is unknown or cannot
    use it.
    """
    for name, kind in ENVIRONMENTS.items():
        if own := [task for task in tasks if task.verifier == name]:
            kind.check(own)
    verifiers.check([task for task in tasks if task.verifier not in ENVIRONMENTS])


def made_for(task: Task) -> Environment | None:
    """The environment of a task's episode; None where a verifier judges its one turn."""
    kind = ENVIRONMENTS.get(task.verifier)
    return None if kind is None else kind.make()
