"""What became of every group that an asynchronous run has begun: each ends exactly once, trained on
or dropped for a reason that has a name.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np

from glm_jax.rollouts.rollout import Group, pack_groups, unpack_groups
from glm_jax.rollouts.task import Task, task_from_json


def may_begin(in_flight: int, waiting: int, prompts_per_step: int, steps_ahead: int) -> int:
    """How many more groups may begin while a step waits for its prompts_per_step, the oldest first.

    With at most (steps_ahead + 1) x prompts_per_step groups in flight or waiting to be trained on,
    this step's among them, one that begins now is trained on at most steps_ahead steps after this
    one, if it ends in its turn. The same bound as AReaL's (arXiv 2505.24298, eq. 3), counted from
    what is not trained on yet instead of from the beginning, so that it holds after a resume, too.
    """
    return max((steps_ahead + 1) * prompts_per_step - in_flight - waiting, 0)


@dataclasses.dataclass(frozen=True)
class Begun:
    """version: of the weights when the group began, the oldest that its tokens can have."""

    task: Task
    version: int


class Ledger:
    """Groups by number. in_flight: begun and not arrived. waiting: arrived and not trained on.
    ends: how many ended how.
    """

    def __init__(self):
        self.begun = 0  # groups so far; the number of the next
        self.in_flight: dict[int, Begun] = {}
        self.waiting: dict[int, Group] = {}
        self.ends: collections.Counter[str] = collections.Counter()

    def begin(self, task: Task, version: int) -> int:
        """Enters a new group, and returns its number."""
        number, self.begun = self.begun, self.begun + 1
        self.in_flight[number] = Begun(task, version)
        return number

    def begin_again(self, number: int, version: int) -> Task:
        """For a group in flight whose rollouts were lost: they begin anew, with these weights."""
        task = self.in_flight[number].task
        self.in_flight[number] = Begun(task, version)
        return task

    def arrive(self, number: int, group: Group):
        """Raises KeyError for a group that is not in flight."""
        del self.in_flight[number]
        self.waiting[number] = group

    def end(self, number: int, how: str):
        """Raises KeyError for a group that has ended, or was never begun."""
        del (self.in_flight if number in self.in_flight else self.waiting)[number]
        self.ends[how] += 1

    def check(self):
        """Raises RuntimeError where a group was lost or counted twice."""
        open_groups = self.in_flight.keys() | self.waiting.keys()
        if self.begun != len(open_groups) + self.ends.total():
            raise RuntimeError(
                f"{self.begun} groups were begun; {len(self.in_flight)} are in flight,"
                f" {len(self.waiting)} wait, and {dict(self.ends)} ended"
            )

    def get_state(self) -> tuple[dict, dict[str, np.ndarray]]:
        """For a checkpoint: plain JSON values, and the tokens of the waiting groups."""
        entries, arrays = pack_groups(list(self.waiting.values()))
        in_flight = [[n, dataclasses.asdict(b.task), b.version] for n, b in self.in_flight.items()]
        return {
            "begun": self.begun, "in_flight": in_flight, "waiting": list(self.waiting),
            "groups": entries, "ends": dict(self.ends),
        }, arrays  # fmt: skip

    def set_state(self, saved: Mapping, arrays: Mapping[str, np.ndarray]):
        self.begun, self.ends = saved["begun"], collections.Counter(saved["ends"])
        self.in_flight = {n: Begun(task_from_json(t), v) for n, t, v in saved["in_flight"]}
        groups = unpack_groups(saved["groups"], arrays)
        self.waiting = dict(zip(saved["waiting"], groups, strict=True))
        self.check()
