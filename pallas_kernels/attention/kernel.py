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

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.attention.reference import NO_KEY
from pallas_kernels.attention.tiles import FIRST, GREATEST, LEAST, NEXT, ONLY, STOP, Tiles
from pallas_kernels.cost import cost
from pallas_kernels.once import once

HEADROOM = 80.0  # log2; 2^80 x 2^17 keys x values up to 2^30 is a float32
# a row sum below, at a shift above SURE, may have lost terms that matter: 2^17 of up to 2^-126
VANISHED = 2.0**-90
# scores are >= -|q| max|k|, so at shifts up to here the largest term of a row is >= 2^-(HEADROOM +
# SURE + SURE)
SURE = 10.0
MASKED = -1e38
LN2 = math.log(2.0)
LANES, SUBLANES = 128, 8


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


def is_visited(queries, keys, meta, b, i, j, q_block: int, kv_block: int):
    """Whether a tile may hold an allowed pair (as tiles.visits)."""
    overlap = (keys[LEAST, b, j] <= queries[GREATEST, b, i]) & (
        keys[GREATEST, b, j] >= queries[LEAST, b, i]
    )
    return overlap & (meta[1] + j * kv_block <= meta[0] + (i + 1) * q_block - 1)


def is_full(queries, keys, meta, b, i, j, q_block: int, kv_block: int):
    """Whether every pair of a tile is allowed."""
    return (queries[ONLY, b, i] == keys[ONLY, b, j]) & (
        meta[1] + (j + 1) * kv_block - 1 <= meta[0] + i * q_block
    )


def write_bias(bias, q_ids_ref, kv_ids_ref, q_first, kv_first):
    """0 for the allowed pairs of a tile, MASKED for the others: [keys, queries]."""
    shape = bias.shape
    kv_ids = jnp.broadcast_to(kv_ids_ref[...], (SUBLANES, shape[0])).T[:, :1]
    q_ids = q_ids_ref[...]
    causal = (kv_first + lax.broadcasted_iota(jnp.int32, shape, 0)) <= (
        q_first + lax.broadcasted_iota(jnp.int32, shape, 1)
    )
    bias[...] = jnp.where((kv_ids == q_ids) & (q_ids > 0) & causal, 0.0, MASKED)


def key_copies(b, g, j, slot, hbm, buffers, sems):
    """Copies of keys, values and ids of key block j to one of the buffers."""
    (k_hbm, v_hbm, ids_hbm), (k_buf, v_buf, ids_buf) = hbm, buffers
    _, kv_block, size = k_buf.shape
    rows, columns = pl.ds(j * kv_block, kv_block), pl.ds(g * size, size)
    return [
        pltpu.make_async_copy(k_hbm.at[b, rows, columns], k_buf.at[slot], sems.at[slot, 0]),
        pltpu.make_async_copy(v_hbm.at[b, rows, columns], v_buf.at[slot], sems.at[slot, 1]),
        pltpu.make_async_copy(ids_hbm.at[b, j], ids_buf.at[slot], sems.at[slot, 2]),
    ]


def query_specs(q_block: int, heads: int, size: int):
    """What a grid of (batch, key-value heads, query blocks) reads of [B, L, G x heads x H], [B, G,
    heads, L] and [B, 1, L].
    """
    return (
        pl.BlockSpec((None, q_block, heads * size), lambda b, g, i, *_: (b, i, g)),
        pl.BlockSpec((None, None, heads, q_block), lambda b, g, i, *_: (b, g, 0, i)),
        pl.BlockSpec((None, 1, q_block), lambda b, g, i, *_: (b, 0, i)),
    )


