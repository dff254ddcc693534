"""Groups for a step where sampling never waits for training: they are begun ahead, within the bound
on staleness, and a step takes those that have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from glm_jax.envs.episode import SamplingSpec
from glm_jax.rl.config import GrpoConfig, RolloutConfig
from glm_jax.rl.groups import Collected, check_versions, is_fresh, outcome
from glm_jax.rl.ledger import Ledger, may_begin
from glm_jax.rl.source import RolloutStream
from glm_jax.rollouts.rollout import Group
from glm_jax.rollouts.task import Task

WAIT_SECONDS = 0.2  # for what has ended, before the stream is looked at again


class StreamCollector:
    """Collects a step's groups from a stream. The ledger knows every group of the run."""

    def __init__(self, source: RolloutStream, config: RolloutConfig, grpo: GrpoConfig):
        self.source, self.config, self.max_staleness = source, config, grpo.max_staleness
        self.steps_ahead = grpo.max_staleness // grpo.updates_per_step
        self.ledger = Ledger()
        self._lost: set[int] = set()  # in flight by the checkpoint, and not begun since

    def collect(
        self, take: Callable[[int], list[Task]], spec: SamplingSpec, version: int
    ) -> Collected:
        """take(count): the next tasks. version: of the weights that will be trained, which the
        source has.

        The groups begun first are trained on first. After max_waves x prompts_per_step new groups
        the step goes on with what it has. Those that are sampled while it trains are begun before
        this returns. Raises RuntimeError where a rollout's version is not as old as it
        may be.
        """
        ledger, config = self.ledger, self.config
        before = ledger.ends.copy()
        self._resume(spec, version)
        self._discard_stale(version)
        sampled: list[Group] = []
        most = config.max_waves * config.prompts_per_step
        while len(ledger.waiting) < config.prompts_per_step and len(sampled) < most:
            self._fill(take, spec, version)
            sampled += self._receive(WAIT_SECONDS)
            self._discard_stale(version)
        # Before this step's groups leave: what begins now is trained on by a later version.
        self._fill(take, spec, version)
        numbers = sorted(ledger.waiting)[: config.prompts_per_step]
        chosen = [ledger.waiting[number] for number in numbers]
        check_versions(chosen, version, self.max_staleness)
        for number in numbers:
            ledger.end(number, "trained")
        ledger.check()
        ended = ledger.ends - before
        counts = {f"groups_{how}": count for how, count in ended.items()}
        counts |= {"groups_in_flight": len(ledger.in_flight), "groups_waiting": len(ledger.waiting)}
        return Collected(chosen, sampled, counts)

    def get_state(self) -> tuple[dict, dict[str, np.ndarray]]:
        return self.ledger.get_state()

    def set_state(self, saved: Mapping, arrays: Mapping[str, np.ndarray]):
        self.ledger.set_state(saved, arrays)
        self._lost = set(self.ledger.in_flight)

    def _fill(self, take: Callable[[int], list[Task]], spec: SamplingSpec, version: int):
        ledger, size = self.ledger, self.config.prompts_per_step
        count = may_begin(len(ledger.in_flight), len(ledger.waiting), size, self.steps_ahead)
        for task in take(count) if count else ():
            self.source.begin(ledger.begin(task, version), task, spec)

    def _receive(self, timeout: float) -> list[Group]:
        """What has ended since. Groups without variance end here, where they are not trained on."""
        arrived = []
        for number, group in self.source.finished(timeout):
            if number not in self.ledger.in_flight:
                continue  # it ended while it was cancelled
            self.ledger.arrive(number, group)
            arrived.append(group)
            if self.config.dynamic_sampling and not group.has_variance:
                self.ledger.end(number, outcome(group))
        return arrived

    def _discard_stale(self, version: int):
        """Ends groups that are older than may be, and cancels those in flight that will be."""
        for number, group in list(self.ledger.waiting.items()):
            if not is_fresh(group, version, self.max_staleness):
                self.ledger.end(number, "stale")
        for number, begun in list(self.ledger.in_flight.items()):
            if version - begun.version > self.max_staleness:
                self.source.cancel(number)
                self.ledger.end(number, "cancelled")

    def _resume(self, spec: SamplingSpec, version: int):
        """Begins again what was in flight when the checkpoint was saved."""
        for number in sorted(self._lost):
            task = self.ledger.begin_again(number, version)
            self.source.begin(number, task, spec)
        self._lost.clear()
