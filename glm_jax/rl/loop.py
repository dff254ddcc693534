"""The loop of reinforcement learning, synchronous and colocated: generate, score, train, swap
weights, one after the other.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from data import chat_template
from data.tokenizer import Tokenizer
from glm_jax.infer.engine import Engine
from glm_jax.rewards import verifiers
from glm_jax.rewards.task import Task
from glm_jax.rl import measures
from glm_jax.rl.advantages import advantages
from glm_jax.rl.batch import pack
from glm_jax.rl.collector import Collector, Draw, Roller
from glm_jax.rl.config import RlConfig
from glm_jax.rl.curriculum import Curriculum, read_difficulties, split_pools
from glm_jax.rl.output_length import output_length
from glm_jax.rl.pool import TaskOrder, load_sources, with_wrong_answers
from glm_jax.rl.rollout import Group, group_from_json, group_to_json
from glm_jax.rl.step import PolicyKnobs, compile_policy_step, trainer_logprobs
from glm_jax.rl.temperature import TemperatureControl
from glm_jax.sharding import make_mesh, named, one_process
from glm_jax.train.checkpoint import Checkpoints, finished_steps
from glm_jax.train.loop import Stop, check_config, write_config
from glm_jax.train.metrics import Recorder, check_finite, load_statistics, naming
from glm_jax.train.start import StartConfig, check_start, starting_state, starting_tokenizer
from glm_jax.train.state import Trainee, TrainState, build_model

logger = logging.getLogger(__name__)
# sections that a resumed run may not change
FIXED = ("model", "optimizer", "engine", "tasks", "rollout", "grpo", "control", "start")
# numbers of draws from here on are evaluations', so that they never share a seed with training
HELD_OUT_DRAWS = 2**31


def train(
    config: RlConfig, start: StartConfig, workdir: pathlib.Path, *, config_json: str, progress: bool
) -> int:
    """Runs, or resumes, a run until loop.steps. Returns the number of steps behind it. Errors as
    for `open_run`.
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
    trainee = Trainee.create(config.model, config.optimizer)
    abstract = trainee.abstract_state(mesh)
    config.engine.check(config.model, mesh)
    named(
        mesh,
        ("batch", "length"),
        (config.grpo.rows, config.grpo.row_length),
        "grpo.rows x grpo.row_length",
    )
    check_config(workdir, config_json, FIXED)
    resuming = bool(finished_steps(workdir))
    if not resuming:
        if not start.workdir:
            raise ValueError(
                "start.workdir is empty: reinforcement learning needs the weights of another run"
            )
        check_start(start, config.model)
    tokenizer = (
        Tokenizer.load(workdir / "tokenizer.json") if resuming else starting_tokenizer(start)
    )
    tasks = Tasks(config, tokenizer)

    # Everything that can be wrong was read; from here on the work directory is written.
    write_config(workdir, config_json)
    if not resuming:
        (workdir / "tokenizer.json").write_text(tokenizer.to_json())
    checkpoints = Checkpoints(workdir, keep=config.loop.keep_checkpoints)
    first = checkpoints.latest()
    saved = None
    if first is None:
        first, state = 0, starting_state(start, trainee, mesh, config.loop.seed)
    else:
        state, saved = checkpoints.restore(first, abstract)
        logger.info("resumed from step %d", first)
    run = Run(config, workdir, mesh, trainee, checkpoints, tokenizer, tasks, state, first, progress)
    if saved is not None:
        run.set_state(saved)
    return run


class Tasks:
    """The tasks of a run, checked: every answer can be judged, every prompt with its output fits
    into the engine.
    """

    def __init__(self, config: RlConfig, tokenizer: Tokenizer):
        self.train = load_sources(config.tasks.train, "train")
        self.held_out = load_sources(config.tasks.held_out, "held_out")
        asked = {json.dumps(t.messages) for t in self.train} | {t.id for t in self.train}
        for task in self.held_out:
            if task.id in asked or json.dumps(task.messages) in asked:
                raise ValueError(f"task {task.id!r} of tasks.held_out is in tasks.train, too")
        verifiers.check([*self.train, *self.held_out])
        longest = max(tokens for _, tokens in config.control.length_stages)
        for task in [*self.train, *self.held_out]:
            tokens = len(
                chat_template.encode(
                    tokenizer, task.messages, task.tools, thinking=config.tasks.thinking
                )
            )
            if tokens + longest > config.engine.context:
                raise ValueError(
                    f"task {task.id!r}: its prompt of {tokens} tokens and an output of {longest}"
                    f" exceed engine.context={config.engine.context}"
                )
        pools = None
        if config.control.curriculum != "none":
            known = read_difficulties(config.control.difficulty)
            pools = split_pools(
                self.train, known, config.control.pass_few, config.control.pass_many
            )
        window, gain = config.control.plateau_window, config.control.plateau_gain
        self.curriculum = Curriculum(
            config.control.curriculum, len(self.train), pools, window, gain
        )
        self.order = TaskOrder(
            with_wrong_answers(self.train, config.tasks.wrong_answers, config.tasks.seed),
            config.tasks.seed,
        )

    def take(self, count: int) -> list[Task]:
        """The next tasks of the curriculum's pool."""
        return self.order.take(
            count, self.curriculum.pool, self.curriculum.pools[self.curriculum.pool]
        )


