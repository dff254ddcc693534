"""The lists that the kernels walk over, made on the device from what the rows have stored: the same
in every layer.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.target import heads_of_core


@dataclasses.dataclass(frozen=True)
class Blocks:
    """pages: of a step; join: pages of one product, 2 for MXUs of 256, divides pages;
    tokens: queries of a block; bits: unpack float8 by fp8_bits, for bfloat16 queries; turn: heads
    whose work is written out together, to hide each other's latencies.
    """

    pages: int
    join: int
    tokens: int
    bits: bool
    turn: int


class Read(NamedTuple):
    """Query blocks with real tokens, int32: of each its row, its number there and how many pages it
    sees, [W], and after them any others. Where each core's part of the list begins and ends, [2
    cores], and its number of blocks of pages, [cores].
    """

    row_W: jax.Array
    block_W: jax.Array
    pages_W: jax.Array
    part: jax.Array
    total: jax.Array


class Written(NamedTuple):
    """Pages that get new tokens, int32: of each its row, its number there and its place in the
    cache, [W], and after them any others. Where each core's part of the list begins and ends, [2
    cores].
    """

    row_W: jax.Array
    block_W: jax.Array
    page_W: jax.Array
    part: jax.Array


def read(length: int, k_pages, starts_S, counts_S, blocks: Blocks, cores: int) -> Read:
    """For attention of `length` new tokens of a row."""
    groups, tokens = k_pages.shape[2], min(blocks.tokens, length)
    split = heads_of_core(groups, cores) == groups
    return _read(
        starts_S,
        counts_S,
        tokens,
        -(-length // tokens),
        k_pages.shape[4],
        blocks.pages,
        cores,
        split=split,
    )


def _read(starts_S, counts_S, tokens, num_blocks, page_size, pages, cores, *, split: bool) -> Read:
    """Each core's part is the whole list unless `split`."""
    first_B = jnp.arange(num_blocks) * tokens
    live_SB = first_B < counts_S[:, None]
    seen_SB = starts_S[:, None] + jnp.minimum(counts_S[:, None], first_B + tokens)
    pages_W = jnp.where(live_SB, -(-seen_SB // page_size), 0).reshape(-1)
    order_W = jnp.argsort(pages_W == 0, stable=True)
    indices = jnp.indices(live_SB.shape, jnp.int32).reshape(2, -1)
    row_W, block_W, pages_W = (x[order_W].astype(jnp.int32) for x in (*indices, pages_W))
    steps_W = -(-pages_W // pages)
    live, before_W = jnp.sum(pages_W > 0), jnp.cumsum(steps_W)
    if split:
        shares = jnp.arange(cores + 1) * before_W[-1] / cores
        ends = jnp.sum(before_W[None] <= shares[:, None], axis=1).clip(max=live)
        ends = ends.at[-1].set(live).at[0].set(0)
        part = jnp.stack([ends[:-1], ends[1:]], axis=1)
    else:
        part = jnp.tile(jnp.stack([0, live])[None], (cores, 1))
    zero_W = jnp.concatenate([jnp.zeros(1, before_W.dtype), before_W])
    total = zero_W[part[:, 1]] - zero_W[part[:, 0]]
    return Read(
        row_W, block_W, pages_W, part.reshape(-1).astype(jnp.int32), total.astype(jnp.int32)
    )


def written(length: int, k_pages, tables_SP, starts_S, counts_S, cores: int) -> Written:
    """For storing `length` new tokens of a row. Each core's part is the whole list where they share
    the heads.
    """
    groups, page_size = k_pages.shape[2], k_pages.shape[4]
    num_blocks = -(-(length - 1) // page_size) + 1
    block_SB = (starts_S // page_size)[:, None] + jnp.arange(num_blocks)
    end_S = jnp.where(counts_S > 0, starts_S + counts_S, 0)
    live_W = ((block_SB * page_size < end_S[:, None]) & (block_SB < tables_SP.shape[1])).reshape(-1)
    page_SB = jnp.take_along_axis(tables_SP, jnp.minimum(block_SB, tables_SP.shape[1] - 1), axis=1)
    row_SB = jnp.broadcast_to(jnp.arange(len(starts_S))[:, None], block_SB.shape)
    order_W = jnp.argsort(~live_W, stable=True)
    lists = (x.reshape(-1)[order_W].astype(jnp.int32) for x in (row_SB, block_SB, page_SB))
    live = jnp.sum(live_W)
    ends = jnp.arange(cores + 1) * live // cores
    if heads_of_core(groups, cores) == groups:
        part = jnp.stack([ends[:-1], ends[1:]], axis=1)
    else:
        part = jnp.tile(jnp.stack([0, live])[None], (cores, 1))
    return Written(*lists, part.reshape(-1).astype(jnp.int32))
