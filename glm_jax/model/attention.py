"""Grouped-query attention with partial rotary embedding and optional QK-Norm (arXiv 2508.06471,
section 2.1).
"""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from glm_jax.config import ModelConfig
from glm_jax.model.cache import Cache
from glm_jax.model.layers import Linear, RMSNorm, apply_rope
from glm_jax.sharding import by_device
from pallas_kernels.attention import rotary
from pallas_kernels.attention.api import attention, chosen, rotary_attention, rotary_heads

QUERIES, KEYS = ("batch", None, "heads"), ("batch", None, "kv_heads")  # as projections write them
# biases, weights of norms, angles
ROTARY = (("heads",), ("kv_heads",)), None, (("batch", None, None),) * 2


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        queries = config.num_heads * config.head_size
        keys = config.num_kv_heads * config.head_size
        bias = config.attention_bias
        self.q_proj = Linear(config, width, queries, ("embed", "heads"), bias=bias, rngs=rngs)
        self.k_proj = Linear(config, width, keys, ("embed", "kv_heads"), bias=bias, rngs=rngs)
        self.v_proj = Linear(config, width, keys, ("embed", "kv_heads"), bias=bias, rngs=rngs)
        self.o_proj = Linear(config, queries, width, ("heads", "embed"), rngs=rngs)
        self.q_norm = RMSNorm(config, config.head_size, rngs=rngs) if config.qk_norm else None
        self.k_norm = RMSNorm(config, config.head_size, rngs=rngs) if config.qk_norm else None

    def context(self, x_BLD: jax.Array, segment_ids_BL, angles) -> jax.Array:
        """What attention without a cache adds up, [B, L, N x H]."""
        scale, implementation = self.config.head_size**-0.5, self.config.attention
        if self._by_rotary_kernel():
            run = functools.partial(rotary_attention, scale=scale, eps=self.config.norm_eps)
            run = by_device(run, (QUERIES, KEYS, KEYS, *ROTARY, ("batch", None)), QUERIES)
            projected = self.q_proj.product(x_BLD), self.k_proj.product(x_BLD), self.v_proj(x_BLD)
            return run(*projected, *self._biases_weights(), angles, segment_ids_BL)
        run = functools.partial(attention, scale=scale, implementation=implementation)
        run = by_device(
            run, ((*QUERIES, None), (*KEYS, None), (*KEYS, None), ("batch", None)), (*QUERIES, None)
        )
        return run(*self.queries_keys_values(x_BLD, angles), segment_ids_BL).reshape(
            *x_BLD.shape[:2], -1
        )

    def _by_rotary_kernel(self) -> bool:
        return chosen(self.config.attention) == "pallas" and self.config.head_size == rotary.SIZE

    def _biases_weights(self):
        """Of queries and keys, each as two arrays or Nones."""
        biases = tuple(
            proj.bias if proj.bias is None else proj.bias[...]
            for proj in (self.q_proj, self.k_proj)
        )
        return biases, tuple(
            norm if norm is None else norm.weight[...] for norm in (self.q_norm, self.k_norm)
        )

    def queries_keys_values(
        self, x_BLD: jax.Array, angles
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, L, N, H], k and v [B, L, G, H]; normalised per head before RoPE. On a TPU without
        gradients: training goes by `context`.
        """
        batch, length, _ = x_BLD.shape
        if self._by_rotary_kernel():
            run = functools.partial(rotary_heads, eps=self.config.norm_eps)
            run = by_device(run, (QUERIES, KEYS, *ROTARY), ((*QUERIES, None), (*KEYS, None)))
            q, k = run(
                self.q_proj.product(x_BLD),
                self.k_proj.product(x_BLD),
                *self._biases_weights(),
                angles,
            )
            return q, k, self.v_proj(x_BLD).reshape(k.shape)
        q, k, v = (
            proj(x_BLD).reshape(batch, length, -1, self.config.head_size)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, angles), apply_rope(k, angles), v

    def __call__(
        self,
        x_BLD: jax.Array,
        segment_ids_BL: jax.Array,
        angles,
        cache: Cache | None = None,
        layer=None,
    ):
        """Returns [B, L, D] and the cache with layer number `layer` written (None without a
        cache).
        """
        if cache is None:
            context_BLX = self.context(x_BLD, segment_ids_BL, angles)
        else:
            q_BLNH, k_BLGH, v_BLGH = self.queries_keys_values(x_BLD, angles)
            scale, implementation = self.config.head_size**-0.5, self.config.attention
            cache = cache.write(layer, k_BLGH, v_BLGH, implementation=implementation)
            context_BLX = cache.attend(
                layer, q_BLNH, scale=scale, implementation=implementation
            ).reshape(*x_BLD.shape[:2], -1)
        return self.o_proj(checkpoint_name(context_BLX, "context")), cache
