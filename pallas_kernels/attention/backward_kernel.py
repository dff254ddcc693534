"""Attention for TPU, backward: the five products of a tile in one pass, over the same tiles as the
forward kernel.

A query block keeps the gradient of its queries while it walks over key blocks; the gradients of
keys and values are summed in HBM in float32: a block is fetched, all heads that share it add to it,
it goes back. Fetching the next one waits until the one before is back. Where they stand transposed,
head size x keys, their products fill a MXU of 256, of which head size x queries fill a
half.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.attention.kernel import (
    LN2,
    causal_macs,
    head,
    is_full,
    is_visited,
    key_copies,
    product,
    query_specs,
    write_bias,
)
from pallas_kernels.attention.tiles import FIRST, NEXT, STOP, Tiles
from pallas_kernels.cost import cost
from pallas_kernels.once import once

# The kernel's state: key blocks seen, the buffer of the sums, whether the next sums are on their
# way in, and for each buffer whether it is on its way out.
SEEN, SLOT, COMING, LEAVING = range(4)


def _backward(
    meta, queries, keys, q_ref, do_ref, lse_ref, delta_ref, q_ids_ref, k_hbm, v_hbm, kv_ids_hbm, _,
    __, dq_ref, dk_hbm, dv_hbm,
    k_buf, v_buf, ids_buf, dk_buf, dv_buf, dq_acc, bias, state, in_sems, sum_sems, *,
    kv_block: int, piece: int, kv_piece: int, unroll: int, ahead: int, transposed: bool,
    force: str | None,
):  # fmt: skip
    b, g, i = (pl.program_id(axis) for axis in range(3))
    q_block, size = q_ref.shape[0], k_buf.shape[-1]
    heads = q_ref.shape[1] // size
    first, stop = queries[FIRST, b, i], queries[STOP, b, i]
    num_blocks = pl.num_programs(2)
    parts = [slice(start, start + piece) for start in range(0, q_block, piece)]
    key_parts = [slice(start, start + kv_piece) for start in range(0, kv_block, kv_piece)]

    def sum_place(ref, j):
        rows, columns = pl.ds(j * kv_block, kv_block), pl.ds(g * size, size)
        return ref.at[b, columns, rows] if transposed else ref.at[b, rows, columns]

    def inputs(j, slot):
        return key_copies(
            b, g, j, slot, (k_hbm, v_hbm, kv_ids_hbm), (k_buf, v_buf, ids_buf), in_sems
        )

    def sums(j, slot, *, out: bool):
        for ref, buf, n in ((dk_hbm, dk_buf, 0), (dv_hbm, dv_buf, 1)):
            ends = (buf.at[slot], sum_place(ref, j)) if out else (sum_place(ref, j), buf.at[slot])
            yield pltpu.make_async_copy(*ends, sum_sems.at[slot, n])

    def start(copies):
        for copy in copies:
            copy.start()

    def wait(copies):
        for copy in copies:
            copy.wait()

    def settle(slot):
        """Waits until the sums that last left a buffer are in HBM."""

        @pl.when(state[LEAVING + slot] == 1)
        def _():
            wait(sums(0, slot, out=True))  # waiting looks at the size alone
            state[LEAVING + slot] = 0

    def add_tile(slot, sum_slot, masked: bool, between):
        """The tile's share of all three gradients; `between` runs once, after the first group of
        heads.
        """
        k, v = k_buf[slot], v_buf[slot]
        dk, dv = dk_buf.at[sum_slot], dv_buf.at[sum_slot]

        def group(number, _):
            pieces = [
                (number * unroll + h, part, some)
                for h in range(unroll)
                for part in parts
                for some in key_parts
            ]

            def scores(h, part, some):
                return product(k[some], head(q_ref, h, size)[part, :], 1, 1), product(
                    v[some], head(do_ref, h, size)[part, :], 1, 1
                )

            def add(h, part, some, probs, dscores):
                q, do = head(q_ref, h, size)[part, :], head(do_ref, h, size)[part, :]
                if transposed:
                    dv[:, some] += product(do, probs, 0, 1)
                    dk[:, some] += product(q, dscores, 0, 1)
                else:
                    dv[some] += product(probs, do, 1, 0)
                    dk[some] += product(dscores, q, 1, 0)
                dq_acc[h, :, part] += product(k[some], dscores, 0, 0)

            waiting, pending = [scores(*piece) for piece in pieces[:ahead]], None
            for n, (h, part, some) in enumerate(pieces):
                waiting += [scores(*piece) for piece in pieces[n + ahead : n + ahead + 1]]
                s, dprobs = waiting.pop(0)
                if pending is not None:
                    add(*pending)
                shift = lse_ref[pl.ds(h, 1), part]
                # The bias joins the row first: as a part of the scores it delays the MXU (v6e:
                # half the rate).
                probs = jnp.exp2(s - (shift - bias[some, part] if masked else shift))
                dscores = probs * (dprobs - delta_ref[pl.ds(h, 1), part])
                pending = h, part, some, probs.astype(v.dtype), dscores.astype(k.dtype)
            add(*pending)
            pl.when(number == 0)(between)
            return 0

        lax.fori_loop(0, heads // unroll, group, 0)

    def visit(j, _):
        slot, sum_slot = state[SEEN] % 2, state[SLOT]
        more = (j + 1 < stop) | (queries[NEXT, b, i + 1] < num_blocks)
        next_i = jnp.minimum(queries[NEXT, b, i + 1], num_blocks - 1)
        next_j = jnp.where(j + 1 < stop, j + 1, queries[FIRST, b, next_i])
        moves = more & (next_j != j)
        wait(inputs(j, slot))
        pl.when(more)(lambda: start(inputs(next_j, 1 - slot)))

        @pl.when(state[COMING] == 1)
        def _():
            wait(sums(j, sum_slot, out=False))
            state[COMING] = 0

        @pl.when(~moves)
        def _():
            settle(1 - sum_slot)

        def fetch_next():
            @pl.when(moves)
            def _():
                settle(1 - sum_slot)
                start(sums(next_j, 1 - sum_slot, out=False))

        full = is_full(queries, keys, meta, b, i, j, q_block, kv_block)
        seen = is_visited(queries, keys, meta, b, i, j, q_block, kv_block)
        if force is None:

            @pl.when(full)
            def _():
                add_tile(slot, sum_slot, False, fetch_next)

            @pl.when(seen & ~full)
            def _():
                write_bias(
                    bias, q_ids_ref, ids_buf.at[slot], meta[0] + i * q_block, meta[1] + j * kv_block
                )
                add_tile(slot, sum_slot, True, fetch_next)

            pl.when(~seen)(fetch_next)
        else:
            add_tile(slot, sum_slot, force == "masked", fetch_next)

        @pl.when(moves | ~more)
        def _():
            start(sums(j, sum_slot, out=True))
            state[LEAVING + sum_slot] = 1

        @pl.when(moves)
        def _():
            state[COMING] = 1
            state[SLOT] = 1 - sum_slot

        pl.when(~more)(lambda: settle(sum_slot))
        state[SEEN] += 1
        return 0

    @pl.when((i == 0) & (queries[NEXT, b, 0] < num_blocks))
    def _():
        for n in range(LEAVING + 2):
            state[n] = 0
        j = queries[FIRST, b, queries[NEXT, b, 0]]
        start(inputs(j, 0))
        start(sums(j, 0, out=False))
        state[COMING] = 1

    dq_acc[...] = jnp.zeros_like(dq_acc)

    @pl.when(first < stop)
    def _():
        lax.fori_loop(first, stop, visit, 0)

    def write(h, _):
        head(dq_ref, h, size)[...] = (dq_acc[h] * LN2).T.astype(dq_ref.dtype)
        return 0

    lax.fori_loop(0, heads, write, 0)


@once("heads", "blocks", "vmem_bytes", "force")
def backward(
    q_BLX, do_BLX, lse_BGPL, delta_BGPL, q_ids_B1L, k_BMY, v_BMY, kv_ids_BJ1C, tiles: Tiles,
    heads: int, blocks, vmem_bytes: int,
    force: str | None = None,
):  # fmt: skip
    """Gradients of kernel.forward's q, k and v: [B, L, G x heads x H] in the type of q, and twice
    float32 [B, M, G x H].

    lse_BGPL: log-sum-exp in units of log2. delta_BGPL: sum over a head of output x its gradient,
    less the gradient of the natural log-sum-exp. Others as there.
    """
    batch, length, _ = q_BLX.shape
    groups = lse_BGPL.shape[1]
    size = k_BMY.shape[-1] // groups
    q_spec, row_spec, ids_spec = query_specs(blocks.q, heads, size)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    body = functools.partial(
        _backward, **blocks.of_kernel, transposed=blocks.transposed, force=force
    )
    vmem = lambda *shape, dtype=jnp.float32: pltpu.VMEM(shape, dtype)
    sums, axes = (
        ((size, blocks.kv), (0, 2, 1)) if blocks.transposed else ((blocks.kv, size), (0, 1, 2))
    )
    zeros = jnp.zeros([k_BMY.shape[axis] for axis in axes], jnp.float32)
    dq, dk, dv = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, groups, length // blocks.q),
            in_specs=[q_spec, q_spec, row_spec, row_spec, ids_spec, *[anywhere] * 5],
            out_specs=[q_spec, anywhere, anywhere],
            scratch_shapes=[
                vmem(2, blocks.kv, size, dtype=k_BMY.dtype),
                vmem(2, blocks.kv, size, dtype=v_BMY.dtype),
                vmem(2, 1, blocks.kv, dtype=jnp.int32),
                vmem(2, *sums), vmem(2, *sums), vmem(heads, size, blocks.q),
                vmem(blocks.kv, blocks.q),
                pltpu.SMEM((LEAVING + 2,), jnp.int32), pltpu.SemaphoreType.DMA((2, 3)),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q_BLX.shape, q_BLX.dtype),
                   *[jax.ShapeDtypeStruct(zeros.shape, zeros.dtype)] * 2],
        input_output_aliases={11: 1, 12: 2},
        cost_estimate=cost(q_BLX, q_BLX, q_BLX, k_BMY, v_BMY, zeros, zeros,
                           macs=5 * causal_macs(q_BLX, k_BMY)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel",
                                                                  "arbitrary"),
                                                                  vmem_limit_bytes=vmem_bytes),
        interpret=interpret.params(),
        name="attention_backward",
    )(
        tiles.offsets, tiles.queries, tiles.keys, q_BLX, do_BLX, lse_BGPL, delta_BGPL, q_ids_B1L,
        k_BMY, v_BMY, kv_ids_BJ1C, zeros, zeros
    )  # fmt: skip
    return dq, dk.transpose(axes) * LN2, dv.transpose(axes)