class Run:
    """One call of `train`: what it holds between steps. What must survive a kill is in get_state
    and the train state.
    """

    def __init__(
        self,
        config: RlConfig,
        workdir,
        mesh,
        trainee,
        checkpoints,
        tokenizer,
        tasks: Tasks,
        state: TrainState,
        first,
        progress,
    ):
        self.config = config
        self.workdir = workdir
        self.mesh = mesh
        self.trainee = trainee
        self.checkpoints = checkpoints
        self.tasks, self.state, self.step = tasks, state, first
        control = config.control
        self.temperature = TemperatureControl(
            control.temperatures,
            control.temperature_loss,
            control.plateau_window,
            control.plateau_gain,
        )
        self.seconds: collections.Counter = collections.Counter()
        self.update = compile_policy_step(trainee, config.grpo, mesh)
        engine = Engine(
            self.model(),
            config.engine,
            decode_text=tokenizer.decode,
            mesh=None if mesh.size == 1 else mesh,
        )
        engine.version = self.version
        self.roller = Roller(engine, tokenizer)
        self.collector = Collector(self.roller, config.rollout, config.grpo.max_staleness)
        self.recorder = Recorder(workdir, first)
        self.bar = tqdm(
            total=config.loop.steps, initial=first, desc="rl", unit="step", disable=not progress
        )
        self.stop = Stop()

    def close(self):
        self.stop.restore_handlers()
        self.bar.close()
        self.checkpoints.close()
        self.recorder.close()

    @property
    def version(self) -> int:
        """Of the weights: updates behind them."""
        return int(self.state.step)

    def model(self):
        return build_model(self.config.model, self.state.params, self.state.router)

    def get_state(self) -> dict:
        return {
            "positions": self.tasks.order.get_state(),
            "curriculum": self.tasks.curriculum.get_state(),
            "temperature": self.temperature.get_state(), "num_drawn": self.collector.num_drawn,
            "buffer": [group_to_json(g) for g in self.collector.buffer],
        }  # fmt: skip

    def set_state(self, saved: dict):
        self.tasks.order.set_state(saved["positions"])
        self.tasks.curriculum.set_state(saved["curriculum"])
        self.temperature.set_state(saved["temperature"])
        self.collector.num_drawn = saved["num_drawn"]
        self.collector.buffer = [group_from_json(g) for g in saved["buffer"]]

    @contextlib.contextmanager
    def timed(self, phase: str):
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def loop(self) -> int:
        loop = self.config.loop
        while self.step < loop.steps:
            before = self.evaluate() if self.step == 0 else {}  # a resumed run has it behind it
            record = {"step": self.step, **before, **self.one_step()}
            self.step += 1
            last = self.step == loop.steps
            if last or self.step % loop.eval_every == 0:
                record |= {f"{name}_after": value for name, value in self.evaluate().items()}
            stop = self.stop.now(self.checkpoints, self.step)
            record |= {f"seconds/{phase}": seconds for phase, seconds in self.phases().items()}
            self.recorder.write(record)
            if "reward" in record:  # a step whose groups all come from the buffer draws nothing
                self.bar.set_postfix_str(f"reward {record['reward']:.3f}", refresh=False)
            self.bar.update(1)
            if last or stop or self.step % loop.checkpoint_every == 0:
                self.checkpoints.save(self.step, self.state, self.get_state())
            if stop:
                break
        self.checkpoints.wait()
        return self.step

    def phases(self) -> dict[str, float]:
        """Seconds since the last call, by phase."""
        seconds = self.seconds + self.roller.seconds
        self.seconds.clear()
        self.roller.seconds.clear()
        return dict(seconds)

    def one_step(self) -> dict:
        """Collects rollouts, trains on them, gives the engine the new weights. Returns the step's
        record.
        """
        config, version = self.config, self.version
        draw = Draw(
            config.rollout.group_size, output_length(config.control.length_stages, self.step),
            self.temperature.temperature,
            config.loop.seed, config.tasks.thinking,
        )  # fmt: skip
        pool = self.tasks.curriculum.pool
        collected = self.collector.collect(self.tasks.take, draw, version)
        record = {
            "version": version,
            "temperature": draw.temperature,
            "max_new_tokens": draw.max_new_tokens,
            **collected.counts,
        }
        record |= {
            "pool": sorted(self.tasks.curriculum.pools).index(pool),
            **measures.of_groups(collected.all_groups),
        }
        record |= measures.staleness(collected.groups, version)
        every = config.loop.save_rollouts_every
        if every and self.step % every == 0:
            self.save_rollouts("rollouts", collected.all_groups)
        with self.timed("train"):
            record |= self.learn(collected.groups, draw.temperature)
        with self.timed("swap"):
            self.roller.engine.set_weights(
                nnx.state(self.model()), recompute=True, version=self.version
            )
        if collected.all_groups:
            self.tasks.curriculum.observe(record["reward"])
            if self.temperature.observe(record["reward"]):
                record |= self.sweep_temperatures()
        return record

    def learn(self, groups: list[Group], temperature: float) -> dict:
        """The step's updates. Returns their mean metrics; only counts where there was nothing to
        learn from.
        """
        grpo, updates = self.config.grpo, []
        parts = [
            p
            for p in (groups[i :: grpo.updates_per_step] for i in range(grpo.updates_per_step))
            if any(g.has_variance for g in p)
        ]
        batches = [self.batch(part) for part in parts]
        with jax.set_mesh(self.mesh):
            if len(batches) > 1 and grpo.old_logprobs == "trainer":
                # All before the first update: they are the denominators of all ratios.
                for batch, used in batches:
                    args = (
                        self.state.params,
                        self.state.router,
                        batch,
                        jnp.int32(used),
                        jnp.float32(temperature),
                    )
                    batch["old_logprobs"] = np.asarray(trainer_logprobs(self.config.model, *args))
            for batch, used in batches:
                rate = grpo.learning_rate * min(
                    1.0, (self.version + 1) / max(grpo.warmup_updates, 1)
                )
                knobs = PolicyKnobs(jnp.int32(used), jnp.float32(rate), jnp.float32(temperature))
                self.state, metrics = self.update(self.state, batch, knobs)
                updates.append(jax.device_get(metrics))
                # Before the engine gets these weights, and before they are saved.
                part = lambda batch=batch: batch
                check_finite(
                    updates[-1],
                    step=self.step,
                    workdir=self.workdir,
                    batch=part,
                    good=self.checkpoints.written,
                )
        return {"updates": len(updates), **self.mean_metrics(updates)}

    def batch(self, groups: list[Group]) -> tuple[dict[str, np.ndarray], int]:
        """The groups as `pack` lays them out."""
        grpo, rollout = self.config.grpo, self.config.rollout
        pairs = [
            pair for group in groups for pair in advantages(group, normalize_std=grpo.normalize_std)
        ]
        return pack(
            pairs, row_length=grpo.row_length, rows=grpo.rows,
            most=rollout.prompts_per_step * rollout.group_size,
            aggregation=grpo.aggregation, mask_truncated=rollout.mask_truncated,
            replay=grpo.replay_experts,
        )  # fmt: skip

    def mean_metrics(self, updates: list[dict]) -> dict:
        if not updates:
            return {}
        record = {}
        counts = [u.pop("expert_counts") for u in updates if "expert_counts" in u]
        if counts:
            violation, entropy = load_statistics(sum(counts)[: self.config.model.num_moe_layers])
            record |= {"max_violation": violation, "load_entropy": entropy}
        record |= {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
        # How far the trainer is from the engine, before any update has moved it.
        record |= {name: float(updates[0][name]) for name in ("difference", "difference_max")}
        return record

    def evaluate(self) -> dict:
        """pass@1 on the held-out tasks: the mean reward, over all and by group."""
        groups = self.held_out(self.config.loop.eval_samples, self.config.loop.eval_temperature)
        if self.config.loop.save_rollouts_every:
            self.save_rollouts("held_out", groups)
        return measures.held_out(groups)

    def held_out(self, samples: int, temperature: float) -> list[Group]:
        """Rollouts of the held-out tasks; their time is a phase of its own."""
        longest = max(tokens for _, tokens in self.config.control.length_stages)
        draw = Draw(
            samples, longest, temperature, self.config.loop.seed, self.config.tasks.thinking
        )
        before = self.roller.seconds.copy()
        with self.timed("evaluate"):
            groups = self.roller.roll(self.tasks.held_out, draw, HELD_OUT_DRAWS)
        self.roller.seconds = before
        return groups

    def sweep_temperatures(self) -> dict:
        """Scores the temperatures on the held-out prompts and lets the controller choose."""
        scores = {
            t: measures.held_out(self.held_out(self.config.loop.eval_samples, t))["held_out"]
            for t in self.temperature.temperatures
        }
        self.temperature.choose(scores)
        return {f"sweep/{t}": score for t, score in scores.items()}

    def save_rollouts(self, folder_name: str, groups: list[Group]):
        """<folder_name>/<steps done>.jsonl: every rollout of the groups, as text."""
        folder = self.workdir / folder_name
        folder.mkdir(exist_ok=True)
        lines = measures.readable(groups, self.roller.tokenizer)
        file = folder / f"{self.step:07d}.jsonl"
        with naming(file):
            file.with_suffix(".tmp").write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8"
            )
            file.with_suffix(".tmp").replace(file)
