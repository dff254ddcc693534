"""Grouped-query attention with partial rotary embedding and optional QK-Norm (FACTS: paper section 2.1)."""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from glm_jax.config import ModelConfig
from glm_jax.model.cache import Cache
from glm_jax.model.layers import Linear, RMSNorm, apply_rope
from glm_jax.sharding import by_device
from pallas_kernels.attention.api import attention


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, queries, keys = config.hidden_size, config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        bias = config.attention_bias
        self.q_proj = Linear(config, width, queries, ("embed", "heads"), bias=bias, rngs=rngs)
        self.k_proj = Linear(config, width, keys, ("embed", "kv_heads"), bias=bias, rngs=rngs)
        self.v_proj = Linear(config, width, keys, ("embed", "kv_heads"), bias=bias, rngs=rngs)
        self.o_proj = Linear(config, queries, width, ("heads", "embed"), rngs=rngs)
        self.q_norm = RMSNorm(config, config.head_size, rngs=rngs) if config.qk_norm else None
        self.k_norm = RMSNorm(config, config.head_size, rngs=rngs) if config.qk_norm else None

    def queries_keys_values(self, x_BLD: jax.Array, angles) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, L, N, H], k and v [B, L, G, H]; normalised per head before RoPE."""
        batch, length, _ = x_BLD.shape
        q, k, v = (proj(x_BLD).reshape(batch, length, -1, self.config.head_size) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, angles), apply_rope(k, angles), v

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array, angles, cache: Cache | None = None, layer=None):
        """Returns [B, L, D] and the cache with layer number `layer` written (None without a cache)."""
        q_BLNH, k_BLGH, v_BLGH = self.queries_keys_values(x_BLD, angles)
        scale, implementation = self.config.head_size**-0.5, self.config.attention
        if cache is None:
            run = functools.partial(attention, scale=scale, implementation=implementation)
            queries, keys = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
            run = by_device(run, (queries, keys, keys, ("batch", None)), queries)
            context_BLNH = run(q_BLNH, k_BLGH, v_BLGH, segment_ids_BL)
        else:
            cache = cache.write(layer, k_BLGH, v_BLGH, implementation=implementation)
            context_BLNH = cache.attend(layer, q_BLNH, scale=scale, implementation=implementation)
        context_BLNH = checkpoint_name(context_BLNH, "context")
        return self.o_proj(context_BLNH.reshape(*x_BLD.shape[:2], -1)), cache
