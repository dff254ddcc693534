"""The loop of reinforcement learning: collect rollouts, train on them, swap weights. A source in
this process samples them in turn with the training, one in a thread beside it.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import cast

from jax.sharding import Mesh
from tqdm import tqdm

from data.tokenizer import Tokenizer
from glm_jax.files import write_json_lines
from glm_jax.infer.engine import Engine
from glm_jax.rl import measures
from glm_jax.rl.config import RlConfig
from glm_jax.rl.controllers import Controllers
from glm_jax.rl.groups import Collector
from glm_jax.rl.learner import Learner
from glm_jax.rl.source import InProcess, InThread, RolloutSource, RolloutStream
from glm_jax.rl.stream import StreamCollector
from glm_jax.rl.tasks import Tasks
from glm_jax.rollouts.rollout import Group
from glm_jax.run.workdir import WorkDir
from glm_jax.sharding import make_mesh, named, one_process
from glm_jax.train.loop import RESUME_CHANGEABLE
from glm_jax.train.start import StartConfig, check_start, starting_state, starting_tokenizer
from glm_jax.train.state import TrainSpec

logger = logging.getLogger(__name__)
# sections that a resumed run may not change
FIXED = ("model", "optimizer", "engine", "tasks", "rollout", "grpo", "control", "start")
# Numbers of tasks from here on are evaluations', so that they never share a seed with training.
HELD_OUT_TASKS = 2**31


def train(
    config: RlConfig, start: StartConfig, workdir: pathlib.Path, *, config_json: str, progress: bool
) -> int:
    """Runs, or resumes, a run until loop.steps. Returns the number of steps done. Errors as for
    `open_run`.
    """
    run = open_run(config, start, workdir, config_json=config_json, progress=progress)
    try:
        return run.loop()
    finally:
        run.close()


def open_run(
    config: RlConfig, start: StartConfig, workdir: pathlib.Path, *, config_json: str, progress: bool
) -> Run:
    """A new run, or one where it stopped.

    Raises ValueError for anything wrong with config, tasks or checkpoints before anything is
    written.
    """
    one_process("reinforcement learning")
    mesh = make_mesh(config.mesh)
    spec = TrainSpec.create(config.model, config.optimizer)
    abstract = spec.abstract_state(mesh)
    config.engine.check(config.model, mesh)
    rows = config.grpo.rows, config.grpo.row_length
    named(mesh, ("batch", "length"), rows, "grpo.rows x grpo.row_length")
    folder = WorkDir(
        workdir, config_json, fixed=FIXED, changeable=RESUME_CHANGEABLE,
        keep=config.loop.keep_checkpoints,
    )  # fmt: skip
    if folder.resuming:
        tokenizer = Tokenizer.load(workdir / "tokenizer.json")
    else:
        if not start.workdir:
            raise ValueError(
                "start.workdir is empty: reinforcement learning needs the weights of another run"
            )
        check_start(start, config.model)
        tokenizer = starting_tokenizer(start)
    controllers = Controllers(config, Tasks(config, tokenizer))
    if config.rollout.workers:
        _ray_source().connect(config.rollout)

    # Everything that can be wrong was read; from here on the work directory is written.
    folder.begin(tokenizer)
    first, saved = folder.checkpoints.latest(), None
    if first is None:
        first, state = 0, starting_state(start, spec, mesh, config.loop.seed)
    else:
        state, *saved = folder.checkpoints.restore(first, abstract)
        logger.info("resumed from step %d", first)
    learner = Learner(config, mesh, spec, state, folder)
    source = open_source(config, tokenizer, learner, mesh)
    run = Run(config, folder, tokenizer, controllers, learner, source, first, progress)
    if saved is not None:
        run.set_state(*saved)
    return run


def open_source(
    config: RlConfig, tokenizer: Tokenizer, learner: Learner, mesh: Mesh
) -> RolloutSource:
    """The source that the config asks for, with the learner's weights."""
    if config.rollout.workers:
        return _ray_source().RaySource(config, tokenizer, learner.weights(), learner.version)
    engine = Engine(
        learner.model(),
        config.engine,
        decode_text=tokenizer.decode,
        mesh=None if mesh.size == 1 else mesh,
    )
    kind = InThread if config.rollout.asynchronous else InProcess
    return kind(engine, tokenizer, learner.version)


def _ray_source():
    """The module that alone needs Ray. Raises ValueError where there is none."""
    try:
        from glm_jax.rl import ray_source
    except ModuleNotFoundError as error:
        raise ValueError(
            f"rollout.workers needs Ray ({error}): pip install -r requirements-ray.txt"
        ) from None
    return ray_source