def _forward(
    meta, queries, keys, q_ref, shift_ref, q_ids_ref, k_hbm, v_hbm, kv_ids_hbm, o_ref, lse_ref,
    k_buf, v_buf, ids_buf, acc, total, best, bias, state, sems, *,
    kv_block: int, piece: int, kv_piece: int, unroll: int, ahead: int, force: str | None,
):  # fmt: skip
    """A query block's turn. state[0]: key blocks seen by this core, whose parity is the buffer.
    force: 'full' or 'masked' leaves only that form of a tile in the program, for the compiler to
    judge.
    """
    b, g, i = (pl.program_id(axis) for axis in range(3))
    q_block, size = q_ref.shape[0], k_buf.shape[-1]
    heads = q_ref.shape[1] // size
    first, stop = queries[FIRST, b, i], queries[STOP, b, i]
    parts = [slice(start, start + piece) for start in range(0, q_block, piece)]
    key_parts = [slice(start, start + kv_piece) for start in range(0, kv_block, kv_piece)]

    def copies(j, slot):
        return key_copies(b, g, j, slot, (k_hbm, v_hbm, kv_ids_hbm), (k_buf, v_buf, ids_buf), sems)

    def start(j, slot):
        for copy in copies(j, slot):
            copy.start()

    def wait(j, slot):
        for copy in copies(j, slot):
            copy.wait()

    def fast(slot, masked: bool):
        """Adds a tile to acc and total, at the fixed shift."""
        k, v = k_buf[slot], v_buf[slot]

        def group(number, _):
            pieces = [
                (number * unroll + h, part, some)
                for h in range(unroll)
                for part in parts
                for some in key_parts
            ]

            def scores(h, part, some):
                return product(k[some], head(q_ref, h, size)[part, :], 1, 1)

            def add(h, part, some, exps):
                acc[h, :, part] += product(v[some], exps, 0, 0)

            waiting, pending = [scores(*piece) for piece in pieces[:ahead]], None
            for n, (h, part, some) in enumerate(pieces):
                waiting += [scores(*piece) for piece in pieces[n + ahead : n + ahead + 1]]
                s = waiting.pop(0)
                if pending is not None:
                    add(*pending)
                shift = shift_ref[pl.ds(h, 1), part]
                # The bias joins the row first: as a part of the scores it delays the MXU.
                exps = jnp.exp2(s - (shift - bias[some, part] if masked else shift))
                total[h, :, part] += jnp.sum(exps.reshape(-1, SUBLANES, piece), axis=0)
                pending = h, part, some, exps.astype(v.dtype)
            add(*pending)
            return 0

        lax.fori_loop(0, heads // unroll, group, 0)

    def exact(slot):
        """Adds a tile by online softmax."""
        k, v = k_buf[slot], v_buf[slot]

        def one_head(h, _):
            for part in parts:
                s = product(k, head(q_ref, h, size)[part, :], 1, 1) + bias[:, part]
                old = best[h, :1, part]
                new = jnp.maximum(old, jnp.max(s, axis=0, keepdims=True))
                exps, kept = jnp.exp2(s - new), jnp.exp2(old - new)
                total[h, :, part] = total[h, :, part] * kept + jnp.sum(
                    exps.reshape(-1, SUBLANES, piece), axis=0
                )
                acc[h, :, part] = acc[h, :, part] * kept + product(v, exps.astype(v.dtype), 0, 0)
                best[h, :, part] = jnp.broadcast_to(new, (SUBLANES, piece))
            return 0

        lax.fori_loop(0, heads, one_head, 0)

    def prepare(slot, j):
        write_bias(bias, q_ids_ref, ids_buf.at[slot], meta[0] + i * q_block, meta[1] + j * kv_block)

    def visit(j, count):
        slot = count % 2
        next_i = jnp.where(j + 1 < stop, i, queries[NEXT, b, i + 1])
        next_j = jnp.where(
            j + 1 < stop, j + 1, queries[FIRST, b, jnp.minimum(next_i, pl.num_programs(2) - 1)]
        )
        wait(j, slot)

        @pl.when(next_i < pl.num_programs(2))
        def _():
            start(next_j, 1 - slot)

        full = is_full(queries, keys, meta, b, i, j, q_block, kv_block)
        seen = is_visited(queries, keys, meta, b, i, j, q_block, kv_block)
        if force is not None:
            fast(slot, force == "masked")
            return count + 1

        @pl.when(full)
        def _():
            fast(slot, masked=False)

        @pl.when(seen & ~full)
        def _():
            prepare(slot, j)
            fast(slot, masked=True)

        return count + 1

    def finish(shift_of):
        def one_head(h, _):
            for part in parts:
                row_sum = jnp.sum(total[h, :, part], axis=0, keepdims=True)
                share = jnp.where(row_sum > 0, 1 / row_sum, 0.0)
                head(o_ref, h, size)[part, :] = (acc[h, :, part] * share).T.astype(o_ref.dtype)
                lse = (shift_of(h, part) + jnp.log2(row_sum)) * LN2
                lse_ref[pl.ds(h, 1), part] = jnp.where(row_sum > 0, lse, NO_KEY)
            return 0

        lax.fori_loop(0, heads, one_head, 0)

    @pl.when((i == 0) & (queries[NEXT, b, 0] < pl.num_programs(2)))
    def _():
        state[0] = 0
        start(queries[FIRST, b, queries[NEXT, b, 0]], 0)

    acc[...] = jnp.zeros_like(acc)
    total[...] = jnp.zeros_like(total)

    @pl.when(first < stop)
    def _():
        state[0] = lax.fori_loop(first, stop, visit, state[0])

    finish(lambda h, part: shift_ref[pl.ds(h, 1), part])
    if force is not None:
        return
    row_sums = jnp.sum(total[...], axis=1)
    vanished = jnp.max(jnp.where((row_sums < VANISHED) & (shift_ref[...] > SURE), 1.0, 0.0)) > 0

    @pl.when(vanished & (first < stop))
    def _():
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        best[...] = jnp.full_like(best, NO_KEY)

        def again(j, _):
            start(j, 2)
            wait(j, 2)
            prepare(2, j)
            exact(2)
            return 0

        lax.fori_loop(first, stop, again, 0)
        finish(lambda h, part: best[h, :1, part])


def causal_macs(q_BLX, k_BMY) -> int:
    """Of one product of all queries with the keys that are not after them."""
    return q_BLX.size * k_BMY.shape[1] // 2


@once("heads", "blocks", "vmem_bytes", "force")
def forward(
    q_BLX,
    shift_BGPL,
    q_ids_B1L,
    k_BMY,
    v_BMY,
    kv_ids_BJ1C,
    tiles: Tiles,
    heads: int,
    blocks,
    vmem_bytes: int,
    force: str | None = None,
):
    """softmax(q k^T / log2 e) v of scaled queries, and its log-sum-exp.

    Args:
      q_BLX: [B, L, G x heads x H], times scale x log2 e. shift_BGPL: float32 [B, G, heads, L].
      q_ids_B1L, kv_ids_BJ1C: segment ids, [B, 1, L] and [B, key blocks, 1, block]. k_BMY, v_BMY:
      [B, M, G x H]. tiles: of blocks.q and blocks.kv.
    Returns out [B, L, G x heads x H] and natural log-sum-exp, float32 [B, G, heads, L].
    """
    batch, length, _ = q_BLX.shape
    groups = shift_BGPL.shape[1]
    size = k_BMY.shape[-1] // groups
    q_spec, row_spec, ids_spec = query_specs(blocks.q, heads, size)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    body = functools.partial(_forward, **blocks.of_kernel, force=force)
    vmem = lambda *shape, dtype=jnp.float32: pltpu.VMEM(shape, dtype)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, groups, length // blocks.q),
            in_specs=[q_spec, row_spec, ids_spec, anywhere, anywhere, anywhere],
            out_specs=[q_spec, row_spec],
            scratch_shapes=[
                vmem(3, blocks.kv, size, dtype=k_BMY.dtype),
                vmem(3, blocks.kv, size, dtype=v_BMY.dtype),
                vmem(3, 1, blocks.kv, dtype=jnp.int32),
                vmem(heads, size, blocks.q), vmem(heads, SUBLANES, blocks.q),
                vmem(heads, SUBLANES, blocks.q), vmem(blocks.kv, blocks.q),
                pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA((3, 3)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q_BLX.shape, v_BMY.dtype),
                   jax.ShapeDtypeStruct(shift_BGPL.shape, jnp.float32)],
        cost_estimate=cost(q_BLX, q_BLX, k_BMY, v_BMY, macs=2 * causal_macs(q_BLX, k_BMY)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel",
                                                                  "arbitrary"),
                                                                  vmem_limit_bytes=vmem_bytes),
        interpret=interpret.params(),
        name="attention_forward",
    )(tiles.offsets, tiles.queries, tiles.keys, q_BLX, shift_BGPL, q_ids_B1L, k_BMY, v_BMY,
    kv_ids_BJ1C)  # fmt: skip
