"""Key-value cache in pages that rows of different lengths share."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from glm_jax.config import ModelConfig
from glm_jax.sharding import by_device, constrain
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.api import Lists, lists, paged_attention, store

PAGES = ("layers", "pages", "kv_heads", None, None)
EXPERT_PAGES = ("layers", "pages", None, None)
ROWS, TABLES = ("batch",), ("batch", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """All layers' keys and values, and where this call's rows stand in them.

    k: [layers, pages, G, H, page size]; v: [layers, pages, G, page size, H]. experts: the routed
    experts of every position, int16 [layers, pages, page size, K], or None. tables_SP: int32 page
    of each block of positions of a row. starts_S: tokens of a row stored before this call.
    counts_S: how many of this call's L tokens are real; the others are not stored. lists: what the
    kernels make of these, once for all layers.

    On a mesh every device holds the pages of its own rows, and tables count from its first page.
    """

    k: jax.Array
    v: jax.Array
    experts: jax.Array | None
    tables_SP: jax.Array
    starts_S: jax.Array
    counts_S: jax.Array
    lists: Lists | None

    @classmethod
    def placed(
        cls, config: ModelConfig, pages, length: int, tables_SP, starts_S, counts_S
    ) -> Cache:
        """Of `pages` (see below), for a call with `length` tokens of each row."""
        per_group, at = config.num_heads // config.num_kv_heads, (tables_SP, starts_S, counts_S)
        run = functools.partial(lists, length, per_group, implementation=config.attention)
        k, v, experts = pages
        return cls(k, v, experts, *at, by_device(run, (PAGES, TABLES, ROWS, ROWS), ROWS)(k, *at))

    @property
    def pages(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """What outlives the call."""
        return self.k, self.v, self.experts

    def write(self, layer, k_SLGH: jax.Array, v_SLGH: jax.Array, *, implementation: str) -> Cache:
        """The cache with one layer's keys and values of the new tokens in their pages."""
        new = ("batch", None, "kv_heads", None)
        run = functools.partial(store, implementation=implementation)
        run = by_device(
            run, (new, new, PAGES, PAGES, None, TABLES, ROWS, ROWS, ROWS), (PAGES, PAGES)
        )
        k, v = run(
            k_SLGH,
            v_SLGH,
            self.k,
            self.v,
            layer,
            self.tables_SP,
            self.starts_S,
            self.counts_S,
            self.lists,
        )
        return dataclasses.replace(self, k=k, v=v)

    def write_experts(self, layer, expert_SLK: jax.Array) -> Cache:
        """The cache with one layer's choice of experts, where it keeps them."""
        if self.experts is None:
            return self
        run = functools.partial(reference.store, position_axis=-2)
        run = by_device(
            run, (("batch", None, None), EXPERT_PAGES, None, TABLES, ROWS, ROWS), EXPERT_PAGES
        )
        experts = run(expert_SLK, self.experts, layer, self.tables_SP, self.starts_S, self.counts_S)
        return dataclasses.replace(self, experts=experts)

    def attend(self, layer, q_SLNH: jax.Array, *, scale: float, implementation: str) -> jax.Array:
        """Attention of the new tokens over everything that their rows have stored up to them, [S,
        L, N, H].
        """
        queries = ("batch", None, "heads", None)

        def run(*args):
            return paged_attention(*args, scale=scale, implementation=implementation)

        run = by_device(run, (queries, PAGES, PAGES, None, TABLES, ROWS, ROWS, ROWS), queries)
        return run(
            q_SLNH, self.k, self.v, layer, self.tables_SP, self.starts_S, self.counts_S, self.lists
        )


def empty_pages(
    config: ModelConfig,
    num_layers: int,
    num_pages: int,
    page_size: int,
    dtype: str,
    keep_experts: bool,
):
    """Cache.pages of `num_layers` layers, zeros, placed on the current mesh if there is one; keys
    and values of type `dtype`.
    """
    heads = (num_layers, num_pages, config.num_kv_heads)
    shapes = (*heads, config.head_size, page_size), (*heads, page_size, config.head_size)
    shape_of_choices = (num_layers, num_pages, page_size, config.num_experts_per_token)

    def zeros():
        k, v = (constrain(jnp.zeros(shape, dtype), *PAGES) for shape in shapes)
        experts = (
            constrain(jnp.zeros(shape_of_choices, jnp.int16), *EXPERT_PAGES)
            if keep_experts
            else None
        )
        return k, v, experts

    return jax.jit(zeros)()