class Run:
    """One call of `train`. What must survive a kill is in get_state and the learner's state."""

    def __init__(
        self,
        config: RlConfig,
        folder: WorkDir,
        tokenizer: Tokenizer,
        controllers: Controllers,
        learner: Learner,
        source: RolloutSource,
        first: int,
        progress: bool,
    ):
        self.config, self.folder, self.tokenizer = config, folder, tokenizer
        self.controllers, self.learner, self.source = controllers, learner, source
        self.collector: Collector | StreamCollector
        if config.rollout.asynchronous:
            stream = cast(RolloutStream, source)
            self.collector = StreamCollector(stream, config.rollout, config.grpo)
        else:
            self.collector = Collector(source, config.rollout, config.grpo.max_staleness)
        self.step = first  # steps done
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.bar = tqdm(
            total=config.loop.steps, initial=first, desc="rl", unit="step", disable=not progress
        )
        folder.start(first)

    def close(self):
        self.source.close()
        self.bar.close()
        self.folder.close()

    def loop(self) -> int:
        loop = self.config.loop
        while self.step < loop.steps:
            before = self.evaluate() if self.step == 0 else {}  # a resumed run has done it
            record = {"step": self.step, **before, **self.one_step()}
            self.step += 1
            last = self.step == loop.steps
            if last or self.step % loop.eval_every == 0:
                record |= {f"{name}_after": value for name, value in self.evaluate().items()}
            stop = self.folder.should_stop(self.step)
            record |= {f"seconds/{phase}": seconds for phase, seconds in self.phases().items()}
            self.folder.record(record)
            if "reward" in record:  # a step whose groups all come from the buffer samples nothing
                self.bar.set_postfix_str(f"reward {record['reward']:.3f}", refresh=False)
            self.bar.update(1)
            if last or stop or self.step % loop.checkpoint_every == 0:
                self.folder.checkpoints.save(self.step, self.learner.state, *self.get_state())
            if stop:
                break
        self.folder.checkpoints.wait()
        return self.step

    def one_step(self) -> dict:
        """Collects rollouts, trains on them, gives the engine the new weights. Returns the step's
        record.
        """
        controllers, learner, version = self.controllers, self.learner, self.learner.version
        spec = controllers.spec(self.step)
        record = {
            "version": version,
            "temperature": spec.temperature,
            "max_new_tokens": spec.max_new_tokens,
            "pool": controllers.pool,
        }
        with self.timed("collect"):
            collected = self.collector.collect(controllers.take, spec, version)
        record |= collected.counts | measures.of_groups(collected.all_groups)
        record |= measures.staleness(collected.groups, version)
        every = self.config.loop.save_rollouts_every
        if every and self.step % every == 0:
            self.save_rollouts("rollouts", collected.all_groups)
        with self.timed("train"):
            record |= learner.learn(collected.groups, spec.temperature, self.step)
        with self.timed("swap"):
            self.source.set_weights(learner.weights(), learner.version)
        if collected.all_groups and controllers.observe(record["reward"]):
            record |= self.sweep_temperatures()
        return record

    def evaluate(self) -> dict:
        """pass@1 on the held-out tasks: the mean reward, over all and by group."""
        groups = self.held_out(self.config.loop.eval_temperature)
        if self.config.loop.save_rollouts_every:
            self.save_rollouts("held_out", groups)
        return measures.held_out(groups)

    def held_out(self, temperature: float) -> list[Group]:
        """Rollouts of the held-out tasks; their time is a phase of its own."""
        spec = self.controllers.evaluation_spec(temperature)
        self.count(self.source.take_seconds())
        with self.timed("evaluate"):
            groups = self.source.rollouts(self.controllers.tasks.held_out, spec, HELD_OUT_TASKS)
        self.source.take_seconds()
        return groups

    def sweep_temperatures(self) -> dict:
        """Scores the temperatures on the held-out prompts and lets the controller choose."""
        control = self.controllers.temperature
        scores = {t: measures.held_out(self.held_out(t))["held_out"] for t in control.temperatures}
        control.choose(scores)
        return {f"sweep/{t}": score for t, score in scores.items()}

    def save_rollouts(self, folder_name: str, groups: Sequence[Group]):
        """<folder_name>/<steps done>.jsonl: every rollout of the groups, as text."""
        file = self.folder.path / folder_name / f"{self.step:07d}.jsonl"
        write_json_lines(file, measures.readable(groups, self.tokenizer))

    def get_state(self) -> tuple[dict, dict]:
        progress, arrays = self.collector.get_state()
        return self.controllers.get_state() | progress, arrays

    def set_state(self, saved: dict, arrays: dict):
        self.controllers.set_state(saved)
        self.collector.set_state(saved, arrays)

    @contextlib.contextmanager
    def timed(self, phase: str):
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def count(self, seconds: Mapping[str, float]):
        for phase, spent in seconds.items():
            self.seconds[phase] += spent

    def phases(self) -> dict[str, float]:
        """Seconds since the last call, by phase."""
        self.count(self.source.take_seconds())
        found = dict(self.seconds)
        self.seconds.clear()
        return found
