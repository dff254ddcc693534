"""Choosing the next token of every row, by the row's own parameters and random stream."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.sharding import Array

MAX_STOP_TOKENS = 8
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 300  # tokens of one request


class ConstraintState(Protocol):
    """Where one request stands in its constraint."""

    @property
    def finished(self) -> bool:
        """The output is complete and nothing may follow: the request ends."""
        ...

    def mask(self) -> np.ndarray:
        """Tokens allowed next: uint32 [ceil(vocabulary / 32)], bit i % 32 of word i // 32 is token
        i. Raises ValueError.
        """
        ...

    def accept(self, token: int) -> None:
        """Moves on by one sampled token. Raises ValueError where the constraint cannot go on."""


class Constraint(Protocol):
    """What a request's output must look like, such as those of `grammar.py`; immutable, so that
    samples can share it.
    """

    def start(self) -> ConstraintState: ...


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    The logits that a token is sampled from are changed in this order: logit_bias, the penalties,
    constraint, temperature, min_p, top_k, top_p. Log-probabilities are those of the model before
    all of this, at logprob_temperature.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0: always the most likely token
    top_k: int = 0  # of the k most likely tokens only; 0: of all
    top_p: float = 1.0  # nucleus: of the fewest tokens that together have this probability
    # of the tokens at least this probable, as a share of the most likely one's probability
    min_p: float = 0.0
    # the same seed, prompt and weights give the same tokens, whatever else is in the batch, and
    # with drafts or without
    seed: int = 0
    sample_index: int = 0  # of several samples with one seed: each has its own random stream
    stop_tokens: tuple[int, ...] = ()  # ends with, and returns, any of these
    stop_strings: tuple[str, ...] = ()  # ends where the text of the new tokens holds one of these
    # of the distribution whose log-probabilities are returned; RL wants those it sampled from
    logprob_temperature: float = 1.0
    # subtracted from the logit of every token sampled before, as OpenAI defines it
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0  # the same, for each time that it was sampled
    # Logits of the tokens of prompt and output are divided by it where positive, else multiplied
    # (arXiv 1909.05858, as vLLM does).
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    top_logprobs: int = 0  # also return this many of the most likely tokens, at each position
    # also return the log-probabilities of the prompt's tokens; its cached pages are then not used
    prompt_logprobs: bool = False
    constraint: Constraint | None = None  # on the output; one token per decode call, without drafts

    def __post_init__(self):
        positive, finite = "must be finite and above 0", "must be finite"
        for name, valid, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "must be finite and at least 0"),
            ("logprob_temperature", 0 < self.logprob_temperature < math.inf, positive),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, positive),
            ("presence_penalty", math.isfinite(self.presence_penalty), finite),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), finite),
            ("top_k", 0 <= self.top_k < 2**31, f"must be in 0..{2**31 - 1}; 0 is no limit"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "must be in [0, 1]"),
            (
                "seed",
                -(2**63) <= self.seed < 2**63,
                f"must be a signed 64-bit integer, {-(2**63)}..{2**63 - 1}",
            ),
            ("sample_index", 0 <= self.sample_index < 2**32, f"must be in 0..{2**32 - 1}"),
            (
                "top_logprobs",
                0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
                f"must be in 0..{MAX_TOP_LOGPROBS}",
            ),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)} {rule}")
        for what, count, most in (
            ("stop tokens", len(self.stop_tokens), MAX_STOP_TOKENS),
            ("tokens in logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS),
        ):
            if count > most:
                raise ValueError(f"{count} {what}, at most {most}")
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds an empty string")
        for token, bias in self.logit_bias:
            if not math.isfinite(bias):
                raise ValueError(f"logit_bias={bias} of token {token} must be finite")

    @property
    def key_words(self) -> tuple[int, int, int]:
        """The request's random stream as three 32-bit words: the seed's high and low half, the
        sample's index.
        """
        return self.seed >> 32 & 0xFFFFFFFF, self.seed & 0xFFFFFFFF, self.sample_index

    @property
    def changes_logits(self) -> bool:
        """Whether the logits are changed before temperature and filters."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return any(penalties) or bool(self.logit_bias) or self.constraint is not None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RowParams:
    """SamplingParams of the rows of a batch, as arrays [S]; key_words uint32 [S, 3], stop_tokens
    [S, MAX_STOP_TOKENS] (-1: none).
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    key_words: Array
    stop_tokens: Array
    logprob_temperature: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LogitChanges:
    """What the rows of a batch change in their logits before temperature and filters; a batch
    without any has no LogitChanges.
    """

    prompts_SC: Array  # the prompts' tokens; the vocabulary's size after their ends
    outputs_SC: Array  # the tokens sampled so far, likewise
    presence_S: Array
    frequency_S: Array
    repetition_S: Array
    bias_tokens_SB: Array  # padded like the prompts
    bias_SB: Array
    allowed_SW: Array  # uint32 words of ConstraintState.mask

    def counts(self, vocab_size: int) -> jax.Array:
        """How often each row has sampled each token, int32 [S, V]."""
        return count_tokens(
            jnp.zeros((len(self.outputs_SC), vocab_size), jnp.int32), self.outputs_SC
        )

    def apply(self, logits_SLV: jax.Array, counts_SLV: jax.Array) -> jax.Array:
        """Changed logits. counts_SLV: how often each token was sampled before each position."""
        size, _, vocab = logits_SLV.shape
        row = jnp.arange(size)[:, None]
        logits = logits_SLV.astype(jnp.float32)
        bias_SV = (
            jnp.zeros((size, vocab)).at[row, self.bias_tokens_SB].add(self.bias_SB, mode="drop")
        )
        logits += bias_SV[:, None]
        in_prompt_SV = count_tokens(jnp.zeros((size, vocab), jnp.int32), self.prompts_SC) > 0
        sampled_SLV = counts_SLV > 0
        repetition = jnp.where(
            in_prompt_SV[:, None] | sampled_SLV, self.repetition_S[:, None, None], 1
        )
        logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits -= (
            self.frequency_S[:, None, None] * counts_SLV
            + self.presence_S[:, None, None] * sampled_SLV
        )
        token = jnp.arange(vocab)
        allowed_SV = self.allowed_SW[:, token // 32] >> (token % 32).astype(jnp.uint32) & 1
        return jnp.where(allowed_SV[:, None] > 0, logits, -jnp.inf)


def count_tokens(counts_SV: jax.Array, tokens_SL: Array) -> jax.Array:
    """counts_SV and one more for each token; ids outside the vocabulary count nowhere."""
    return counts_SV.at[jnp.arange(len(tokens_SL))[:, None], tokens_SL].add(1, mode="drop")


def filter_logits(scaled_SV: jax.Array, params: RowParams) -> jax.Array:
    """-inf outside each row's min-p set, top k and nucleus, each taken of what the one before
    leaves; the best token always stays.
    """
    order = jnp.argsort(-scaled_SV, axis=-1)
    ranked = jnp.take_along_axis(scaled_SV, order, axis=-1)
    rank = jnp.arange(scaled_SV.shape[-1])
    ranked = jnp.where(ranked >= ranked[:, :1] + jnp.log(params.min_p)[:, None], ranked, -jnp.inf)
    ranked = jnp.where(
        (params.top_k[:, None] == 0) | (rank < params.top_k[:, None]), ranked, -jnp.inf
    )
    probs = jax.nn.softmax(ranked, axis=-1)
    ranked = jnp.where(
        (rank == 0) | (jnp.cumsum(probs, axis=-1) - probs < params.top_p[:, None]), ranked, -jnp.inf
    )
    row = jnp.arange(len(order))[:, None]
    return jnp.full_like(scaled_SV, -jnp.inf).at[row, order].set(ranked)


def sampling_logits(logits_SV: jax.Array, params: RowParams) -> jax.Array:
    """Logits of the distribution that each row samples from: temperature, min p, top k, nucleus; at
    temperature 0 all on the best.
    """
    logits_SV = logits_SV.astype(jnp.float32)
    scaled = logits_SV / jnp.maximum(params.temperature, 1e-6)[:, None]
    limited = jnp.any((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0))
    scaled = jax.lax.cond(limited, filter_logits, lambda scaled, _: scaled, scaled, params)
    best = jnp.arange(logits_SV.shape[-1]) == best_token(logits_SV)[:, None]
    return jnp.where(params.temperature[:, None] == 0, jnp.where(best, 0.0, -jnp.inf), scaled)


def best_token(logits_SV: jax.Array) -> jax.Array:
    """The first of the largest logits, int32 [S]: jnp.argmax as two plain reductions, which XLA:CPU
    vectorises.
    """
    vocab = logits_SV.shape[-1]
    is_best = logits_SV == jnp.max(logits_SV, axis=-1, keepdims=True)
    return jnp.minimum(
        jnp.min(jnp.where(is_best, jnp.arange(vocab), vocab), axis=-1), vocab - 1
    ).astype(jnp.int32)


def choose(logits_SV: jax.Array, params: RowParams, index_S: Array) -> jax.Array:
    """Each row's token number index_S, int32 [S]: the largest of its sampling logits plus Gumbel
    noise, which samples exactly from their softmax. The noise is that of (seed, sample, index)
    alone; none is made where every row takes its best token.
    """

    def random(logits_SV):
        return jax.vmap(jax.random.categorical)(
            keys(params, index_S), sampling_logits(logits_SV, params)
        ).astype(jnp.int32)

    return jax.lax.cond(
        jnp.any(params.temperature > 0), random, best_token, logits_SV.astype(jnp.float32)
    )


def keys(params: RowParams, index_S: Array) -> jax.Array:
    """A key for each row's token number index_S: a row's noise is the same wherever it stands and
    whatever has become of it.
    """

    def key(words, index):
        seed = jax.random.wrap_key_data(words[:2], impl="threefry2x32")  # all 64 bits of the seed
        own = jax.random.fold_in(seed, index)
        return jnp.where(words[2] == 0, own, jax.random.fold_in(own, words[2]))

    return jax.vmap(key)(params.key_words, index_S)


def model_logprobs(logits_SV: jax.Array, token_S: jax.Array, temperature_S: Array) -> jax.Array:
    """Log-probabilities of tokens under the model itself, at a temperature and without any filter;
    float32 [S].
    """
    scaled_SV = logits_SV.astype(jnp.float32) / temperature_S[:, None]
    return jnp.take_along_axis(jax.nn.log_softmax(scaled_SV, axis=-1), token_S[:, None], axis=-1)[
        :, 0
    ]


def top_logprobs(logits_SV: jax.Array, temperature_S: Array) -> tuple[jax.Array, jax.Array]:
    """The MAX_TOP_LOGPROBS most likely tokens (all, of a smaller vocabulary), best first, and their
    model_logprobs; both [S, T].
    """
    scaled_SV = logits_SV.astype(jnp.float32) / temperature_S[:, None]
    best, tokens = jax.lax.top_k(
        jax.nn.log_softmax(scaled_SV, axis=-1), min(MAX_TOP_LOGPROBS, scaled_SV.shape[-1])
    )
    return tokens, best
