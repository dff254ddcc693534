"""Gradient of the grouped product's matrices: x^T dy over each expert's rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.grouped_matmul.shapes import GradientBlocks
from pallas_kernels.grouped_matmul.sweep import RowStream
from pallas_kernels.grouped_matmul.tiles import RowTiles, Steps, row_steps


def weight_gradient(x: jax.Array, dy: jax.Array, tiles: RowTiles, *, blocks: GradientBlocks) -> jax.Array:
    """dw_e = sum over the rows r of expert e of x_r^T dy_r, [E, K, N]; zeros for an expert without rows. Summed in float32.

    x: [R, K], dy: [R, N]. Rows between experts inside the used tiles must be zeros in both; tiles past them are not read.
    A 256-wide unit is filled by 256 rows at a time: there an odd number of tiles of 128 costs what the next even one does.
    """
    rows = [x, dy]
    tile = tiles.tile
    steps, num_steps = row_steps(tiles, blocks.size, join=False, visit_empty=True)
    widths = [rows[0].shape[1] // blocks.rows, rows[1].shape[1] // blocks.columns]
    num_experts = len(tiles.sizes)
    return pl.pallas_call(
        functools.partial(_kernel, blocks, tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Steps._fields),
            grid=(blocks.rows * blocks.columns, num_steps),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                *(pltpu.VMEM((2, blocks.size * tile, width), x.dtype) for width in (widths[0], widths[1] + blocks.gap)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM(tuple(widths), jnp.float32),
                pltpu.VMEM(tuple(widths), x.dtype),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_experts, rows[0].shape[1], rows[1].shape[1]), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_bytes),
        interpret=interpret.params(),
        name="grouped_weight_gradient",
    )(*steps, *rows)


def _kernel(blocks, tile, *refs):
    steps, (x_hbm, dy_hbm, dw_hbm, x_buffer, dy_buffer, x_semaphore, dy_semaphore, sums, out, out_semaphore) = Steps(*refs[:5]), refs[5:]
    block, step = pl.program_id(0), pl.program_id(1)
    row_block, column_block = block // blocks.columns, block % blocks.columns
    num_steps = pl.num_programs(1)
    counts = range(1, blocks.size + 1) if blocks.only is None else (blocks.only,)
    loads = [
        RowStream(x_hbm, x_buffer, x_semaphore, steps, row_block, tile),
        RowStream(dy_hbm, dy_buffer, dy_semaphore, steps, column_block, tile, blocks.gap),
    ]
    height, width = sums.shape

    def store(expert):
        there = dw_hbm.at[expert, pl.ds(row_block * height, height), pl.ds(column_block * width, width)]
        return pltpu.make_async_copy(out, there, out_semaphore)

    @pl.when(step == 0)
    def _():
        for load in loads:
            load.start(0, counts)

    @pl.when(step + 1 < num_steps)
    def _():
        for load in loads:
            load.start(step + 1, counts)

    expert, count = steps.expert[step], steps.count[step]
    first = (step == 0) | (expert != steps.expert[jnp.maximum(step - 1, 0)])
    last = (step == num_steps - 1) | (expert != steps.expert[jnp.minimum(step + 1, num_steps - 1)])

    @pl.when(last & (steps.run[step] > 0))
    def _():
        store(0).wait()

    for load in loads:
        load.wait(step, counts)

    def add(size, target):
        x, dy = (load.view(step % 2, size) for load in loads)
        for down in _chunks(height, blocks.chunk):
            xt = x[:, down].T
            for across in _chunks(width, 256):
                partial = jax.lax.dot_general(
                    xt,
                    dy[:, across],
                    (((1,), (0,)), ((), ())),
                    precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
                    preferred_element_type=jnp.float32,
                )
                target[down, across] = (jnp.where(first, 0.0, sums[down, across]) + partial).astype(target.dtype)

    for size in counts:
        pl.when(last & (count == size))(functools.partial(add, size, out))
    if blocks.only is None:
        pl.when(jnp.logical_not(last))(functools.partial(add, blocks.size, sums))

    @pl.when(count == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(last)
    def _():
        store(expert).start()

    @pl.when(step == num_steps - 1)
    def _():
        store(0).wait()


def _chunks(width: int, chunk: int):
    return [slice(start, min(start + chunk, width)) for start in range(0, width, chunk)]
