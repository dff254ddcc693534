"""Key-value cache in pages that rows of different lengths share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glm_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """All layers' keys and values, and where this call's rows stand in them.

    k, v: [layers, pages, page size, G, H]. tables_SP: int32 page of each block of positions of a row. starts_S: tokens of
    a row stored before this call. counts_S: how many of this call's L tokens are real; the others are not stored.
    """

    k: jax.Array
    v: jax.Array
    tables_SP: jax.Array
    starts_S: jax.Array
    counts_S: jax.Array

    def write(self, layer, k_SLGH: jax.Array, v_SLGH: jax.Array) -> Cache:
        """The cache with one layer's keys and values of the new tokens in their pages."""
        num_pages, page_size = self.k.shape[1:3]
        step = jnp.arange(k_SLGH.shape[1])
        position_SL = self.starts_S[:, None] + step
        page_SL = jnp.take_along_axis(self.tables_SP, position_SL // page_size, axis=1, mode="fill", fill_value=num_pages)
        page_SL = jnp.where(step < self.counts_S[:, None], page_SL, num_pages)  # no such page: dropped
        at = (layer, page_SL, position_SL % page_size)
        k, v = (pages.at[at].set(new.astype(pages.dtype), mode="drop") for pages, new in ((self.k, k_SLGH), (self.v, v_SLGH)))
        return dataclasses.replace(self, k=k, v=v)


def empty_pages(config: ModelConfig, num_layers: int, num_pages: int, page_size: int) -> tuple[jax.Array, jax.Array]:
    """k and v pages of `num_layers` layers, zeros in compute precision."""
    shape = (num_layers, num_pages, page_size, config.num_kv_heads, config.head_size)
    return jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype)
