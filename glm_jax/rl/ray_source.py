"""Rollout workers as Ray actors, each with an engine on devices of its own, on this machine or on
others. A worker that dies is replaced, and its groups begin again.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ray
from flax import nnx
from ray.exceptions import RayActorError

from data.tokenizer import Tokenizer
from glm_jax.envs.episode import SamplingSpec
from glm_jax.infer.engine import Engine
from glm_jax.model.transformer import abstract_model
from glm_jax.rl.config import RlConfig, RolloutConfig
from glm_jax.rl.source import InThread
from glm_jax.rollouts.rollout import Group
from glm_jax.rollouts.task import Task
from glm_jax.sharding import make_mesh

logger = logging.getLogger(__name__)
# Of the actors: they import this repository, which stands at the same path on every host.
ENVIRONMENT = {"env_vars": {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}}
POLL_SECONDS = 0.5  # that a worker waits for its next group
# Workers that die one after the other without having sampled a group: then something is wrong that
# a further one does not mend.
MAX_FRUITLESS = 3


def connect(config: RolloutConfig):
    """Joins the Ray cluster of RAY_ADDRESS, or starts one on this machine. Raises ValueError where
    it lacks what the workers need.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING, runtime_env=ENVIRONMENT)
    there = ray.cluster_resources()
    for name, amount in config.worker_resources:
        if there.get(name, 0) < amount * config.workers:
            raise ValueError(
                f"rollout.workers={config.workers} need {amount * config.workers:g} {name} of the"
                f" Ray cluster, which has {there.get(name, 0):g}"
            )


class RolloutActor:
    """An InThread in a process of its own. Its methods run in two threads: one waits for groups,
    the other gets the orders.
    """

    def __init__(self, config: RlConfig, tokenizer: Tokenizer, weights: Sequence, version: int):
        """weights: the leaves of the model's state, on the host."""
        graphdef, abstract = nnx.split(abstract_model(config.model))
        self.structure = jax.tree.structure(abstract)
        mesh = make_mesh(config.mesh)
        model = nnx.merge(graphdef, jax.tree.unflatten(self.structure, weights))
        engine = Engine(model, config.engine, tokenizer.decode, None if mesh.size == 1 else mesh)
        self.source = InThread(engine, tokenizer, version)

    def begin(self, number: int, task: Task, spec: SamplingSpec):
        self.source.begin(number, task, spec)

    def cancel(self, number: int):
        self.source.cancel(number)

    def rollouts(self, tasks: Sequence[Task], spec: SamplingSpec, first: int) -> list[Group]:
        return self.source.rollouts(tasks, spec, first)

    def set_weights(self, weights: Sequence, version: int):
        self.source.set_weights(jax.tree.unflatten(self.structure, weights), version)

    def take_seconds(self) -> dict[str, float]:
        return self.source.take_seconds()

    def finished(self) -> list[tuple[int, Group]]:
        return self.source.finished(POLL_SECONDS)


@dataclasses.dataclass(eq=False)
class _Worker:
    """actor: its handle. under_way: groups by number. poll: its next answer to `finished`."""

    actor: Any
    under_way: dict[int, tuple[Task, SamplingSpec]] = dataclasses.field(default_factory=dict)
    poll: ray.ObjectRef | None = None


class RaySource:
    """rollout.workers RolloutActors. A group goes to the worker that has the fewest."""

    def __init__(self, config: RlConfig, tokenizer: Tokenizer, state, version: int):
        """state: the model's, an nnx state. `connect` comes before."""
        self.config, self.tokenizer = config, tokenizer
        needed = dict(config.rollout.worker_resources)
        # No restart by Ray itself: a new actor must get the newest weights.
        options: dict[str, Any] = {"max_restarts": 0, "max_concurrency": 2, "resources": needed}
        options |= {"num_cpus": needed.pop("CPU", 0), "num_gpus": needed.pop("GPU", 0)}
        self._actor = ray.remote(**options)(RolloutActor)
        self._keep(state, version)
        self._fruitless = 0
        self.replaced = 0  # workers that died
        self.workers = [_Worker(self._new()) for _ in range(config.rollout.workers)]

    def begin(self, number: int, task: Task, spec: SamplingSpec):
        worker = min(self.workers, key=lambda w: len(w.under_way))
        worker.under_way[number] = task, spec
        worker.actor.begin.remote(number, task, spec)

    def cancel(self, number: int):
        for worker in self.workers:
            if worker.under_way.pop(number, None) is not None:
                worker.actor.cancel.remote(number)

    def finished(self, timeout: float) -> list[tuple[int, Group]]:
        by_poll = {}
        for worker in self.workers:
            worker.poll = worker.poll or worker.actor.finished.remote()
            by_poll[worker.poll] = worker
        ready, _ = ray.wait(list(by_poll), timeout=timeout)
        found = []
        for poll in ready:
            worker = by_poll[poll]
            worker.poll = None
            try:
                groups = ray.get(poll)
            except RayActorError as error:
                self._replace(worker, error)
                continue
            self._fruitless = 0 if groups else self._fruitless
            # None twice: a group that was cancelled and ends all the same is not the worker's.
            found += [group for group in groups if worker.under_way.pop(group[0], None)]
        return found

    def rollouts(self, tasks: Sequence[Task], spec: SamplingSpec, first: int) -> list[Group]:
        """Of the tasks each worker samples a part. A part is sampled again where its worker dies:
        the numbers decide the rollouts, whoever samples them.
        """
        size = -(-len(tasks) // len(self.workers))
        parts = {start: list(tasks[start : start + size]) for start in range(0, len(tasks), size)}
        ask = lambda worker, start: worker.actor.rollouts.remote(parts[start], spec, first + start)
        asked = {
            start: (worker, ask(worker, start))
            for start, worker in zip(parts, self.workers, strict=False)
        }
        groups = []
        for start in parts:
            while True:
                worker, answer = asked[start]
                try:
                    groups += ray.get(answer)
                    break
                except RayActorError as error:
                    self._replace(worker, error)
                    asked[start] = worker, ask(worker, start)
        return groups

    def set_weights(self, state, version: int):
        """By one copy in the object store, which each worker's machine fetches once."""
        self._keep(state, version)
        for worker in self.workers:
            worker.actor.set_weights.remote(self._weights, version)

    def take_seconds(self) -> dict[str, float]:
        """Summed over the workers that live."""
        total = collections.Counter()
        for worker in self.workers:
            try:
                total.update(ray.get(worker.actor.take_seconds.remote()))
            except RayActorError:
                continue  # it is replaced where its groups are waited for
        return dict(total)

    def close(self):
        for worker in self.workers:
            ray.kill(worker.actor)

    def _keep(self, state, version: int):
        self._weights = ray.put(jax.device_get(jax.tree.leaves(state)))
        self._version = version

    def _new(self):
        return self._actor.remote(self.config, self.tokenizer, self._weights, self._version)

    def _replace(self, worker: _Worker, error: RayActorError):
        """Raises RuntimeError where a few in turn have died before they sampled anything."""
        self._fruitless += 1
        if self._fruitless > MAX_FRUITLESS:
            raise RuntimeError(
                f"{self._fruitless} rollout workers died in turn before one sampled a group"
            ) from error
        logger.warning("a rollout worker died and is replaced: %s", error)
        self.replaced += 1
        worker.actor, worker.poll = self._new(), None
        for number, (task, spec) in worker.under_way.items():
            worker.actor.begin.remote(number, task, spec)
