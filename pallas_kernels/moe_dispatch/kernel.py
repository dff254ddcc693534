"""Rows as words (grouped_matmul/rows.py) on their way: copied one by one to where they are sent
from, and in the combine each token's fetched and added in float32, with no [T, K, D] in HBM.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.cost import cost
from pallas_kernels.grouped_matmul import rows
from pallas_kernels.moe_dispatch.shapes import Blocks
from pallas_kernels.once import once

# of a v4 or v5p chip; elsewhere one core takes both halves of the tokens, one after the other
CORES = 2


@once("width", "dtype", "blocks")
def combine(
    words_R1W: jax.Array,
    slot_TK: jax.Array,
    weights_TK: jax.Array | None,
    *,
    width: int,
    dtype,
    blocks: Blocks,
) -> jax.Array:
    """y_t = sum_k weights_tk row(slot_tk), [T, width] in dtype; without weights the plain sum.

    words_R1W: rows as rows.to_rows makes them of [R, width] in dtype. slot_TK: int32, -1: nothing
    to add, and no row is read for it that counts.
    """
    num_tokens, per_token = slot_TK.shape
    block = blocks.tokens
    steps = pl.cdiv(num_tokens, block * CORES)
    by_block = lambda x, empty: jnp.pad(
        x, ((0, steps * CORES * block - num_tokens), (0, 0)), constant_values=empty
    ).reshape(-1, 1, block * per_token)
    scalars = [by_block(slot_TK, -1)] * 2
    last = steps * CORES - 1
    here = lambda core, step: (core * steps + step, 0, 0)
    ahead = lambda core, step: (jnp.minimum(core * steps + step + 1, last), 0, 0)
    in_specs = [
        pl.BlockSpec((1, 1, block * per_token), index, memory_space=pltpu.SMEM)
        for index in (here, ahead)
    ]
    if weights_TK is not None:
        scalars.append(by_block(weights_TK.astype(jnp.float32), 0.0))
        in_specs.append(pl.BlockSpec((1, 1, block * per_token), here, memory_space=pltpu.SMEM))
    words, result = words_R1W.shape[2], jax.ShapeDtypeStruct((steps * CORES * block, width), dtype)
    y_TD = pl.pallas_call(
        functools.partial(_combine_kernel, per_token=per_token, weighted=weights_TK is not None),
        grid=(CORES, steps),
        in_specs=[*in_specs, pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((block, width), lambda core, step: (core * steps + step, 0)),
        out_shape=result,
        cost_estimate=cost(jax.ShapeDtypeStruct((slot_TK.size, words), words_R1W.dtype), result),
        scratch_shapes=[
            pltpu.VMEM((2, block * per_token, 1, words), words_R1W.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((block, 1, words), words_R1W.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_bytes,
            disable_bounds_checks=True,
        ),
        interpret=interpret.params(),
        name="combine",
    )(*scalars, words_R1W)
    return y_TD[:num_tokens]


def _combine_kernel(slots, next_slots, *refs, per_token: int, weighted: bool):
    weights, (words_hbm, out, buffer, semaphore, sums) = (
        (refs[0], refs[1:]) if weighted else (None, refs)
    )
    step, num_steps = pl.program_id(1), pl.num_programs(1)
    block = out.shape[0]
    now = step % 2

    def fetch(table, half, t):
        for k in range(per_token):
            pair = t * per_token + k
            # One without a row fetches some row, so that a block is always the same number of bytes
            # to wait for.
            there = words_hbm.at[jnp.maximum(table[0, 0, pair], 0)]
            pltpu.make_async_copy(there, buffer.at[half, pair], semaphore.at[half]).start()

    def wait(half):
        pltpu.make_async_copy(buffer.at[half], buffer.at[half], semaphore.at[half]).wait()

    @pl.when(step == 0)
    def _():
        jax.lax.fori_loop(0, block, lambda t, _: fetch(slots, now, t), None)

    wait(now)

    def token(t, _):
        # The next block's copies are issued between this one's sums: both would take the same time
        # one after the other. The last block has no next one: what it fetches instead is thrown
        # away.
        fetch(next_slots, 1 - now, t)
        total = None
        for k in range(per_token):
            pair = t * per_token + k
            words = buffer[now, pair]
            columns = rows.halves(jnp.where(slots[0, 0, pair] >= 0, words, jnp.zeros_like(words)))
            if weighted:
                columns = [weights[0, 0, pair] * c for c in columns]
            total = (
                columns if total is None else [a + b for a, b in zip(total, columns, strict=True)]
            )
        sums[t] = rows.join(total)

    jax.lax.fori_loop(0, block, token, None)
    rows.unpack_rows(sums, out)

    @pl.when(step == num_steps - 1)
    def _():
        wait(1 - now)


COPIED_ROWS = 64  # of a step; those of two steps are in flight


@once()
def copy_rows(words_R1W: jax.Array, source_S: jax.Array) -> jax.Array:
    """Row source_s of the words in place s, [S, 1, W]; unwritten memory where source is -1."""
    num_rows = len(source_S)
    result = jax.ShapeDtypeStruct((num_rows, *words_R1W.shape[1:]), words_R1W.dtype)
    steps = pl.cdiv(num_rows, COPIED_ROWS * CORES)
    source = jnp.pad(
        source_S, (0, steps * CORES * COPIED_ROWS - num_rows), constant_values=-1
    ).reshape(-1, 1, COPIED_ROWS)
    table = lambda step_of: pl.BlockSpec(
        (1, 1, COPIED_ROWS),
        lambda core, step: (core * steps + step_of(step), 0, 0),
        memory_space=pltpu.SMEM,
    )
    now = table(lambda step: jnp.minimum(step, steps - 1))
    before = table(lambda step: jnp.maximum(step - 1, 0))
    return pl.pallas_call(
        functools.partial(_copy_rows_kernel, steps),
        grid=(CORES, steps + 1),
        in_specs=[now, before, pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=result,
        cost_estimate=cost(result, result),
        scratch_shapes=[pltpu.SemaphoreType.DMA((2,))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True
        ),
        interpret=interpret.params(),
        name="copy_rows",
    )(source, source, words_R1W)


def _copy_rows_kernel(steps, source, source_before, words_hbm, out_hbm, semaphore):
    """Starts the copies of a step and waits for those of the step before."""
    core, step = pl.program_id(0), pl.program_id(1)

    def each(table, step, do):
        def row(n, _):
            copy = pltpu.make_async_copy(
                words_hbm.at[jnp.maximum(table[0, 0, n], 0)],
                out_hbm.at[(core * steps + step) * COPIED_ROWS + n],
                semaphore.at[step % 2],
            )
            pl.when(table[0, 0, n] >= 0)(lambda: do(copy))

        jax.lax.fori_loop(0, COPIED_ROWS, row, None)

    pl.when(step < steps)(lambda: each(source, step, lambda copy: copy.start()))
    pl.when(step > 0)(lambda: each(source_before, step - 1, lambda copy: copy.wait()))


@once("shape", "dtype", "zeros", "name")
def unwritten(shape, dtype, after_N, *, zeros: int = 0, name: str) -> jax.Array:
    """An array of unknown contents, made once `after_N` is and no other: jax.lax.empty moves out of
    loops, which then copy it. `zeros` rows of zeros after.

    Two of one name and one `after_N` are one.
    """

    def kernel(after, out, *scratch):
        if scratch:
            values, semaphore = scratch
            values[...] = jnp.zeros_like(values)
            copy = pltpu.make_async_copy(values, out.at[pl.ds(shape[0], zeros)], semaphore)
            copy.start()
            copy.wait()

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((shape[0] + zeros, *shape[1:]), dtype),
        cost_estimate=cost(),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[pltpu.VMEM((zeros, *shape[1:]), dtype), pltpu.SemaphoreType.DMA(())]
        if zeros
        else [],
        interpret=interpret.params(),
        name=name,
    )(after_N)
