"""Groups for a step: sampled in rounds, and sorted into those that teach, those that do not, and
those that wait for a later step.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from glm_jax.envs.episode import SamplingSpec
from glm_jax.rl.config import RolloutConfig
from glm_jax.rl.source import RolloutSource
from glm_jax.rollouts.rollout import Group, pack_groups, unpack_groups
from glm_jax.rollouts.task import Task


def is_fresh(group: Group, version: int, max_staleness: int) -> bool:
    """Whether a version of the weights may be trained on the group: none of its tokens is more than
    max_staleness updates older.
    """
    return version - min(r.oldest for r in group.rollouts) <= max_staleness


class GroupBuffer:
    """Groups that teach and were not needed in their step."""

    def __init__(self, max_staleness: int):
        self.max_staleness = max_staleness
        self.groups: list[Group] = []

    def take(self, version: int) -> tuple[list[Group], int]:
        """All groups that are fresh, and how many were dropped. Empties the buffer."""
        fresh = [g for g in self.groups if is_fresh(g, version, self.max_staleness)]
        dropped = len(self.groups) - len(fresh)
        self.groups = []
        return fresh, dropped

    def get_state(self) -> tuple[list[dict], dict[str, np.ndarray]]:
        return pack_groups(self.groups)

    def set_state(self, entries: Sequence[Mapping], arrays: Mapping[str, np.ndarray]):
        self.groups = unpack_groups(entries, arrays)


@dataclasses.dataclass
class Collected:
    """groups: to train on. all_groups: everything that was sampled for the step. counts: what
    became of the groups.
    """

    groups: list[Group]
    all_groups: list[Group]
    counts: dict[str, int]


class Collector:
    """Collects a step's groups. num_tasks: sampled so far in the run."""

    def __init__(self, source: RolloutSource, config: RolloutConfig, max_staleness: int):
        self.source, self.config = source, config
        self.num_tasks = 0
        self.buffer = GroupBuffer(max_staleness)

    def collect(
        self, take: Callable[[int], list[Task]], spec: SamplingSpec, version: int
    ) -> Collected:
        """take(count): the next tasks. version: of the weights that will be trained, which the
        source has.

        Groups from the buffer come first. Then rounds of new ones until there are enough that have
        variance. Whole rounds are waited for: taking what ends first would prefer short answers.
        Raises RuntimeError where a rollout's version is not as old as it may be.
        """
        config, counts = self.config, collections.Counter()
        chosen, counts["groups_stale"] = self.buffer.take(version)
        counts["groups_from_buffer"] = len(chosen)
        sampled = []
        for _ in range(config.max_waves):
            missing = config.prompts_per_step - len(chosen)
            if missing <= 0:
                break
            tasks = take(math.ceil(missing * config.over_sampling))
            groups = self.source.rollouts(tasks, spec, self.num_tasks)
            self.num_tasks += len(tasks)
            sampled += groups
            for group in groups:
                counts[f"groups_{outcome(group)}"] += 1
            chosen += [g for g in groups if g.has_variance or not config.dynamic_sampling]
            counts["waves"] += 1
        chosen, left = chosen[: config.prompts_per_step], chosen[config.prompts_per_step :]
        if self.buffer.max_staleness:
            self.buffer.groups, counts["groups_buffered"] = left, len(left)
        else:
            counts["groups_surplus"] = len(left)
        check_versions(chosen, version, self.buffer.max_staleness)
        return Collected(chosen, sampled, dict(counts))

    def get_state(self) -> tuple[dict, dict[str, np.ndarray]]:
        buffered, arrays = self.buffer.get_state()
        return {"num_tasks": self.num_tasks, "buffer": buffered}, arrays

    def set_state(self, saved: Mapping, arrays: Mapping[str, np.ndarray]):
        self.num_tasks = saved["num_tasks"]
        self.buffer.set_state(saved["buffer"], arrays)


def outcome(group: Group) -> str:
    """`mixed` teaches; all `solved` alike or all `unsolved` alike do not; `failed`: fewer than two
    episodes that count.
    """
    rewards = [r.reward.value for r in group.episodes if r.status.is_models]
    if len(rewards) < 2:
        return "failed"
    if group.has_variance:
        return "mixed"
    return "solved" if rewards[0] > 0 else "unsolved"


def check_versions(groups: Sequence[Group], version: int, max_staleness: int):
    """Raises RuntimeError where a sampled token is older than max_staleness updates, or newer than
    the weights.
    """
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        versions = rollout.versions[rollout.mask]
        wrong = versions[(versions > version) | (version - versions > max_staleness)]
        if len(wrong):
            raise RuntimeError(
                f"task {rollout.task.id!r}: a token of version {wrong[0]} to train version"
                f" {version}, max_staleness={max_staleness}"
            )
