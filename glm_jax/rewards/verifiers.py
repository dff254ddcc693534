"""All verifiers by the name that a task gives, and scoring tasks of several kinds at once."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from glm_jax.rollouts.task import Reward, Task


class Verifier(Protocol):
    """Judges answers of one kind. Pure: the same task and message give the same reward, whoever
    asks.
    """

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError naming the first task whose answer it cannot use, and why; or what is
        not installed.
        """
        ...

    def score(self, tasks: Sequence[Task], messages: Sequence[Mapping]) -> list[Reward]:
        """A reward for the assistant's message (as data.chat_output.parse gives it) to each task;
        never raises for what it says.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """A verifier that is imported when it is first needed: the module itself, or what its `maker`
    makes.
    """

    module: str
    maker: str = ""

    @functools.cached_property
    def _verifier(self) -> Verifier:
        module = importlib.import_module(self.module)
        return getattr(module, self.maker)() if self.maker else cast(Verifier, module)

    def check(self, tasks: Sequence[Task]) -> None:
        self._verifier.check(tasks)

    def score(self, tasks: Sequence[Task], messages: Sequence[Mapping]) -> list[Reward]:
        return self._verifier.score(tasks, messages)


VERIFIERS: dict[str, Verifier] = {
    "puzzle": _Lazy("glm_jax.rewards.puzzle_verifier"),
    "math": _Lazy("glm_jax.rewards.mathematics"),
    "choice": _Lazy("glm_jax.rewards.choice"),
    "code": _Lazy("glm_jax.rewards.code", "CodeVerifier"),
}


def check(tasks: Sequence[Task]) -> None:
    """Raises ValueError naming the first task whose verifier is unknown, or whose answer its
    verifier cannot use.
    """
    for name, places in _places(tasks).items():
        VERIFIERS[name].check([tasks[i] for i in places])


def score(tasks: Sequence[Task], messages: Sequence[Mapping]) -> list[Reward]:
    """Each task's reward for its message, in order. Tasks must have passed `check`."""
    if len(tasks) != len(messages):
        raise ValueError(f"{len(tasks)} tasks, but {len(messages)} messages")
    rewards = {}
    for name, places in _places(tasks).items():
        found = VERIFIERS[name].score([tasks[i] for i in places], [messages[i] for i in places])
        rewards.update(zip(places, found, strict=True))
    return [rewards[i] for i in range(len(tasks))]


def _places(tasks: Sequence[Task]) -> dict[str, list[int]]:
    """Verifier -> indices of its tasks."""
    places = collections.defaultdict(list)
    for i, task in enumerate(tasks):
        if task.verifier not in VERIFIERS:
            raise ValueError(
                f"task {task.id!r}: verifier {task.verifier!r} is not one of {', '.join(VERIFIERS)}"
            )
        places[task.verifier].append(i)
    return places
