"""Key-value cache of contiguous rows, for sampling one prompt or a small batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glm_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LayerCache:
    """What one layer sees: k, v [B, M, G, H]; segment ids [B, M], 0 where nothing is stored; positions filled so far."""

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    length: jax.Array

    def append(self, k_BLGH: jax.Array, v_BLGH: jax.Array, segment_ids_BL: jax.Array) -> LayerCache:
        """Writes L new positions behind the `length` stored ones."""
        at = (0, self.length, 0, 0)
        return LayerCache(
            k=jax.lax.dynamic_update_slice(self.k, k_BLGH.astype(self.k.dtype), at),
            v=jax.lax.dynamic_update_slice(self.v, v_BLGH.astype(self.v.dtype), at),
            segment_ids=jax.lax.dynamic_update_slice(self.segment_ids, segment_ids_BL, at[:2]),
            length=self.length + k_BLGH.shape[1],
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """All layers' keys and values [layers, B, M, G, H]; segment ids and length are common to the layers."""

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int) -> Cache:
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_size)
        zeros = jnp.zeros(shape, config.compute_dtype)
        return cls(k=zeros, v=zeros, segment_ids=jnp.zeros((batch, length), jnp.int32), length=jnp.zeros((), jnp.int32))
