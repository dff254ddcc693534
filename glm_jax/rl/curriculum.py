"""Difficulty curriculum (arXiv 2508.06471, section 3.2, Figure 5): moderate tasks first; then those
hardly ever solved, whose answers are verified.

Difficulty is measured with the model that the run starts from, and kept in a file: an object a line
with `id`, `solved` and `tried` (rollouts).
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

from glm_jax.rl.temperature import has_plateaued
from glm_jax.rollouts.task import Task


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How often a task was solved in how many rollouts."""

    solved: int
    tried: int


def pass_at_k(solved: int, tried: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k rollouts solves the task (arXiv 2107.03374, eq.
    1); k at most `tried`.
    """
    if tried - solved < k:
        return 1.0
    return 1.0 - math.prod(1 - k / n for n in range(tried - solved + 1, tried + 1))


def read_difficulties(path: str | pathlib.Path) -> dict[str, Difficulty]:
    """Task id -> difficulty. Raises ValueError naming the line."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(
            f"no difficulty file at {str(path)!r}; python -m experiments.difficulty writes one"
        )
    found = {}
    for number, line in enumerate(file.read_bytes().rstrip(b"\n").split(b"\n"), 1):
        try:
            entry = json.loads(line)
            difficulty = Difficulty(int(entry["solved"]), int(entry["tried"]))
            found[entry["id"]] = difficulty
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: is no difficulty: {error!r}") from None
        if not 0 <= difficulty.solved <= difficulty.tried or difficulty.tried < 1:
            raise ValueError(
                f"{path}:{number}: solved={difficulty.solved} of tried={difficulty.tried}"
            )
    return found


def split_pools(
    tasks: Sequence[Task], difficulties: Mapping[str, Difficulty], few: int, many: int
) -> dict[str, list[int]]:
    """Indices of the tasks by pool. `moderate`: solved in some of the first rollouts and not in
    all. `hard`: pass@few is 0 as far as was seen, but one of up to `many` rollouts solved it: proof
    that the answer can be reached.

    A task is moderate where its solve rate predicts at least one success in `few` rollouts, and
    fewer than all. Raises ValueError for a task whose difficulty is not known.
    """
    pools: dict[str, list[int]] = {"moderate": [], "hard": []}
    for index, task in enumerate(tasks):
        if task.id not in difficulties:
            raise ValueError(f"the difficulty file lacks task {task.id!r}")
        known = difficulties[task.id]
        if known.solved in (0, known.tried):
            continue
        rate = known.solved / known.tried
        if rate * few >= 1:
            pools["moderate"].append(index)
        elif known.tried <= many:
            pools["hard"].append(index)
    return pools


class Curriculum:
    """Which pool a step takes its tasks from. 'none': all tasks. 'moderate': that pool only.
    'two_stage': moderate until the reward stops rising, then hard.
    """

    def __init__(
        self,
        name: str,
        num_tasks: int,
        pools: Mapping[str, Sequence[int]] | None,
        window: int,
        gain: float,
    ):
        """pools: of split_pools; None for 'none'. Raises ValueError where a pool that is needed is
        empty.
        """
        self.pools = {"all": list(range(num_tasks))} if pools is None else dict(pools)
        for needed in {"none": (), "moderate": ("moderate",), "two_stage": ("moderate", "hard")}[
            name
        ]:
            if not self.pools[needed]:
                raise ValueError(
                    f"curriculum {name!r}: no task is {needed}; all have"
                    f" { ({k: len(v) for k, v in self.pools.items()}) }"
                )
        self.name, self.window, self.gain = name, window, gain
        self.pool = "all" if name == "none" else "moderate"
        self.rewards: list[float] = []

    def observe(self, reward: float):
        """Takes a step's mean reward."""
        self.rewards = [*self.rewards, reward][-2 * self.window :]
        if (
            self.name == "two_stage"
            and self.pool == "moderate"
            and has_plateaued(self.rewards, self.window, self.gain)
        ):
            self.pool, self.rewards = "hard", []

    def get_state(self) -> dict:
        return {"pool": self.pool, "rewards": list(self.rewards)}

    def set_state(self, state: dict):
        self.pool, self.rewards = state["pool"], list(state["rewards"])
