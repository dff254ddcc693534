"""What changes along a run, in tokens: learning rate, batch size, MTP weight, router bias rate
(arXiv 2508.06471, section 2.4).

Computed on the host in exact integers from the step alone and handed to the compiled step as
scalars, so that nothing recompiles and a resumed run cannot disagree with an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import math

from glm_jax.config import check_types


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    total_tokens: int  # the run stops at the first step that reaches this
    learning_rate: float  # peak
    final_learning_rate: float  # at decay_tokens and after
    warmup_tokens: int  # linear from 0
    decay_tokens: int  # end of the one cosine; total_tokens, or later where stages share it
    first_microbatches: int  # microbatches a step at the beginning
    last_microbatches: int  # ... and after batch_ramp_tokens
    batch_ramp_tokens: int  # linear in between; 0: last_microbatches from the start
    mtp_weight: float  # lambda of the MTP loss before switch_tokens
    late_mtp_weight: float
    bias_rate: float  # u of loss-free balancing before switch_tokens
    late_bias_rate: float
    switch_tokens: int
    balance_weight: float  # alpha of the sequence balance loss

    def __post_init__(self):
        check_types(self)
        if self.total_tokens < 1 or self.decay_tokens <= self.warmup_tokens:
            raise ValueError(
                f"schedule: total_tokens={self.total_tokens} must be positive and"
                f" decay_tokens={self.decay_tokens} greater than warmup_tokens={self.warmup_tokens}"
            )
        if not 1 <= self.first_microbatches <= self.last_microbatches:
            raise ValueError(
                f"schedule: first_microbatches={self.first_microbatches} must be"
                f" 1..last_microbatches={self.last_microbatches}"
            )


@dataclasses.dataclass(frozen=True)
class ScheduleValues:
    """Values for one step; `tokens` is what the model has seen before it."""

    step: int
    tokens: int
    microbatches: int
    learning_rate: float
    mtp_weight: float
    bias_rate: float


class Schedule:
    """schedule[step] -> ScheduleValues, for steps first_step .. num_steps - 1.

    A run that was stopped goes on from the step and the tokens of its checkpoint: they are what it
    has seen, whatever another schedule would have made of the same steps. Raises ValueError where
    total_tokens lies before them.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        tokens_per_microbatch: int,
        first_step: int = 0,
        first_tokens: int = 0,
    ):
        if config.total_tokens < first_tokens:
            raise ValueError(
                f"schedule.total_tokens={config.total_tokens} is less than the {first_tokens}"
                " tokens that the run has seen"
            )
        self.config = config
        self.tokens_per_microbatch = tokens_per_microbatch
        self.first_step = first_step
        self._tokens = [first_tokens]  # seen before each step, from first_step on
        while self._tokens[-1] < config.total_tokens:
            seen = self._tokens[-1]
            self._tokens.append(seen + self.microbatches(seen) * tokens_per_microbatch)

    @property
    def num_steps(self) -> int:
        return self.first_step + len(self._tokens) - 1

    def tokens_before(self, step: int) -> int:
        """Tokens seen before a step; of num_steps: by the whole run."""
        if not self.first_step <= step <= self.num_steps:
            raise IndexError(f"step {step} is not one of {self.first_step}..{self.num_steps}")
        return self._tokens[step - self.first_step]

    def __getitem__(self, step: int) -> ScheduleValues:
        tokens, config = self.tokens_before(step), self.config
        late = tokens >= config.switch_tokens
        return ScheduleValues(
            step=step,
            tokens=tokens,
            microbatches=self.microbatches(tokens),
            learning_rate=self.learning_rate(self.tokens_before(step + 1)),
            mtp_weight=config.late_mtp_weight if late else config.mtp_weight,
            bias_rate=config.late_bias_rate if late else config.bias_rate,
        )

    def microbatches(self, tokens: int) -> int:
        config = self.config
        if tokens >= config.batch_ramp_tokens:
            return config.last_microbatches
        share = tokens / config.batch_ramp_tokens
        return config.first_microbatches + int(
            share * (config.last_microbatches - config.first_microbatches + 1)
        )

    def learning_rate(self, tokens: int) -> float:
        """At the end of a step, so that the first one already moves."""
        config = self.config
        if tokens < config.warmup_tokens:
            return config.learning_rate * tokens / config.warmup_tokens
        share = min(
            (tokens - config.warmup_tokens) / (config.decay_tokens - config.warmup_tokens), 1.0
        )
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        return (
            config.final_learning_rate
            + (config.learning_rate - config.final_learning_rate) * cosine
        )
