"""Attention for TPU, forward: every query block walks over the key blocks that hold an allowed
pair, and over no others.

Scores stand transposed, keys x queries, so that what belongs to a query is a row vector along
lanes, and the second product fills units of 256. All query heads of a key-value head share its
loads. The work of one head, some queries and some keys, a piece, is written so that the MXU
multiplies for the following and the previous pieces while exponentials of this one are computed.

There is no running maximum. Scores, in units of log2, are shifted by m = max(0, |q| max|k| -
HEADROOM), which no score exceeds by more than HEADROOM (Cauchy-Schwarz), so nothing overflows;
float32 and bfloat16 have the exponents to hold the rest. Where m is so large that all of a query's
exponentials may vanish and they do, its block is computed again with the running maximum of online
softmax.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.attention.reference import NO_KEY
from pallas_kernels.attention.tiles import Tiles
from pallas_kernels.attention.walk import (
    LN2,
    SUBLANES,
    Blocks,
    Keys,
    KeyStream,
    QueryBlock,
    causal_macs,
    head,
    interleaved,
    product,
    query_specs,
)
from pallas_kernels.cost import cost
from pallas_kernels.once import once

HEADROOM = 80.0  # log2; 2^80 x 2^17 keys x values up to 2^30 is a float32
# a row sum below, at a shift above SURE, may have lost terms that matter: 2^17 of up to 2^-126
VANISHED = 2.0**-90
# scores are >= -|q| max|k|, so at shifts up to here the largest term of a row is >= 2^-(HEADROOM +
# SURE + SURE)
SURE = 10.0


class Queries(NamedTuple):
    """q: [B, L, G x heads x H], times scale x log2 e. shift: float32 [B, G, heads, L]. ids: of
    segments, [B, 1, L]. Inside of the kernel refs of a block's [L, heads x H], [heads, L], [1, L].
    """

    q: jax.Array
    shift: jax.Array
    ids: jax.Array


class _Scratch(NamedTuple):
    """acc: sums of exponentials x values, [heads, H, queries]. total: sums of exponentials, and
    best: their running maximum, [heads, 8, queries]. bias: of a tile, [keys, queries]. seen: key
    blocks seen by this core, whose parity is the buffer; a third is for those that come again.
    """

    keys: Keys
    acc: jax.Ref
    total: jax.Ref
    best: jax.Ref
    bias: jax.Ref
    seen: jax.Ref
    semaphores: jax.Ref


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The turn of a query block. force: 'full' or 'masked' leaves only that form of a tile in the
    program, for the compiler to judge.
    """

    at: QueryBlock
    queries: Queries
    keys: KeyStream
    out: jax.Ref
    lse: jax.Ref
    scratch: _Scratch
    blocks: Blocks
    force: str | None

    @property
    def heads(self) -> int:
        return self.lse.shape[0]

    def run(self):
        at, seen = self.at, self.scratch.seen

        @pl.when(at.starts_row())
        def _():
            seen[0] = 0
            self.keys.start(at.first_of_row(), 0)

        self.clear()

        @pl.when(at.first < at.stop)
        def _():
            seen[0] = lax.fori_loop(at.first, at.stop, self.visit, seen[0])

        self.finish(lambda h, part: self.queries.shift[pl.ds(h, 1), part])
        if self.force is None:
            pl.when(self.has_vanished() & (at.first < at.stop))(self.run_exactly)

    def clear(self):
        acc, total = self.scratch.acc, self.scratch.total
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)

    def visit(self, j, count):
        """Waits for a key block, starts the copy of the next one, and adds the tile."""
        at, slot = self.at, count % 2
        more, next_j = at.following(j)
        self.keys.wait(j, slot)
        pl.when(more)(lambda: self.keys.start(next_j, 1 - slot))
        full, visited = at.is_full(j), at.is_visited(j)
        if self.force is not None:
            self.add_tile(slot, masked=self.force == "masked")
            return count + 1

        @pl.when(full)
        def _():
            self.add_tile(slot, masked=False)

        @pl.when(visited & ~full)
        def _():
            self.write_bias(slot, j)
            self.add_tile(slot, masked=True)

        return count + 1

    def write_bias(self, slot, j):
        ids = self.scratch.keys.ids.at[slot]
        self.at.write_bias(self.scratch.bias, self.queries.ids, ids, j)

    def add_tile(self, slot, *, masked: bool):
        """Adds a tile to acc and total, at the fixed shift."""
        k, v = self.scratch.keys.k[slot], self.scratch.keys.v[slot]

        def group(number, _):
            self.add_heads(k, v, number, masked=masked)
            return 0

        lax.fori_loop(0, self.heads // self.blocks.unroll, group, 0)

    def add_heads(self, k, v, group, *, masked: bool):
        """A tile's work of blocks.unroll heads."""
        acc, total, bias = self.scratch.acc, self.scratch.total, self.scratch.bias

        def scores(h, part, some):
            return product(k[some], head(self.queries.q, h, k.shape[-1])[part, :], 1, 1)

        def weigh(h, part, some, s):
            shift = self.queries.shift[pl.ds(h, 1), part]
            # The bias joins the row first: as a part of the scores it delays the MXU.
            exps = jnp.exp2(s - (shift - bias[some, part] if masked else shift))
            total[h, :, part] += _by_sublane(exps)
            return (exps.astype(v.dtype),)

        def add(h, part, some, exps):
            acc[h, :, part] += product(v[some], exps, 0, 0)

        interleaved(self.blocks.pieces(group), self.blocks.ahead, scores, weigh, add)

    def finish(self, shift_of):
        """Writes the results, of scores that were shifted by shift_of(head, queries)."""
        acc, total = self.scratch.acc, self.scratch.total

        def one_head(h, _):
            for part in self.blocks.parts:
                row_sum = jnp.sum(total[h, :, part], axis=0, keepdims=True)
                share = jnp.where(row_sum > 0, 1 / row_sum, 0.0)
                out = (acc[h, :, part] * share).T.astype(self.out.dtype)
                head(self.out, h, acc.shape[1])[part, :] = out
                lse = (shift_of(h, part) + jnp.log2(row_sum)) * LN2
                self.lse[pl.ds(h, 1), part] = jnp.where(row_sum > 0, lse, NO_KEY)
            return 0

        lax.fori_loop(0, self.heads, one_head, 0)

    def has_vanished(self):
        """Whether a query's exponentials may have, at the fixed shift."""
        row_sums = jnp.sum(self.scratch.total[...], axis=1)
        lost = (row_sums < VANISHED) & (self.queries.shift[...] > SURE)
        return jnp.max(jnp.where(lost, 1.0, 0.0)) > 0

    def run_exactly(self):
        """The block once more, by online softmax."""
        best = self.scratch.best
        self.clear()
        best[...] = jnp.full_like(best, NO_KEY)

        def visit(j, _):
            self.keys.start(j, 2)
            self.keys.wait(j, 2)
            self.write_bias(2, j)
            self.add_tile_exactly(2)
            return 0

        lax.fori_loop(self.at.first, self.at.stop, visit, 0)
        self.finish(lambda h, part: best[h, :1, part])

    def add_tile_exactly(self, slot):
        scratch = self.scratch
        k, v = scratch.keys.k[slot], scratch.keys.v[slot]

        def one_head(h, _):
            for part in self.blocks.parts:
                q = head(self.queries.q, h, k.shape[-1])[part, :]
                s = product(k, q, 1, 1) + scratch.bias[:, part]
                old = scratch.best[h, :1, part]
                new = jnp.maximum(old, jnp.max(s, axis=0, keepdims=True))
                exps, kept = jnp.exp2(s - new), jnp.exp2(old - new)
                scratch.total[h, :, part] = scratch.total[h, :, part] * kept + _by_sublane(exps)
                scratch.acc[h, :, part] = scratch.acc[h, :, part] * kept + product(
                    v, exps.astype(v.dtype), 0, 0
                )
                scratch.best[h, :, part] = jnp.broadcast_to(new, (SUBLANES, new.shape[1]))
            return 0

        lax.fori_loop(0, self.heads, one_head, 0)


def _by_sublane(exps):
    """Sums over keys, in 8 parts: [8, queries]."""
    return jnp.sum(exps.reshape(-1, SUBLANES, exps.shape[1]), axis=0)


def _kernel(tiles, queries, keys, out, lse, scratch: _Scratch, *, blocks, force):
    at = QueryBlock.of_step(tiles, blocks)
    stream = KeyStream(at, keys, scratch.keys, scratch.semaphores)
    _Forward(at, queries, stream, out, lse, scratch, blocks, force).run()


@once("blocks", "vmem_bytes", "force")
def forward(
    queries: Queries,
    keys: Keys,
    tiles: Tiles,
    blocks: Blocks,
    vmem_bytes: int,
    force: str | None = None,
):
    """softmax(q k^T / log2 e) v of scaled queries, and its log-sum-exp: [B, L, G x heads x H] in
    the type of v, and natural, float32 [B, G, heads, L]. tiles: of blocks.q and blocks.kv.
    """
    batch, length, _ = queries.q.shape
    groups, heads = queries.shift.shape[1:3]
    size = keys.k.shape[-1] // groups
    q_spec, row_spec, ids_spec = query_specs(blocks.q, heads, size)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    vmem = lambda *shape, dtype=jnp.float32: pltpu.VMEM(shape, dtype)
    scratch = _Scratch(
        keys=keys.buffers(3, blocks.kv, size),
        acc=vmem(heads, size, blocks.q),
        total=vmem(heads, SUBLANES, blocks.q),
        best=vmem(heads, SUBLANES, blocks.q),
        bias=vmem(blocks.kv, blocks.q),
        seen=pltpu.SMEM((1,), jnp.int32),
        semaphores=pltpu.SemaphoreType.DMA((3, 3)),
    )
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, force=force),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups, length // blocks.q),
            in_specs=[Queries(q_spec, row_spec, ids_spec), Keys(*[anywhere] * 3)],
            out_specs=[q_spec, row_spec],
            scratch_shapes=[scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.q.shape, keys.v.dtype),
            jax.ShapeDtypeStruct(queries.shift.shape, jnp.float32),
        ],
        cost_estimate=cost(
            queries.q, queries.q, keys.k, keys.v, macs=2 * causal_macs(queries.q, keys.k)
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpret.params(),
        name="attention_forward",
    )(tiles, queries, keys)
