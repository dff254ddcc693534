"""Where rollouts come from."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from data.tokenizer import Tokenizer
from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.worker import RolloutWorker
from glm_jax.infer.engine import Engine
from glm_jax.rollouts.rollout import Group
from glm_jax.rollouts.task import Task


class RolloutSource(Protocol):
    def rollouts(self, tasks: Sequence[Task], spec: SamplingSpec, first: int) -> list[Group]:
        """As RolloutWorker.rollouts."""
        ...

    def set_weights(self, state, version: int):
        """Samples from these weights (an nnx state) from now on; version is written down with every
        token.
        """

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent since the last call, by phase."""
        ...

    def close(self): ...


class RolloutStream(RolloutSource, Protocol):
    """One that samples all the time. A group is begun, and then it is cancelled or it ends."""

    def begin(self, number: int, task: Task, spec: SamplingSpec):
        """As RolloutWorker.begin, later: what it raises, `finished` raises."""

    def cancel(self, number: int):
        """Its group may come all the same, where it has ended before."""

    def finished(self, timeout: float) -> list[tuple[int, Group]]:
        """Groups that have ended since the last call, with their numbers; waits so many seconds for
        the first.
        """
        ...


class InProcess:
    """One engine of this process, which shares the devices with the learner."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, version: int):
        engine.version = version
        self.engine, self.worker = engine, RolloutWorker(engine, tokenizer)

    def rollouts(self, tasks: Sequence[Task], spec: SamplingSpec, first: int) -> list[Group]:
        return self.worker.rollouts(tasks, spec, first)

    def set_weights(self, state, version: int):
        self.engine.set_weights(state, recompute=True, version=version)

    def take_seconds(self) -> dict[str, float]:
        found = dict(self.worker.seconds)
        self.worker.seconds.clear()
        return found

    def close(self):
        pass


class InThread:
    """One engine in a thread of its own, which does nothing but sample: what it is told to do in
    between are `orders`. New weights come between two steps of the engine; keys and values of what
    is under way are then computed anew.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, version: int):
        engine.version = version
        self.engine, self.worker = engine, RolloutWorker(engine, tokenizer)
        self._orders: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[tuple[int, Group] | BaseException] = queue.SimpleQueue()
        self._closed = False
        self._seconds = {"generate": 0.0, "idle": 0.0}  # since the beginning, and when last taken
        self._taken = dict(self._seconds)
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def begin(self, number: int, task: Task, spec: SamplingSpec):
        self._orders.put(lambda: self.worker.begin(number, task, spec))

    def cancel(self, number: int):
        self._orders.put(lambda: self.worker.cancel(number))

    def finished(self, timeout: float) -> list[tuple[int, Group]]:
        found = []
        while True:
            try:
                item = self._finished.get(timeout=0 if found else timeout)
            except queue.Empty:
                return found
            if isinstance(item, BaseException):
                raise RuntimeError("the thread that samples has failed") from item
            found.append(item)

    def rollouts(self, tasks: Sequence[Task], spec: SamplingSpec, first: int) -> list[Group]:
        """Beside the groups under way. Errors as in RolloutWorker.rollouts."""
        future = concurrent.futures.Future()

        def order():
            try:
                future.set_result(self.worker.rollouts(tasks, spec, first))
            except BaseException as error:  # raised where the future is waited for
                future.set_exception(error)
                raise

        self._orders.put(order)
        return future.result()

    def set_weights(self, state, version: int):
        # A copy: the learner's next update takes these buffers for its own result.
        mine = jax.tree.map(jnp.copy, state)
        set_weights = self.engine.set_weights
        self._orders.put(lambda: set_weights(mine, recompute=True, version=version))

    def take_seconds(self) -> dict[str, float]:
        now, before = dict(self._seconds), self._taken
        self._taken = now
        return {phase: seconds - before[phase] for phase, seconds in now.items()}

    def close(self):
        """Waits for the step under way."""
        self._closed = True
        self._orders.put(lambda: None)
        self._thread.join()

    def _run(self):
        try:
            while not self._closed:
                started = time.perf_counter()
                if self.worker.idle:
                    order = self._orders.get()
                    self._seconds["idle"] += time.perf_counter() - started
                    order()
                while not self._orders.empty():
                    self._orders.get()()
                if not self._closed:
                    self._advance()
        except BaseException as error:  # raised where the groups are waited for
            self._finished.put(error)

    def _advance(self):
        started = time.perf_counter()
        for item in self.worker.advance():
            self._finished.put(item)
        self._seconds["generate"] += time.perf_counter() - started
