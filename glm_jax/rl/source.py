"""Where rollouts come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from data.tokenizer import Tokenizer
from glm_jax.envs.worker import RolloutWorker, SamplingSpec
from glm_jax.infer.engine import Engine
from glm_jax.rollouts.rollout import Group
from glm_jax.rollouts.task import Task


class RolloutSource(Protocol):
    """seconds: spent since it was last cleared, by phase."""

    seconds: dict[str, float]

    def rollouts(self, tasks: Sequence[Task], spec: SamplingSpec, first: int) -> list[Group]:
        """As RolloutWorker.rollouts."""
        ...

    def set_weights(self, state, version: int):
        """Samples from these weights (an nnx state) from now on; version is written down with every
        token.
        """


class InProcess:
    """One engine of this process, which shares the devices with the learner."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, version: int):
        engine.version = version
        self.engine, self.worker = engine, RolloutWorker(engine, tokenizer)
        self.seconds = self.worker.seconds

    def rollouts(self, tasks: Sequence[Task], spec: SamplingSpec, first: int) -> list[Group]:
        return self.worker.rollouts(tasks, spec, first)

    def set_weights(self, state, version: int):
        self.engine.set_weights(state, recompute=True, version=version)
