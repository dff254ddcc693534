"""Measures how hard tasks are for a model, as the curriculum wants to know it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.worker import RolloutWorker
from glm_jax.files import write_json_lines
from glm_jax.rl.curriculum import Difficulty
from glm_jax.rollouts.task import Task


def measure(
    worker: RolloutWorker,
    tasks: Sequence[Task],
    spec: SamplingSpec,
    many: int,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Difficulty]:
    """Task id -> difficulty: of spec.group_size rollouts; for those never solved of further rounds
    of as many, up to `many` in all, until the first success. progress: told how many rollouts have
    ended.
    """
    found = {task.id: Difficulty(0, 0) for task in tasks}
    left, number = list(tasks), 0
    while left:
        for group in worker.rollouts(left, spec, number, progress):
            before, solved = found[group.task.id], sum(r.reward.value > 0 for r in group.learnable)
            found[group.task.id] = Difficulty(
                before.solved + solved, before.tried + len(group.rollouts)
            )
        number += len(left)
        left = [
            t
            for t in left
            if found[t.id].solved == 0 and found[t.id].tried + spec.group_size <= many
        ]
    return found


def write_difficulties(path: pathlib.Path, found: Mapping[str, Difficulty]):
    """A file that curriculum.read_difficulties reads; it appears as a whole."""
    lines = ({"id": name, **dataclasses.asdict(d)} for name, d in found.items())
    write_json_lines(path, lines)
