"""What both attention kernels share: a query block's walk over key blocks, the copies of those, and
the pieces that its work is cut into.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tiles import FIRST, GREATEST, LEAST, NEXT, ONLY, STOP, Tiles

MASKED = -1e38
LN2 = math.log(2.0)
LANES, SUBLANES = 128, 8


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of a tile (q, kv) and of a piece (piece, kv_piece), a unit of
    interleaving.

    unroll: heads written out in one turn of the loop over heads. ahead: pieces whose scores are
    multiplied before a piece's exponentials. transposed, backward only: the sums of keys' and
    values' gradients are [head size, keys], which fills units of 256.
    """

    q: int
    kv: int
    piece: int
    kv_piece: int
    unroll: int
    ahead: int
    transposed: bool

    def pieces(self, group) -> list[tuple[jax.Array, slice, slice]]:
        """Head, queries and keys of each piece of a group of `unroll` heads."""
        return [
            (group * self.unroll + h, queries, keys)
            for h in range(self.unroll)
            for queries in self.parts
            for keys in slices(self.kv, self.kv_piece)
        ]

    @property
    def parts(self) -> list[slice]:
        """Queries of the pieces."""
        return slices(self.q, self.piece)


def interleaved(pieces, ahead: int, scores, weigh, add):
    """The work of each piece: scores(*piece), weigh(*piece, scores), add(*piece, *weights), written
    so that the MXU multiplies the scores of the `ahead` pieces that follow, and adds the piece
    before, while one is weighed.
    """
    waiting, pending = [scores(*piece) for piece in pieces[:ahead]], None
    for n, piece in enumerate(pieces):
        waiting += [scores(*following) for following in pieces[n + ahead : n + ahead + 1]]
        found = waiting.pop(0)
        if pending is not None:
            add(*pending)
        pending = *piece, *weigh(*piece, found)
    add(*pending)


def slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


class Keys(NamedTuple):
    """Keys and values [B, M, G x H] and their segment ids [B, key blocks, 1, block]; inside of a
    kernel refs, of these in HBM or of buffers of blocks: [buffers, block, H] and [buffers, 1,
    block].
    """

    k: jax.Array
    v: jax.Array
    ids: jax.Array

    def buffers(self, count: int, block: int, size: int) -> Keys:
        """Buffers in VMEM of so many blocks of one head."""
        k, v = (pltpu.VMEM((count, block, size), x.dtype) for x in (self.k, self.v))
        return Keys(k, v, pltpu.VMEM((count, 1, block), jnp.int32))


