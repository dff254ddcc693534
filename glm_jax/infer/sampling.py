"""Drawing the next token of every row, by the row's own parameters and seed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

MAX_STOP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is continued."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: always the most likely token
    top_k: int = 0  # of the k most likely tokens only; 0: of all
    top_p: float = 1.0  # nucleus: of the fewest tokens that together have this probability
    seed: int = 0  # the same seed, prompt and weights give the same tokens, whatever else is in the batch
    stop_tokens: tuple[int, ...] = ()  # ends with, and returns, any of these
    stop_strings: tuple[str, ...] = ()  # ends where the text of the new tokens holds one of these
    logprob_temperature: float = 1.0  # of the distribution whose log-probabilities are returned; RL wants those that it drew from

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be finite and at least 0")
        if not 0 < self.logprob_temperature < float("inf"):
            raise ValueError(f"logprob_temperature={self.logprob_temperature} must be finite and above 0")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k={self.top_k} must be in 0..{2**31 - 1}; 0 is no limit")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in 0..{2**32 - 1}")
        if len(self.stop_tokens) > MAX_STOP_TOKENS:
            raise ValueError(f"{len(self.stop_tokens)} stop tokens, at most {MAX_STOP_TOKENS}")
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds an empty string")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RowParams:
    """SamplingParams of the rows of a batch, as arrays [S] (stop_tokens [S, MAX_STOP_TOKENS], -1: none)."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    stop_tokens: jax.Array
    logprob_temperature: jax.Array


def filter_logits(scaled_SV: jax.Array, top_k_S: jax.Array, top_p_S: jax.Array) -> jax.Array:
    """-inf outside each row's top k and nucleus. The nucleus is taken of what top k leaves; the best token always stays."""
    order = jnp.argsort(-scaled_SV, axis=-1)
    ranked = jnp.take_along_axis(scaled_SV, order, axis=-1)
    rank = jnp.arange(scaled_SV.shape[-1])
    ranked = jnp.where((top_k_S[:, None] == 0) | (rank < top_k_S[:, None]), ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked, axis=-1)
    ranked = jnp.where((rank == 0) | (jnp.cumsum(probs, axis=-1) - probs < top_p_S[:, None]), ranked, -jnp.inf)
    row = jnp.arange(len(order))[:, None]
    return jnp.full_like(scaled_SV, -jnp.inf).at[row, order].set(ranked)


def drawing_logits(logits_SV: jax.Array, params: RowParams) -> jax.Array:
    """Logits of the distribution that each row draws from: temperature, top k, nucleus; at temperature 0 all on the best."""
    logits_SV = logits_SV.astype(jnp.float32)
    scaled = logits_SV / jnp.maximum(params.temperature, 1e-6)[:, None]
    limited = jnp.any((params.top_k > 0) | (params.top_p < 1))
    scaled = jax.lax.cond(limited, filter_logits, lambda scaled, *_: scaled, scaled, params.top_k, params.top_p)
    best = jnp.arange(logits_SV.shape[-1]) == best_token(logits_SV)[:, None]
    return jnp.where(params.temperature[:, None] == 0, jnp.where(best, 0.0, -jnp.inf), scaled)


def best_token(logits_SV: jax.Array) -> jax.Array:
    """The first of the largest logits, int32 [S]: jnp.argmax as two plain reductions, which XLA:CPU vectorises."""
    vocab = logits_SV.shape[-1]
    is_best = logits_SV == jnp.max(logits_SV, axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(is_best, jnp.arange(vocab), vocab), axis=-1), vocab - 1).astype(jnp.int32)


def draw(logits_SV: jax.Array, params: RowParams, index_S: jax.Array) -> jax.Array:
    """A token of each row's distribution, int32 [S]; no random numbers are made where every row takes its best."""

    def random(logits_SV):
        return jax.vmap(jax.random.categorical)(keys(params, index_S), drawing_logits(logits_SV, params)).astype(jnp.int32)

    return jax.lax.cond(jnp.any(params.temperature > 0), random, best_token, logits_SV.astype(jnp.float32))


def keys(params: RowParams, index_S: jax.Array) -> jax.Array:
    """A key for each row's token number index_S: a row draws the same wherever it stands and whenever it is paused."""
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(params.seed, index_S)


def model_logprobs(logits_SV: jax.Array, token_S: jax.Array, temperature_S: jax.Array) -> jax.Array:
    """Log-probabilities of tokens under the model itself, at a temperature and without any filter; float32 [S]."""
    scaled_SV = logits_SV.astype(jnp.float32) / temperature_S[:, None]
    return jnp.take_along_axis(jax.nn.log_softmax(scaled_SV, axis=-1), token_S[:, None], axis=-1)[:, 0]


def sample(logits_SV: jax.Array, params: RowParams, index_S: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token ids int32 [S], and their log-probabilities under the model. index_S: how many tokens a row has drawn before."""
    token_S = draw(logits_SV, params, index_S)
    return token_S, model_logprobs(logits_SV, token_S, params.logprob_temperature)
