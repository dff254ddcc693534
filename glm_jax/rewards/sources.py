"""The tasks of a run: where they come from, and in which order they are asked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from glm_jax.rewards import puzzles
from glm_jax.rollouts.task import Task, read_tasks


def load_sources(sources: Sequence[str], split: str) -> list[Task]:
    """All tasks of the sources in order. 'puzzle:GENERATOR:COUNT' gives reasoning-gym's of `split`;
    anything else is a task file.

    Raises ValueError for a source that cannot be read, or an id that two sources share.
    """
    tasks = []
    for source in sources:
        if not source.startswith("puzzle:"):
            tasks += read_tasks(source)
            continue
        parts = source.split(":")
        if len(parts) != 3 or not parts[2].isdecimal() or int(parts[2]) < 1:
            raise ValueError(f"task source {source!r} must read puzzle:GENERATOR:COUNT")
        tasks += puzzles.tasks(parts[1], split, int(parts[2]))
    seen = set()
    for task in tasks:
        if task.id in seen:
            raise ValueError(f"task id {task.id!r} comes twice in {', '.join(sources)}")
        seen.add(task.id)
    return tasks


def with_wrong_answers(tasks: Sequence[Task], share: float, seed: int) -> list[Task]:
    """A share of the tasks, chosen by seed, get the answer of another task of their group and
    verifier: the ablation of an unverified pool.
    """
    rng = np.random.default_rng([seed, 1])
    out = list(tasks)
    for group in sorted({(t.group, t.verifier) for t in tasks}):
        members = [i for i, t in enumerate(tasks) if (t.group, t.verifier) == group]
        chosen = rng.permutation(members)[: round(share * len(members))]
        for mine, other in zip(chosen, np.roll(chosen, 1), strict=True):
            out[mine] = dataclasses.replace(tasks[mine], answer=tasks[other].answer)
    return out


class TaskOrder:
    """Endless: every epoch all tasks of the pool in a new order, which depends on seed and epoch
    alone.

    Pools (of the curriculum) are told apart by name; each has its own position.
    """

    def __init__(self, tasks: Sequence[Task], seed: int):
        self.tasks, self.seed = tasks, seed
        self.positions: dict[str, int] = {}

    def take(self, count: int, pool: str, members: Sequence[int]) -> list[Task]:
        """The next tasks of the pool, which has the given indices of all tasks."""
        start = self.positions.setdefault(pool, 0)
        self.positions[pool] += count
        epochs = range(start // len(members), (start + count - 1) // len(members) + 1)
        orders = (
            np.random.default_rng([self.seed, epoch]).permutation(members) for epoch in epochs
        )
        begin = start - epochs[0] * len(members)
        return [
            self.tasks[i]
            for i in itertools.islice(itertools.chain.from_iterable(orders), begin, begin + count)
        ]

    def get_state(self) -> dict:
        return dict(self.positions)  # a checkpoint is written while the next step takes its tasks

    def set_state(self, state: dict):
        self.positions = dict(state)
