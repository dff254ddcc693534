"""Sampling a continuation with a key-value cache: one prompt, or a few of equal length."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.model.cache import Cache
from glm_jax.model.transformer import GLM

PROMPT_BUCKET = 64  # prompts are padded on the left to a multiple of this, so that few lengths compile


def generate(
    model: GLM, prompt: list[int], *, max_new_tokens: int, temperature: float, top_p: float, seed: int, stop: tuple[int, ...]
) -> list[int]:
    """New token ids after the prompt, up to and without the first of `stop`, at most max_new_tokens.

    temperature 0 takes the most likely token. top_p keeps the smallest set of tokens whose probability reaches it.
    Raises ValueError for an empty prompt, one that leaves no room in the context, or parameters out of range.
    """
    room = model.config.max_length - len(prompt)
    if not prompt or room < 1:
        raise ValueError(f"prompt of {len(prompt)} tokens: must be 1..{model.config.max_length - 1}, the context less one")
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(f"temperature={temperature} must be >= 0, top_p={top_p} in (0, 1], max_new_tokens={max_new_tokens} >= 1")
    if max(prompt) >= model.config.vocab_size or min(prompt) < 0:
        raise ValueError(f"prompt holds token {max(prompt)}, the vocabulary has {model.config.vocab_size}")
    max_new_tokens = min(max_new_tokens, room)
    pad = -len(prompt) % PROMPT_BUCKET
    tokens = jnp.asarray([[0] * pad + prompt], jnp.int32)
    graphdef, state = nnx.split(model)
    stops = jnp.asarray(stop or (-1,), jnp.int32)
    buckets = -(-max_new_tokens // PROMPT_BUCKET) * PROMPT_BUCKET
    out, count = _generate(
        graphdef, state, tokens, jnp.int32(pad), jnp.int32(max_new_tokens), stops, jnp.float32(temperature), jnp.float32(top_p),
        jax.random.key(seed), buckets,
    )  # fmt: skip
    return out[: int(count)].tolist()


@functools.partial(jax.jit, static_argnums=(0, 9))
def _generate(graphdef, state, tokens_BL, pad, max_new_tokens, stops, temperature, top_p, key, capacity: int):
    """(tokens [capacity], number of them before a stop). Padding is segment 0, the prompt and its continuation segment 1."""
    model = nnx.merge(graphdef, state)
    batch, length = tokens_BL.shape
    index = jnp.arange(length)[None]
    segment_ids = jnp.broadcast_to((index >= pad).astype(jnp.int32), tokens_BL.shape)
    positions = jnp.maximum(index - pad, 0)
    out = model.trunk(tokens_BL, segment_ids, positions, Cache.empty(model.config, batch, length + capacity))
    first = sample(model.logits(out.h[:, -1:])[0, 0], temperature, top_p, jax.random.fold_in(key, 0))

    def unfinished(carry):
        count, token, _, _ = carry
        return (count < max_new_tokens) & ~jnp.any(token == stops)

    def body(carry):
        count, token, generated, cache = carry
        generated = generated.at[count].set(token)
        position = (length - pad + count)[None, None]
        out = model.trunk(token[None, None], jnp.ones((1, 1), jnp.int32), position, cache)
        token = sample(model.logits(out.h)[0, 0], temperature, top_p, jax.random.fold_in(key, count + 1))
        return count + 1, token, generated, out.cache

    start = (jnp.int32(0), first, jnp.zeros(capacity, jnp.int32), out.cache)
    count, _, generated, _ = jax.lax.while_loop(unfinished, body, start)
    return generated, count


def sample(logits_V: jax.Array, temperature, top_p, key) -> jax.Array:
    """One token id. Temperature 0 is greedy; nucleus sampling keeps the most likely tokens up to probability top_p."""
    scaled = logits_V / jnp.maximum(temperature, 1e-6)
    order = jnp.argsort(-scaled)
    probs = jax.nn.softmax(scaled)[order]
    kept = jnp.cumsum(probs) - probs < top_p
    drawn = order[jax.random.categorical(key, jnp.where(kept, scaled[order], -jnp.inf))]
    return jnp.where(temperature == 0, jnp.argmax(logits_V), drawn).astype(jnp.int32)