@dataclasses.dataclass(frozen=True)
class QueryBlock:
    """Whose turn it is in the grid: query block i of row b, for key-value head g. It visits the key
    blocks from `first` to before `stop`. tiles: as refs of scalars.
    """

    tiles: Tiles
    blocks: Blocks
    b: jax.Array
    g: jax.Array
    i: jax.Array
    first: jax.Array
    stop: jax.Array

    @classmethod
    def of_step(cls, tiles: Tiles, blocks: Blocks) -> QueryBlock:
        """That of the current step of a grid of (batch, key-value heads, query blocks)."""
        b, g, i = (pl.program_id(axis) for axis in range(3))
        first, stop = (tiles.queries[name, b, i] for name in (FIRST, STOP))
        return cls(tiles, blocks, b, g, i, first, stop)

    def starts_row(self):
        """Whether it is the first one of a row in which any visits a key block."""
        return (self.i == 0) & (self.tiles.queries[NEXT, self.b, 0] < pl.num_programs(2))

    def first_of_row(self):
        """The key block that the row's walk begins with."""
        return self.tiles.queries[FIRST, self.b, self.tiles.queries[NEXT, self.b, 0]]

    def following(self, j):
        """Whether this core visits another key block of the row after j, and which."""
        queries, num_blocks = self.tiles.queries, pl.num_programs(2)
        next_i = queries[NEXT, self.b, self.i + 1]
        first = queries[FIRST, self.b, jnp.minimum(next_i, num_blocks - 1)]
        goes_on = j + 1 < self.stop
        return goes_on | (next_i < num_blocks), jnp.where(goes_on, j + 1, first)

    def is_visited(self, j):
        """Whether the tile of key block j may hold an allowed pair (as tiles.visits)."""
        queries, keys, offsets = self.tiles.queries, self.tiles.keys, self.tiles.offsets
        overlap = (keys[LEAST, self.b, j] <= queries[GREATEST, self.b, self.i]) & (
            keys[GREATEST, self.b, j] >= queries[LEAST, self.b, self.i]
        )
        first_key = offsets[1] + j * self.blocks.kv
        last_query = offsets[0] + (self.i + 1) * self.blocks.q - 1
        return overlap & (first_key <= last_query)

    def is_full(self, j):
        """Whether every pair of the tile is allowed."""
        queries, keys, offsets = self.tiles.queries, self.tiles.keys, self.tiles.offsets
        return (queries[ONLY, self.b, self.i] == keys[ONLY, self.b, j]) & (
            offsets[1] + (j + 1) * self.blocks.kv - 1 <= offsets[0] + self.i * self.blocks.q
        )

    def write_bias(self, bias, q_ids, kv_ids, j):
        """0 for the allowed pairs of the tile, MASKED for the others: [keys, queries]."""
        q_first = self.tiles.offsets[0] + self.i * self.blocks.q
        kv_first = self.tiles.offsets[1] + j * self.blocks.kv
        shape = bias.shape
        kv_ids = jnp.broadcast_to(kv_ids[...], (SUBLANES, shape[0])).T[:, :1]
        q_ids = q_ids[...]
        causal = (kv_first + lax.broadcasted_iota(jnp.int32, shape, 0)) <= (
            q_first + lax.broadcasted_iota(jnp.int32, shape, 1)
        )
        bias[...] = jnp.where((kv_ids == q_ids) & (q_ids > 0) & causal, 0.0, MASKED)


@dataclasses.dataclass(frozen=True)
class KeyStream:
    """Keys, values and ids of a key block, copied from HBM to one of the buffers."""

    at: QueryBlock
    hbm: Keys
    buffers: Keys
    semaphores: jax.Ref  # [buffers, 3]

    def copies(self, j, slot):
        _, kv_block, size = self.buffers.k.shape
        rows, columns = pl.ds(j * kv_block, kv_block), pl.ds(self.at.g * size, size)
        there = (
            self.hbm.k.at[self.at.b, rows, columns],
            self.hbm.v.at[self.at.b, rows, columns],
            self.hbm.ids.at[self.at.b, j],
        )
        return [
            pltpu.make_async_copy(source, buffer.at[slot], self.semaphores.at[slot, n])
            for n, (source, buffer) in enumerate(zip(there, self.buffers, strict=True))
        ]

    def start(self, j, slot):
        for copy in self.copies(j, slot):
            copy.start()

    def wait(self, j, slot):
        for copy in self.copies(j, slot):
            copy.wait()


def product(a, b, a_axis: int, b_axis: int):
    """Contracts an axis of each; bfloat16 in one pass, float32 in as many as it takes."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def head(ref, index, size: int):
    """Columns of one head of a block [queries, heads x size]."""
    return ref.at[:, pl.ds(pl.multiple_of(index * size, LANES), size)]


def query_specs(q_block: int, heads: int, size: int):
    """What a grid of (batch, key-value heads, query blocks) reads of [B, L, G x heads x H], [B, G,
    heads, L] and [B, 1, L].
    """
    return (
        pl.BlockSpec((None, q_block, heads * size), lambda b, g, i, *_: (b, i, g)),
        pl.BlockSpec((None, None, heads, q_block), lambda b, g, i, *_: (b, g, 0, i)),
        pl.BlockSpec((None, 1, q_block), lambda b, g, i, *_: (b, 0, i)),
    )


def causal_macs(q_BLX, k_BMY) -> int:
    """Of one product of all queries with the keys that are not after them."""
    return q_BLX.size * k_BMY.shape[1] // 2
