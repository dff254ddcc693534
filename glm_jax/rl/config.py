"""What a run of reinforcement learning is made of. Every field is set by a file in configs/; none
has a default.
"""

from __future__ import annotations

import dataclasses
import math

from glm_jax.config import ModelConfig, check_choice, check_types
from glm_jax.infer.config import EngineConfig
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.sharding import MeshConfig

AGGREGATIONS = ("token", "sequence")
OLD_LOGPROBS = ("trainer", "engine")
CURRICULA = ("none", "moderate", "two_stage")


def _require(ok: bool, name: str, value, valid: str):
    if not ok:
        raise ValueError(f"{name}={value!r}: must be {valid}")


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """Sources are 'puzzle:GENERATOR:COUNT' (reasoning-gym, of the split that fits) or paths of task
    files (rewards/task.py).
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    seed: int  # of the tasks' order, new in every epoch
    thinking: bool  # the model is asked to reason
    # ablation: share of the training tasks that are judged by another task's answer
    wrong_answers: float

    def __post_init__(self):
        check_types(self)
        for name in ("train", "held_out"):
            _require(
                bool(getattr(self, name)),
                f"tasks.{name}",
                getattr(self, name),
                "at least one source",
            )
        _require(self.seed >= 0, "tasks.seed", self.seed, "at least 0")
        _require(0 <= self.wrong_answers <= 1, "tasks.wrong_answers", self.wrong_answers, "in 0..1")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How rollouts are sampled for a step. Groups in which all rewards are equal teach nothing."""

    prompts_per_step: int
    group_size: int  # rollouts of a prompt
    # prompts of a round over those still missing; what is left over waits, or is dropped and
    # counted
    over_sampling: float
    # sample while the learner trains, within grpo.max_staleness; else they take turns
    asynchronous: bool
    # Ray actors that sample, each with an engine on devices of its own; 0: this process samples
    workers: int
    # of each worker, as Ray counts them: ("CPU", 1.0), ...
    worker_resources: tuple[tuple[str, float], ...]
    dynamic_sampling: bool  # replace groups without variance, in further waves
    max_waves: int  # then the step goes on with what it has
    # no loss on rollouts that reached the output length; else they count as wrong
    mask_truncated: bool

    def __post_init__(self):
        check_types(self)
        _require(
            self.prompts_per_step >= 1,
            "rollout.prompts_per_step",
            self.prompts_per_step,
            "at least 1",
        )
        _require(
            self.group_size >= 2,
            "rollout.group_size",
            self.group_size,
            "at least 2: an advantage is relative to the group",
        )
        _require(self.over_sampling >= 1, "rollout.over_sampling", self.over_sampling, "at least 1")
        _require(self.max_waves >= 1, "rollout.max_waves", self.max_waves, "at least 1")
        _require(self.workers >= 0, "rollout.workers", self.workers, "at least 0")
        _require(
            self.asynchronous or not self.workers, "rollout.workers", self.workers,
            "0 without rollout.asynchronous: workers of their own never wait for the training",
        )  # fmt: skip
        _require(
            all(_is_resource(r) for r in self.worker_resources), "rollout.worker_resources",
            self.worker_resources,
            "pairs (name, amount above 0), such as ('CPU', 1.0)",
        )  # fmt: skip


