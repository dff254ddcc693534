"""Paged attention for TPU: reads each row's own pages, once, and nothing else.

A core walks over one list of blocks of pages, row after row, and fetches the next block, which may
be the next row's, while it computes with this one: short rows do not stall it. A copy is a whole
page of all its key-value heads. All query heads and new tokens of a key-value head are rows of one
product. Two cores share the heads where they can, else the list.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import fp8_bits, interpret, tuning
from pallas_kernels.cost import cost
from pallas_kernels.once import once
from pallas_kernels.target import heads_of_core

LANES = 128
MASKED = -1e38


@once("scale", "blocks", "cores")
def paged_attention(
    q_SLNH,
    k_pages,
    v_pages,
    layer,
    tables_SP,
    starts_S,
    counts_S,
    scale,
    blocks,
    cores: int,
    works=None,
) -> jax.Array:
    """As api.paged_attention. blocks: shapes.Blocks. cores: of the chip, which share the work.
    works: as `work` gives them.
    """
    rows, length, num_heads, size = q_SLNH.shape
    groups, page_size = k_pages.shape[2], k_pages.shape[4]
    per_group, tokens = num_heads // groups, min(blocks.tokens, length)
    sublanes = 32 // q_SLNH.dtype.itemsize
    used = tokens * per_group
    q_rows = -(-used // sublanes) * sublanes
    num_blocks = -(-length // tokens)
    q = jnp.pad(q_SLNH, ((0, 0), (0, num_blocks * tokens - length), (0, 0), (0, 0)))
    q = (
        q.reshape(rows, num_blocks, tokens, groups, per_group, size)
        .swapaxes(2, 3)
        .reshape(rows, num_blocks, groups, used, size)
    )
    bits = blocks.bits and q.dtype == jnp.bfloat16
    if bits:
        q, scale = fp8_bits.in_order(q * fp8_bits.LIFT), scale / fp8_bits.LIFT / fp8_bits.SCALE
    q_SBGQH = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, q_rows - used), (0, 0)))

    heads = heads_of_core(groups, cores)
    if works is None:
        works = work(length, k_pages, starts_S, counts_S, blocks, cores)
    kernel = functools.partial(
        _kernel, heads=heads, shared=heads != groups, width=tables_SP.shape[1], per_group=per_group,
        tokens=tokens,
        page_size=page_size, pages=blocks.pages, join=blocks.join,
        turn=math.gcd(heads, blocks.turn),
        bits=bits, factor=scale * math.log2(math.e),
    )  # fmt: skip
    buffers = [
        pltpu.VMEM((2, blocks.pages, heads, *pages.shape[3:]), pages.dtype)
        for pages in (k_pages, v_pages)
    ]
    block = (heads, q_rows, size)
    starts, tables = starts_S.astype(jnp.int32), tables_SP.reshape(-1).astype(jnp.int32)
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q_SBGQH.shape, q_SBGQH.dtype),
        cost_estimate=_cost(q_SBGQH, k_pages, v_pages, length * num_heads, tables_SP.size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(cores,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 3,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                *buffers,
                pltpu.VMEM((2, *block), q.dtype),
                pltpu.VMEM((2, *block), q.dtype),
                pltpu.VMEM(block, jnp.float32),
                pltpu.VMEM((heads, q_rows, LANES), jnp.float32),
                pltpu.VMEM((heads, q_rows, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 4)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tuning.vmem_limit()
        ),
        interpret=interpret.params(),
        name="paged_attention",
    )(*works, starts, tables, jnp.asarray(layer, jnp.int32)[None], q_SBGQH, k_pages, v_pages)
    out = (
        out[:, :, :, :used]
        .reshape(rows, num_blocks, groups, tokens, per_group, size)
        .swapaxes(2, 3)
    )
    out = out.reshape(rows, num_blocks * tokens, num_heads, size)[:, :length]
    # What no core has written is unknown.
    return jnp.where((jnp.arange(length) < counts_S[:, None])[..., None, None], out, 0)


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


def work(length: int, k_pages, starts_S, counts_S, blocks, cores: int) -> tuple[jax.Array, ...]:
    """What the kernel walks over for `length` new tokens of a row: the same in every layer."""
    groups, tokens = k_pages.shape[2], min(blocks.tokens, length)
    split = heads_of_core(groups, cores) == groups
    return _work(
        starts_S,
        counts_S,
        tokens,
        -(-length // tokens),
        k_pages.shape[4],
        blocks.pages,
        cores,
        split=split,
    )


def _work(starts_S, counts_S, tokens, num_blocks, page_size, pages, cores, *, split: bool):
    """The list of query blocks with real tokens: row, block, and number of pages that it sees [W];
    after them any other. Where each core's part of it begins and ends [2 cores], and its number of
    blocks of pages [cores]; each core's part is all unless `split`.
    """
    first_B = jnp.arange(num_blocks) * tokens
    live_SB = first_B < counts_S[:, None]
    seen_SB = starts_S[:, None] + jnp.minimum(counts_S[:, None], first_B + tokens)
    pages_W = jnp.where(live_SB, -(-seen_SB // page_size), 0).reshape(-1)
    order_W = jnp.argsort(pages_W == 0, stable=True)
    row_W, block_W, pages_W = (
        x[order_W].astype(jnp.int32) for x in (*_indices(live_SB.shape), pages_W)
    )
    steps_W = -(-pages_W // pages)
    live, before_W = jnp.sum(pages_W > 0), jnp.cumsum(steps_W)
    shares = jnp.arange(cores + 1) * before_W[-1] / cores if split else None
    ends = (
        jnp.sum(before_W[None] <= shares[:, None], axis=1)
        .clip(max=live)
        .at[-1]
        .set(live)
        .at[0]
        .set(0)
        if split
        else None
    )
    part = (
        jnp.stack([ends[:-1], ends[1:]], axis=1)
        if split
        else jnp.tile(jnp.stack([0, live])[None], (cores, 1))
    )
    zero_W = jnp.concatenate([jnp.zeros(1, before_W.dtype), before_W])
    total = zero_W[part[:, 1]] - zero_W[part[:, 0]]
    return row_W, block_W, pages_W, part.reshape(-1).astype(jnp.int32), total.astype(jnp.int32)


def _indices(shape):
    return jnp.indices(shape, jnp.int32).reshape(2, -1)


def _kernel(
    row_W, block_W, pages_W, part, total, starts_S, tables, layer, q_hbm, k_hbm, v_hbm, out_hbm,
    k_buf, v_buf, q_buf, out_buf, acc, best, sums, sems,
    *, heads: int, shared: bool, width: int, per_group: int, tokens: int, page_size: int,
    pages: int, join: int, turn: int, bits: bool,
    factor: float,
):  # fmt: skip
    """One core's part of the list. w: place in it, i: block of the pages that it sees; n: blocks so
    far, whose parity is the buffer.
    """
    core = pl.program_id(0)
    first_w, stop_w, count = part[2 * core], part[2 * core + 1], total[core]
    (q_rows, size), dtype = q_buf.shape[2:], q_buf.dtype
    own = pl.ds(core * heads if shared else 0, heads)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    unpack = fp8_bits.to_bfloat16 if bits else lambda page: page.astype(dtype)

    def q_copy(w):
        slot = (w - first_w) % 2
        return pltpu.make_async_copy(
            q_hbm.at[row_W[w], block_W[w], own], q_buf.at[slot], sems.at[slot, 2]
        )

    def out_copy(w):
        slot = (w - first_w) % 2
        return pltpu.make_async_copy(
            out_buf.at[slot], out_hbm.at[row_W[w], block_W[w], own], sems.at[slot, 3]
        )

    def for_pages(w, i, slot, do):
        """Starts or waits for the copies of a block's pages; the row's last block may have
        fewer.
        """
        for j in range(pages):

            @pl.when(i * pages + j < pages_W[w])
            def _(j=j):
                page = tables[row_W[w] * width + i * pages + j]
                for number, (hbm, buf) in enumerate(((k_hbm, k_buf), (v_hbm, v_buf))):
                    do(
                        pltpu.make_async_copy(
                            hbm.at[layer[0], page, own], buf.at[slot, j], sems.at[slot, number]
                        )
                    )

    if pages > 1:  # a page that is not fetched is multiplied by zeros, which NaN would survive
        for buf in (k_buf, v_buf):
            buf[...] = jnp.zeros_like(buf)

    @pl.when(count > 0)
    def _():
        q_copy(first_w).start()
        for_pages(first_w, 0, 0, lambda copy: copy.start())

    def compute(w, i, slot):
        q_slot = (w - first_w) % 2
        # Rows are tokens x heads of a group; the float division is exact for any block that fits.
        token = jnp.floor(
            (lax.broadcasted_iota(jnp.int32, (q_rows, 1), 0).astype(jnp.float32) + 0.5) / per_group
        ).astype(jnp.int32)
        position = starts_S[row_W[w]] + block_W[w] * tokens + token
        key = i * pages * page_size + lax.broadcasted_iota(
            jnp.int32, (q_rows, pages * page_size), 1
        )
        seen = key <= position

        def some_heads(first):
            """In phases over all of them, loads first and stores last, so that one head's latencies
            are hidden by the others.
            """
            heads_here = [first + h for h in range(turn)]
            queries = [q_buf[q_slot, h] for h in heads_here]
            old, before, sum_before = ([ref[h] for h in heads_here] for ref in (best, acc, sums))
            scores = [
                jnp.where(seen, _scores(q, h) * factor, MASKED)
                for q, h in zip(queries, heads_here, strict=True)
            ]
            new = [
                jnp.maximum(o, jnp.max(s, axis=1, keepdims=True))
                for o, s in zip(old, scores, strict=True)
            ]
            exps = [jnp.exp2(s - _wide(n, s.shape[1])) for s, n in zip(scores, new, strict=True)]
            added = [_values(e, h) for e, h in zip(exps, heads_here, strict=True)]
            for n, h in enumerate(heads_here):
                kept = jnp.exp2(old[n] - new[n])
                best[h] = new[n]
                sums[h] = sum_before[n] * kept + jnp.sum(exps[n], axis=1, keepdims=True)
                acc[h] = before[n] * _wide(kept, size) + added[n]

        def _scores(q, h):
            """[Q, pages x page size]. With `join` pages of one product, each with rows of its own:
            [q 0; 0 q] [k0; k1].
            """
            out = []
            for j in range(0, pages, join):
                k = jnp.concatenate([unpack(k_buf[slot, j + n, h]) for n in range(join)], axis=0)
                zeros = jnp.zeros_like(q)
                lhs = [
                    jnp.concatenate([q if m == n else zeros for m in range(join)], axis=1)
                    for n in range(join)
                ]
                product = dot(jnp.concatenate(lhs, axis=0), k)
                out += [product[n * q_rows : (n + 1) * q_rows] for n in range(join)]
            return jnp.concatenate(out, axis=1)

        def _values(exps, h):
            """[Q, H]."""
            exps = (_in_order(exps) * fp8_bits.LIFT if bits else exps).astype(dtype)
            out = 0.0
            for j in range(0, pages, join):
                v = jnp.concatenate([unpack(v_buf[slot, j + n, h]) for n in range(join)], axis=0)
                out += dot(exps[:, j * page_size : (j + join) * page_size], v)
            return out * (1 / fp8_bits.LIFT / fp8_bits.SCALE) if bits else out

        if turn == heads:
            some_heads(0)
        else:
            lax.fori_loop(0, heads // turn, lambda n, _: (some_heads(n * turn), 0)[1], 0)

    def step(n, carry):
        w, i = carry
        slot = n % 2
        last = (i + 1) * pages >= pages_W[w]
        next_w, next_i = jnp.where(last, w + 1, w), jnp.where(last, 0, i + 1)

        @pl.when(n + 1 < count)
        def _():
            for_pages(next_w, next_i, 1 - slot, lambda copy: copy.start())

        @pl.when(i == 0)
        def _():
            q_copy(w).wait()

            @pl.when(w + 1 < stop_w)
            def _():
                q_copy(w + 1).start()

            acc[...] = jnp.zeros_like(acc)
            sums[...] = jnp.zeros_like(sums)
            best[...] = jnp.full_like(best, MASKED)

        for_pages(w, i, slot, lambda copy: copy.wait())
        compute(w, i, slot)

        @pl.when(last)
        def _():
            @pl.when(w - first_w >= 2)
            def _():
                out_copy(w - 2).wait()

            out_buf[(w - first_w) % 2] = (acc[...] / _wide(sums[...], size)).astype(dtype)
            out_copy(w).start()

        return next_w, next_i

    lax.fori_loop(0, count, step, (first_w, jnp.int32(0)))
    for back in (2, 1):

        @pl.when(stop_w - first_w >= back)
        def _(back=back):
            out_copy(stop_w - back).wait()


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
