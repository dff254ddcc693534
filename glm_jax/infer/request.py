"""What the engine knows of one request."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from glm_jax.infer.sampling import ConstraintState, SamplingParams
from glm_jax.sharding import Array


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and what became of it. `tokens` end with the stop token that ended them; the other
    lists run along.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    # of the weights that each token was sampled with
    versions: list[int] = dataclasses.field(default_factory=list)
    passes: int = 0  # of the trunk in which tokens were sampled, prefill aside
    accepted: int = 0  # drafts among the tokens
    # With keep_experts, once finished: what each token of `sequence` but the last was routed to,
    # int16 [tokens, MoE layers, K]; the MTP block's after them where it drafts.
    experts: np.ndarray | None = None
    # (token, log-probability), best first
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    # With params.prompt_logprobs, once the prompt is computed: of each of its tokens given those
    # before it; None for the first.
    prompt_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    prompt_top_logprobs: list[list[tuple[int, float]] | None] = dataclasses.field(
        default_factory=list
    )
    constraint_state: ConstraintState | None = None
    allowed: np.ndarray | None = None  # with a constraint: the mask for the next token
    status: str = "waiting"  # waiting, running, paused, finished
    finish_reason: str | None = None  # stop, length, abort
    shard: int = 0  # of the mesh's rows and pages
    pages: list[int] = dataclasses.field(default_factory=list)
    # of the full pages of prompt and tokens
    keys: list[bytes] = dataclasses.field(default_factory=list)
    stored: int = 0  # tokens of prompt and tokens in the cache
    stale: bool = False  # holds pages of older weights: not to be shared

    @property
    def sequence(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without the one that stopped them."""
        return (
            self.tokens[:-1]
            if self.tokens and self.tokens[-1] in self.params.stop_tokens
            else self.tokens
        )

    @property
    def missing(self) -> int:
        """Tokens to compute before the next can be sampled; 1 where only the last one sampled is
        missing.
        """
        return len(self.prompt) + len(self.tokens) - self.stored

    def start_constraint(self):
        """Raises ValueError where the constraint cannot be followed."""
        if self.params.constraint is not None:
            self.constraint_state = self.params.constraint.start()
            self.allowed = self.constraint_state.mask()

    def accept(self, token: int) -> bool:
        """Moves the constraint on by a sampled token. Returns whether the output is complete.
        Raises ValueError.
        """
        if self.constraint_state is None:
            return False
        self.constraint_state.accept(token)
        if not self.constraint_state.finished:
            self.allowed = self.constraint_state.mask()
        return self.constraint_state.finished

    @property
    def unscored(self) -> bool:
        """Log-probabilities of the prompt are requested and not all there yet."""
        return self.params.prompt_logprobs and len(self.prompt_logprobs) < len(self.prompt)

    def add_scores(
        self, logprobs: Sequence[float], top_tokens: np.ndarray, top_logprobs: np.ndarray
    ):
        """Of the tokens after the stored ones, in order and as far as they are the prompt's; called
        before they count as stored.
        top_*: [tokens, T].
        """
        if not self.prompt_logprobs:
            self.prompt_logprobs.append(None)
            self.prompt_top_logprobs.append(None)
        for number in range(min(len(logprobs), len(self.prompt) - self.stored - 1)):
            self.prompt_logprobs.append(float(logprobs[number]))
            self.prompt_top_logprobs.append(
                best_of(self.params.top_logprobs, top_tokens[number], top_logprobs[number])
            )


def best_of(count: int, tokens: Array, logprobs: Array) -> list[tuple[int, float]]:
    """The first `count` pairs of token and log-probability."""
    return list(zip(tokens[:count].tolist(), logprobs[:count].tolist(), strict=True))
