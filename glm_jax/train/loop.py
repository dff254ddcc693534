"""The training loop: data, step, metrics, evaluation, samples, checkpoints, resume."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from data.held_out import held_out_batches
from data.pipeline import BatchIterator, DataConfig, merge_states
from data.tokenizer import Tokenizer
from glm_jax.config import ModelConfig, check_types
from glm_jax.files import write_text
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.optim.schedules import Schedule, ScheduleConfig, ScheduleValues
from glm_jax.run.checkpoints import Checkpoints
from glm_jax.run.workdir import WorkDir
from glm_jax.sharding import MeshConfig, data_rank, make_mesh, named, one_process
from glm_jax.train.evaluation import Evaluator, Sampler
from glm_jax.train.metrics import flops_per_token, load_statistics, peak_flops
from glm_jax.train.start import CHANGEABLE, StartConfig, check_start, starting_state
from glm_jax.train.state import TrainSpec, TrainState
from glm_jax.train.step import StepScalars, compile_step, map_routers

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    seed: int  # of the initial weights
    checkpoint_every: int  # steps; the last step is always saved
    keep_checkpoints: int
    eval_every: int  # steps; 0: only at the end
    eval_batches: int  # microbatches of held-out text; 0: all of it
    sample_every: int  # steps, and at the end; 0: never
    sample_length: int  # tokens
    sample_temperature: float
    sample_top_p: float
    sample_prompts: tuple[str, ...]
    fim_prompts: tuple[str, ...]  # '<prefix>|<suffix>' pairs, the middle is completed

    def __post_init__(self):
        check_types(self)
        for prompt in self.fim_prompts:
            if prompt.count("|") != 1:
                raise ValueError(
                    f"loop.fim_prompts holds {prompt!r}: must be a prefix and a suffix with one '|'"
                    " between"
                )
        if self.checkpoint_every < 1 or self.keep_checkpoints < 1:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} and"
                f" keep_checkpoints={self.keep_checkpoints} must be positive"
            )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    model: ModelConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig  # or what another Source reads
    loop: LoopConfig
    start: StartConfig

    def __post_init__(self):
        if self.data.sequence_length > self.model.max_length:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} exceeds"
                f" model.max_length={self.model.max_length}"
            )


@dataclasses.dataclass(frozen=True)
class Source:
    """What opens the training and the held-out rows that RunConfig.data describes; both as in
    data.pipeline and data.held_out, given this process's part of them (sharding.data_rank).
    """

    batches: Callable
    held_out: Callable


PRETRAINING = Source(BatchIterator, held_out_batches)


class Batches:
    """Device batches [A, B, L] of a step's microbatches, and the data position after them."""

    def __init__(self, config: RunConfig, mesh: Mesh, source: Source):
        self.iterator = source.batches(config.data, *data_rank(mesh))
        if self.iterator.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"the data's tokenizer has {self.iterator.vocab_size} tokens,"
                f" model.vocab_size={config.model.vocab_size}"
            )
        self.capacity = config.schedule.last_microbatches
        self.shape = (self.capacity, config.data.batch_size, config.data.sequence_length)
        self.sharding = named(mesh, (None, "batch", "length"), self.shape, "batch")

    def next(self, microbatches: int) -> tuple[dict[str, jax.Array], list[dict[str, np.ndarray]]]:
        """A step's batch on the devices, padded with empty microbatches to one shape, and the same
        on the host.
        """
        parts = []
        for _ in range(microbatches):
            try:
                parts.append(next(self.iterator))
            except StopIteration:
                raise ValueError(
                    "the data ended before schedule.total_tokens: set data.epochs=0 for endless, or"
                    " fewer tokens"
                ) from None
        empty = [jax.tree.map(np.zeros_like, parts[0])] * (self.capacity - microbatches)
        stacked = {name: np.stack([p[name] for p in [*parts, *empty]]) for name in parts[0]}
        return {
            n: jax.make_array_from_process_local_data(self.sharding, x, self.shape)
            for n, x in stacked.items()
        }, parts


def train(
    config: RunConfig,
    workdir: pathlib.Path,
    *,
    config_json: str,
    progress: bool,
    source: Source = PRETRAINING,
) -> int:
    """Runs, or resumes, a run until schedule.total_tokens. Returns the number of steps done.

    Raises ValueError for anything wrong with config, data or checkpoint before the first step,
    metrics.NonFinite during one.
    """
    mesh = make_mesh(config.mesh)
    if config.loop.sample_every:
        one_process(f"loop.sample_every={config.loop.sample_every}: sampling", mesh.devices.flat)
    spec = TrainSpec.create(config.model, config.optimizer)
    abstract = spec.abstract_state(mesh)
    batches = Batches(config, mesh, source)
    held_out = source.held_out(config.data, *data_rank(mesh), config.loop.eval_batches or None)
    tokenizer = batches.iterator.tokenizer
    folder = WorkDir(
        workdir, config_json, fixed=FIXED, changeable=RESUME_CHANGEABLE,
        keep=config.loop.keep_checkpoints, merge=merge_progress,
    )  # fmt: skip
    if folder.resuming:
        first, tokens, state = resume(folder.checkpoints, abstract, batches)
    else:
        check_start(config.start, config.model, tokenizer)
        first, tokens, state = 0, 0, None
    schedule = Schedule(
        config.schedule, config.data.batch_size * config.data.sequence_length, first, tokens
    )

    # Everything that can be wrong was read; from here on the work directory is written.
    folder.begin(tokenizer)
    if state is None:
        state = starting_state(config.start, spec, mesh, config.loop.seed)
    run = _Run(config, folder, mesh, spec, schedule, tokenizer, first, progress, held_out)
    try:
        return run.loop(state, batches)
    finally:
        run.close()