def _is_resource(pair) -> bool:
    return (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], int | float)
        and 0 < pair[1] < math.inf
    )


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """GRPO without KL term (docs/glm45.md, "Reinforcement learning"; clip-higher and token-weighted
    loss as in DAPO, arXiv 2503.14476).
    """

    learning_rate: float
    warmup_updates: int  # linear from 0
    normalize_std: bool  # advantages over the group's standard deviation
    clip_low: float  # probability ratios below 1 - clip_low and
    clip_high: float  # above 1 + clip_high have no gradient where it would move them further out
    aggregation: str  # 'token': every token weighs the same; 'sequence': every rollout does
    # ratios are against the weights at the step's beginning ('trainer') or the engine's own numbers
    # ('engine')
    old_logprobs: str
    # largest weight that corrects the engine's distribution to the trainer's; 0: no correction
    importance_cap: float
    replay_experts: bool  # the trainer routes as the engine did
    updates_per_step: int  # optimizer steps; groups are dealt to them
    # updates by which rollouts may be older than the weights they train; 0: on policy, asserted
    max_staleness: int
    mtp_weight: float  # of the MTP block's loss on the rollouts; 0: the block rests
    bias_rate: float  # of loss-free balancing
    balance_weight: float  # of the sequence balance loss
    row_length: int  # tokens of a packed row
    rows: int  # of a microbatch

    def __post_init__(self):
        check_types(self)
        check_choice("grpo.aggregation", self.aggregation, AGGREGATIONS)
        check_choice("grpo.old_logprobs", self.old_logprobs, OLD_LOGPROBS)
        _require(0 <= self.clip_low < 1, "grpo.clip_low", self.clip_low, "in 0..1")
        _require(self.clip_high >= 0, "grpo.clip_high", self.clip_high, "at least 0")
        _require(self.importance_cap >= 0, "grpo.importance_cap", self.importance_cap, "at least 0")
        _require(
            self.old_logprobs == "trainer" or self.importance_cap == 0, "grpo.importance_cap",
            self.importance_cap,
            "0 with old_logprobs='engine', whose ratio holds the correction",
        )  # fmt: skip
        for name in ("updates_per_step", "row_length", "rows"):
            _require(getattr(self, name) >= 1, f"grpo.{name}", getattr(self, name), "at least 1")
        for name in (
            "learning_rate",
            "warmup_updates",
            "max_staleness",
            "mtp_weight",
            "bias_rate",
            "balance_weight",
        ):
            _require(getattr(self, name) >= 0, f"grpo.{name}", getattr(self, name), "at least 0")


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """The controllers: which tasks, at which temperature, how long (arXiv 2508.06471, section
    3.2).
    """

    curriculum: str  # CURRICULA; those but 'none' need a difficulty file
    difficulty: str  # path of the file that experiments.difficulty writes
    pass_few: int  # k of the moderate pool: solved sometimes, not always, in k rollouts
    pass_many: int  # k of the hard pool: never in pass_few, at least once in pass_many
    # one: fixed; more: the first to begin with, swept where the reward stops rising
    temperatures: tuple[float, ...]
    # the highest temperature whose held-out score is at most this share below the best is taken
    temperature_loss: float
    # steps: the reward's mean over the last so many is compared with the mean over those before
    plateau_window: int
    plateau_gain: float  # a smaller rise than this is a plateau
    # (first step, output tokens), rising; one stage: the full length from the start
    length_stages: tuple[tuple[int, int], ...]

    def __post_init__(self):
        check_types(self)
        check_choice("control.curriculum", self.curriculum, CURRICULA)
        _require(
            (self.curriculum == "none") == (not self.difficulty), "control.difficulty",
            self.difficulty,
            f"the path of a difficulty file, and empty without a curriculum "
            f"(curriculum={self.curriculum!r})",
        )  # fmt: skip
        _require(
            1 <= self.pass_few <= self.pass_many,
            "control.pass_few",
            self.pass_few,
            f"in 1..pass_many={self.pass_many}",
        )
        numbers = all(isinstance(t, int | float) and 0 < t < math.inf for t in self.temperatures)
        _require(
            bool(self.temperatures) and numbers,
            "control.temperatures",
            self.temperatures,
            "above 0, one or more",
        )
        _require(
            0 <= self.temperature_loss <= 1,
            "control.temperature_loss",
            self.temperature_loss,
            "in 0..1",
        )
        _require(
            self.plateau_window >= 1, "control.plateau_window", self.plateau_window, "at least 1"
        )
        _require(
            _are_stages(self.length_stages), "control.length_stages", self.length_stages,
            "pairs (first step, output tokens), the first of step 0, steps rising",
        )  # fmt: skip
        object.__setattr__(self, "length_stages", tuple(map(tuple, self.length_stages)))


def _are_stages(stages) -> bool:
    pairs = all(
        isinstance(s, tuple | list)
        and len(s) == 2
        and type(s[0]) is type(s[1]) is int
        and s[1] >= 1
        for s in stages
    )
    starts = [s for s, _ in stages] if pairs else []
    return starts[:1] == [0] and starts == sorted(set(starts))


@dataclasses.dataclass(frozen=True)
class RlLoopConfig:
    seed: int  # of everything that is sampled
    steps: int
    checkpoint_every: int  # steps; the last is always saved
    keep_checkpoints: int
    eval_every: int  # steps, besides before the first and after the last
    eval_samples: int  # rollouts of each held-out task
    eval_temperature: float
    save_rollouts_every: int  # steps; 0: never; those of evaluations are saved unless it is 0

    def __post_init__(self):
        check_types(self)
        for name in ("steps", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_samples"):
            _require(getattr(self, name) >= 1, f"loop.{name}", getattr(self, name), "at least 1")
        for name in ("seed", "save_rollouts_every"):
            _require(getattr(self, name) >= 0, f"loop.{name}", getattr(self, name), "at least 0")
        _require(
            self.eval_temperature > 0, "loop.eval_temperature", self.eval_temperature, "above 0"
        )


@dataclasses.dataclass(frozen=True)
class RlConfig:
    model: ModelConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    engine: EngineConfig
    tasks: TasksConfig
    rollout: RolloutConfig
    grpo: GrpoConfig
    control: ControlConfig
    loop: RlLoopConfig

    def __post_init__(self):
        _require(
            self.engine.keep_experts or not self.grpo.replay_experts, "engine.keep_experts",
            self.engine.keep_experts,
            "True where grpo.replay_experts is",
        )  # fmt: skip
        self._check_asynchronous()
        longest = max(tokens for _, tokens in self.control.length_stages)
        _require(
            longest < self.engine.context,
            "control.length_stages",
            self.control.length_stages,
            f"below engine.context={self.engine.context}",
        )
        _require(
            self.grpo.row_length >= self.engine.context, "grpo.row_length", self.grpo.row_length,
            f"at least engine.context={self.engine.context}, so that every rollout fits into a row",
        )  # fmt: skip

    def _check_asynchronous(self):
        if not self.rollout.asynchronous:
            return
        why = "with rollout.asynchronous"
        _require(
            self.rollout.over_sampling == 1, "rollout.over_sampling", self.rollout.over_sampling,
            f"1.0 {why}, which begins as many groups as grpo.max_staleness allows",
        )  # fmt: skip
        _require(
            len(self.control.temperatures) == 1, "control.temperatures", self.control.temperatures,
            f"one {why}: rollouts of several steps are trained on together",
        )  # fmt: skip
        _require(
            self.grpo.old_logprobs == "engine" or self.grpo.importance_cap > 0,
            "grpo.importance_cap", self.grpo.importance_cap,
            f"above 0 {why} and old_logprobs='trainer': nothing else corrects for older weights",
        )  # fmt: skip
