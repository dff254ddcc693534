"""Paged attention for TPU: reads each row's own pages, once, and nothing else.

A core walks over one list of blocks of pages, row after row, and fetches the next block, which may
be the next row's, while it computes with this one: short rows do not stall it. A copy is a whole
page of all its key-value heads. All query heads and new tokens of a key-value head are rows of one
product. Two cores share the heads where they can, else the list.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import fp8_bits, interpret, tuning
from pallas_kernels.cost import cost
from pallas_kernels.once import once
from pallas_kernels.paged_attention.work import Blocks, Read
from pallas_kernels.target import heads_of_core

LANES = 128
MASKED = -1e38


class _Rows(NamedTuple):
    """The other scalars; tables: those of all rows, one after the other."""

    starts_S: jax.Ref
    tables: jax.Ref
    layer: jax.Ref


class _Pages(NamedTuple):
    k: jax.Ref
    v: jax.Ref


class _Scratch(NamedTuple):
    """Two buffers of a block's pages, of queries and of results; acc: sums of exponentials x
    values, [heads, Q, H]; best: running maximum, and sums: of exponentials, [heads, Q, 128].
    """

    pages: _Pages
    q: jax.Ref
    out: jax.Ref
    acc: jax.Ref
    best: jax.Ref
    sums: jax.Ref
    semaphores: jax.Ref


@once("scale", "blocks")
def paged_attention(
    q_SLNH, k_pages, v_pages, layer, tables_SP, starts_S, counts_S, work: Read, scale: float,
    blocks: Blocks,
) -> jax.Array:  # fmt: skip
    """As api.paged_attention. work: as work.read gives them for these blocks, of the chip's cores,
    which share them.
    """
    rows, length, num_heads, size = q_SLNH.shape
    groups, tokens = k_pages.shape[2], min(blocks.tokens, length)
    per_group, num_blocks = num_heads // groups, -(-length // tokens)
    used = tokens * per_group
    q = jnp.pad(q_SLNH, ((0, 0), (0, num_blocks * tokens - length), (0, 0), (0, 0)))
    q = (
        q.reshape(rows, num_blocks, tokens, groups, per_group, size)
        .swapaxes(2, 3)
        .reshape(rows, num_blocks, groups, used, size)
    )
    bits = blocks.bits and q.dtype == jnp.bfloat16
    if bits:
        q, scale = fp8_bits.in_order(q * fp8_bits.LIFT), scale / fp8_bits.LIFT / fp8_bits.SCALE
    q_SBGQH = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, -used % (32 // q.dtype.itemsize)), (0, 0)))
    out = _call(
        work,
        _Rows(
            starts_S.astype(jnp.int32),
            tables_SP.reshape(-1).astype(jnp.int32),
            jnp.asarray(layer, jnp.int32)[None],
        ),
        q_SBGQH,
        _Pages(k_pages, v_pages),
        dataclasses.replace(blocks, tokens=tokens, bits=bits),
        per_group,
        scale * math.log2(math.e),
        _cost(q_SBGQH, k_pages, v_pages, length * num_heads, tables_SP.size),
    )
    out = (
        out[:, :, :, :used]
        .reshape(rows, num_blocks, groups, tokens, per_group, size)
        .swapaxes(2, 3)
    )
    out = out.reshape(rows, num_blocks * tokens, num_heads, size)[:, :length]
    # What no core has written is unknown.
    return jnp.where((jnp.arange(length) < counts_S[:, None])[..., None, None], out, 0)


def _call(
    work: Read, rows: _Rows, q_SBGQH, pages: _Pages, blocks: Blocks, per_group: int,
    factor: float, cost_estimate,
) -> jax.Array:  # fmt: skip
    """The kernel's results, like q_SBGQH: blocks of queries, Q of them with all heads of a group
    and padding. factor: on the scores, for units of log2.
    """
    cores, (groups, q_rows, size) = len(work.total), q_SBGQH.shape[2:]
    heads = heads_of_core(groups, cores)
    anywhere, vmem = pl.BlockSpec(memory_space=pl.ANY), pltpu.VMEM
    scratch = _Scratch(
        pages=_Pages(*(vmem((2, blocks.pages, heads, *p.shape[3:]), p.dtype) for p in pages)),
        q=vmem((2, heads, q_rows, size), q_SBGQH.dtype),
        out=vmem((2, heads, q_rows, size), q_SBGQH.dtype),
        acc=vmem((heads, q_rows, size), jnp.float32),
        best=vmem((heads, q_rows, LANES), jnp.float32),
        sums=vmem((heads, q_rows, LANES), jnp.float32),
        semaphores=pltpu.SemaphoreType.DMA((2, 4)),
    )
    blocks = dataclasses.replace(blocks, turn=math.gcd(heads, blocks.turn))
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, per_group=per_group, factor=factor),
        out_shape=jax.ShapeDtypeStruct(q_SBGQH.shape, q_SBGQH.dtype),
        cost_estimate=cost_estimate,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores,),
            in_specs=[anywhere, _Pages(anywhere, anywhere)],
            out_specs=anywhere,
            scratch_shapes=[scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tuning.vmem_limit()
        ),
        interpret=interpret.params(),
        name="paged_attention",
    )(work, rows, q_SBGQH, pages)


def _cost(q_SBGQH, k_pages, v_pages, queries: int, pages: int):
    """Were all pages of the tables full: each block of a row's queries reads all of its pages.
    queries: of a row, for all heads.
    """
    num_blocks, size = q_SBGQH.shape[1], q_SBGQH.shape[-1]
    read = (
        jax.ShapeDtypeStruct((num_blocks * pages, *p.shape[2:]), p.dtype)
        for p in (k_pages, v_pages)
    )
    return cost(q_SBGQH, q_SBGQH, *read, macs=2 * queries * size * pages * k_pages.shape[4])


def _kernel(work, rows, q, pages, out, scratch, *, blocks, per_group, factor):
    core, heads = pl.program_id(0), scratch.acc.shape[0]
    first_w, stop_w, count = work.part[2 * core], work.part[2 * core + 1], work.total[core]
    own = pl.ds(core * heads if heads != q.shape[2] else 0, heads)
    _Core(
        work, rows, q, pages, out, scratch, blocks, per_group, factor, first_w, stop_w, count, own
    ).run()


@dataclasses.dataclass(frozen=True)
class _Core:
    """One core's part of the list: `count` blocks of pages, of the places from first_w to before
    stop_w. w: place in the list, i: block of the pages that it sees; n: blocks so far, whose parity
    is the buffer. own: the core's key-value heads.
    """

    work: Read
    rows: _Rows
    q: jax.Ref
    pages: _Pages
    out: jax.Ref
    scratch: _Scratch
    blocks: Blocks
    per_group: int
    factor: float
    first_w: jax.Array
    stop_w: jax.Array
    count: jax.Array
    own: pl.Slice

    def run(self):
        # a page that is not fetched is multiplied by zeros, which NaN would survive
        if self.blocks.pages > 1:
            for buf in self.scratch.pages:
                buf[...] = jnp.zeros_like(buf)

        @pl.when(self.count > 0)
        def _():
            self.q_copy(self.first_w).start()
            self.for_pages(self.first_w, 0, 0, lambda copy: copy.start())

        lax.fori_loop(0, self.count, self.step, (self.first_w, jnp.int32(0)))
        for back in (2, 1):

            @pl.when(self.stop_w - self.first_w >= back)
            def _(back=back):
                self.out_copy(self.stop_w - back).wait()

    def slot(self, w):
        return (w - self.first_w) % 2

    def q_copy(self, w):
        slot, scratch = self.slot(w), self.scratch
        there = self.q.at[self.work.row_W[w], self.work.block_W[w], self.own]
        return pltpu.make_async_copy(there, scratch.q.at[slot], scratch.semaphores.at[slot, 2])

    def out_copy(self, w):
        slot, scratch = self.slot(w), self.scratch
        there = self.out.at[self.work.row_W[w], self.work.block_W[w], self.own]
        return pltpu.make_async_copy(scratch.out.at[slot], there, scratch.semaphores.at[slot, 3])

    def for_pages(self, w, i, slot, do):
        """Starts or waits for the copies of a block's pages; the row's last block may have
        fewer.
        """
        pages, width = self.blocks.pages, self.rows.tables.shape[0] // self.rows.starts_S.shape[0]
        for j in range(pages):

            @pl.when(i * pages + j < self.work.pages_W[w])
            def _(j=j):
                page = self.rows.tables[self.work.row_W[w] * width + i * pages + j]
                for n, (hbm, buf) in enumerate(zip(self.pages, self.scratch.pages, strict=True)):
                    there = hbm.at[self.rows.layer[0], page, self.own]
                    semaphore = self.scratch.semaphores.at[slot, n]
                    do(pltpu.make_async_copy(there, buf.at[slot, j], semaphore))

    def step(self, n, carry):
        """Waits for a block of pages, starts the copies of the next one, and attends to it; at the
        first and last of a query block also moves queries and results.
        """
        (w, i), slot, scratch = carry, n % 2, self.scratch
        last = (i + 1) * self.blocks.pages >= self.work.pages_W[w]
        next_w, next_i = jnp.where(last, w + 1, w), jnp.where(last, 0, i + 1)

        @pl.when(n + 1 < self.count)
        def _():
            self.for_pages(next_w, next_i, 1 - slot, lambda copy: copy.start())

        @pl.when(i == 0)
        def _():
            self.q_copy(w).wait()
            pl.when(w + 1 < self.stop_w)(lambda: self.q_copy(w + 1).start())
            scratch.acc[...] = jnp.zeros_like(scratch.acc)
            scratch.sums[...] = jnp.zeros_like(scratch.sums)
            scratch.best[...] = jnp.full_like(scratch.best, MASKED)

        self.for_pages(w, i, slot, lambda copy: copy.wait())
        self.attend(w, i, slot)

        @pl.when(last)
        def _():
            pl.when(w - self.first_w >= 2)(lambda: self.out_copy(w - 2).wait())
            out = scratch.acc[...] / _wide(scratch.sums[...], scratch.acc.shape[2])
            scratch.out[self.slot(w)] = out.astype(scratch.out.dtype)
            self.out_copy(w).start()

        return next_w, next_i

    def attend(self, w, i, slot):
        """Adds a block of pages to acc and sums, by online softmax."""
        q_slot, seen = self.slot(w), self.seen(w, i)
        heads, turn = self.scratch.acc.shape[0], self.blocks.turn
        some_heads = lambda first: self.attend_heads(first, q_slot, slot, seen)
        if turn == heads:
            some_heads(0)
        else:
            lax.fori_loop(0, heads // turn, lambda n, _: (some_heads(n * turn), 0)[1], 0)

    def seen(self, w, i):
        """Which positions of a block of pages which queries see, [Q, pages x page size]."""
        work, (pages, tokens) = self.work, (self.blocks.pages, self.blocks.tokens)
        q_rows, page_size = self.scratch.q.shape[2], self.page_size
        # Rows are tokens x heads of a group; the float division is exact for any block that fits.
        row = lax.broadcasted_iota(jnp.int32, (q_rows, 1), 0).astype(jnp.float32)
        token = jnp.floor((row + 0.5) / self.per_group).astype(jnp.int32)
        position = self.rows.starts_S[work.row_W[w]] + work.block_W[w] * tokens + token
        key = i * pages * page_size + lax.broadcasted_iota(
            jnp.int32, (q_rows, pages * page_size), 1
        )
        return key <= position

    @property
    def page_size(self) -> int:
        return self.scratch.pages.k.shape[-1]

    def attend_heads(self, first, q_slot, slot, seen):
        """In phases over all heads of a turn, loads first and stores last, so that one head's
        latencies are hidden by the others.
        """
        scratch = self.scratch
        heads = [first + h for h in range(self.blocks.turn)]
        queries = [scratch.q[q_slot, h] for h in heads]
        old, before, sum_before = (
            [ref[h] for h in heads] for ref in (scratch.best, scratch.acc, scratch.sums)
        )
        scores = [
            jnp.where(seen, self.scores(q, slot, h) * self.factor, MASKED)
            for q, h in zip(queries, heads, strict=True)
        ]
        new = [
            jnp.maximum(o, jnp.max(s, axis=1, keepdims=True))
            for o, s in zip(old, scores, strict=True)
        ]
        exps = [jnp.exp2(s - _wide(n, s.shape[1])) for s, n in zip(scores, new, strict=True)]
        added = [self.values(e, slot, h) for e, h in zip(exps, heads, strict=True)]
        for n, h in enumerate(heads):
            kept = jnp.exp2(old[n] - new[n])
            scratch.best[h] = new[n]
            scratch.sums[h] = sum_before[n] * kept + jnp.sum(exps[n], axis=1, keepdims=True)
            scratch.acc[h] = before[n] * _wide(kept, scratch.acc.shape[2]) + added[n]

    def scores(self, q, slot, h):
        """[Q, pages x page size]. With `join` pages of one product, each with rows of its own: [q
        0; 0 q] [k0; k1].
        """
        (pages, join), q_rows, out = (self.blocks.pages, self.blocks.join), len(q), []
        for j in range(0, pages, join):
            k = self.unpacked(self.scratch.pages.k, slot, j, h)
            zeros = jnp.zeros_like(q)
            lhs = [
                jnp.concatenate([q if m == n else zeros for m in range(join)], axis=1)
                for n in range(join)
            ]
            product = _dot(jnp.concatenate(lhs, axis=0), k)
            out += [product[n * q_rows : (n + 1) * q_rows] for n in range(join)]
        return jnp.concatenate(out, axis=1)

    def values(self, exps, slot, h):
        """[Q, H]."""
        (pages, join), bits = (self.blocks.pages, self.blocks.join), self.blocks.bits
        exps = (_in_order(exps) * fp8_bits.LIFT if bits else exps).astype(self.scratch.q.dtype)
        out = 0.0
        for j in range(0, pages, join):
            v = self.unpacked(self.scratch.pages.v, slot, j, h)
            out += _dot(exps[:, j * self.page_size : (j + join) * self.page_size], v)
        return out * (1 / fp8_bits.LIFT / fp8_bits.SCALE) if bits else out

    def unpacked(self, buffer, slot, j, h):
        """`join` pages of a head, from page j of the block on, one below the other."""
        dtype = self.scratch.q.dtype
        unpack = fp8_bits.to_bfloat16 if self.blocks.bits else lambda page: page.astype(dtype)
        pages = [unpack(buffer[slot, j + n, h]) for n in range(self.blocks.join)]
        return jnp.concatenate(pages, axis=0)


def _dot(a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _wide(x, size: int):
    """x [..., LANES], alike in all lanes, as [..., size]."""
    if size <= LANES:
        return x[..., :size]
    return jnp.concatenate([x] * (size // LANES), axis=-1)


def _in_order(exps):
    """[Q, page] in the order of fp8_bits' rows."""
    lane = lax.broadcasted_iota(jnp.int32, (exps.shape[0], LANES), 1)
    within, half = lane % fp8_bits.PACK, fp8_bits.PACK // 2
    source = lane - within + jnp.where(within < half, 2 * within, 2 * (within - half) + 1)
    parts = [exps[:, start : start + LANES] for start in range(0, exps.shape[1], LANES)]
    return jnp.concatenate([jnp.take_along_axis(part, source, axis=1) for part in parts], axis=1)