def merge_progress(states: list[dict]) -> dict:
    """One progress of all processes': the position in the data, and the tokens that the model has
    seen.
    """
    return {"data": merge_states([s["data"] for s in states]), "tokens": states[0]["tokens"]}


def resume(
    checkpoints: Checkpoints, abstract: TrainState, batches: Batches
) -> tuple[int, int, TrainState]:
    """(step, tokens seen, state) of the newest checkpoint, with `batches` where they were."""
    first = checkpoints.latest()
    assert first is not None, "the run has a checkpoint to resume from"
    state, progress, _ = checkpoints.restore(first, abstract)
    if "tokens" not in progress:
        raise ValueError(
            f"checkpoint {checkpoints.folder / str(first)} does not say how many tokens it has"
            " seen: an older version wrote it"
        )
    batches.iterator.set_state(progress["data"])
    logger.info("resumed from step %d, after %d tokens", first, progress["tokens"])
    return first, progress["tokens"], state


# Sections that a resumed run may not change, and keys of them that it may: how it computes or where
# things lie, not what.
FIXED = ("model", "data", "optimizer", "start")
RESUME_CHANGEABLE = {("model", key) for key in CHANGEABLE} | {
    ("data", "paths"),
    ("data", "verify_checksums"),
    ("start", "workdir"),
}


class _Run:
    """One call of `train`: owns the recorder, the progress bar and what is derived from the
    config.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: WorkDir,
        mesh: Mesh,
        spec: TrainSpec,
        schedule: Schedule,
        tokenizer: Tokenizer,
        first: int,
        progress: bool,
        held_out,
    ):
        self.config = config
        self.folder = folder
        self.schedule = schedule
        self.mesh, self.first = mesh, first
        self.step_function = compile_step(spec, config.schedule.balance_weight, mesh)
        self.evaluator = Evaluator(config.model, mesh, held_out)
        self.sampler = Sampler(config.model, tokenizer, config.loop)
        peak = peak_flops(jax.local_devices()[0])
        self.flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self.peak = peak and peak * jax.device_count()
        self.bar = tqdm(
            total=schedule.num_steps,
            initial=first,
            desc="train",
            unit="step",
            disable=not (progress and folder.is_main),
        )
        folder.start(first)

    def close(self):
        self.bar.close()
        self.folder.close()

    def loop(self, state: TrainState, batches: Batches) -> int:
        loop, last = self.config.loop, self.schedule.num_steps
        pending = None  # the step in flight: its metrics are read when the next one is under way
        mark = time.perf_counter()
        step = self.first
        while step < last:
            point = self.schedule[step]
            batch, host_batch = batches.next(point.microbatches)
            with jax.set_mesh(self.mesh):
                state, metrics = self.step_function(state, batch, StepScalars.of(point))
            step += 1
            if pending is not None:
                mark = self.record(*pending, mark)
            pending = (point, metrics, host_batch)
            stop = self.folder.should_stop(step)
            saving = step == last or stop or step % loop.checkpoint_every == 0
            evaluating = step == last or (loop.eval_every and step % loop.eval_every == 0)
            sampling = loop.sample_every and (step == last or step % loop.sample_every == 0)
            if not (saving or evaluating or sampling):
                continue
            with jax.set_mesh(self.mesh):
                extra = self.evaluator(state) if evaluating else {}
            # raises before a state that is not finite is saved
            mark = self.record(*pending, mark, extra | self.router_biases(state))
            pending = None
            if saving:
                self.folder.checkpoints.save(
                    step,
                    state,
                    {
                        "data": batches.iterator.get_state(),
                        "tokens": self.schedule.tokens_before(step),
                    },
                )
            if sampling:
                self.write_samples(step, state)
            mark = time.perf_counter() if evaluating or sampling else mark
            if stop:
                break
        self.folder.checkpoints.wait()
        return step

    def record(
        self, point: ScheduleValues, metrics, host_batch, mark: float, extra: dict | None = None
    ) -> float:
        """Writes one step's line. Returns the time now, from which the next step is counted."""
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        parts = lambda: {
            f"{name}_{i}": x for i, part in enumerate(host_batch) for name, x in part.items()
        }
        observed = metrics | (extra or {})
        self.folder.check_finite(observed, step=point.step, batch=parts)
        loss = float(metrics["loss"])
        tokens = self.schedule.tokens_before(point.step + 1)
        speed = (tokens - point.tokens) / max(now - mark, 1e-9)
        record = {
            "step": point.step,
            "tokens": tokens,
            "learning_rate": point.learning_rate,
            "microbatches": point.microbatches,
        }
        record |= {
            "mtp_weight": point.mtp_weight,
            "bias_rate": point.bias_rate,
            "tokens_per_second": speed,
        }
        if self.peak:
            record["mfu"] = speed * self.flops_per_token / self.peak
        if "expert_counts" in metrics:
            violation, entropy = load_statistics(metrics.pop("expert_counts"))
            record |= {"max_violation": violation, "load_entropy": entropy}
        record |= {name: float(value) for name, value in metrics.items()} | (extra or {})
        self.folder.record(record)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update(1)
        return now

    def router_biases(self, state: TrainState) -> dict:
        """Every router's bias, for the record."""
        tables = []
        if state.router:
            map_routers(lambda table: tables.append(np.asarray(table)) or table, state.router)
        return {"router_bias": tables[0].tolist()} if tables else {}

    def write_samples(self, step: int, state: TrainState):
        text = self.sampler(state)
        if not self.folder.is_main:
            return
        write_text(self.folder.path / "samples" / f"{step:07d}.txt", text)
        self.folder.record_text(step, "samples", text)
