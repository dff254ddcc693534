"""Gradient of the grouped product's matrices: x^T dy over each expert's rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.cost import cost
from pallas_kernels.grouped_matmul.gather import Gathered, GatherStream
from pallas_kernels.grouped_matmul.kernel import CHUNK, chunks, product
from pallas_kernels.grouped_matmul.shapes import GradientBlocks
from pallas_kernels.grouped_matmul.sweep import RowStream
from pallas_kernels.grouped_matmul.tiles import RowTiles, Steps, row_steps
from pallas_kernels.once import once


@once("blocks")
def weight_gradient(
    x_RK: jax.Array | Gathered,
    dy_RN: jax.Array | Gathered,
    tiles: RowTiles,
    *,
    blocks: GradientBlocks,
) -> jax.Array:
    """dw_e = sum over the rows r of expert e of x_r^T dy_r, [E, K, N]; zeros for an expert without
    rows. Summed in float32.

    Rows between experts inside the used tiles must be zeros in both; tiles past them are not read.
    A unit is filled by as many rows at a time as it is wide, so an expert's last rows, up to
    blocks.granule tiles, cost what those cost.
    """
    operands, tile = [x_RK, dy_RN], tiles.tile
    dtype, num_experts, most = x_RK.dtype, len(tiles.sizes), blocks.size
    steps, num_steps = row_steps(tiles, most, join=False, visit_empty=True)
    cuts = blocks.rows, blocks.columns
    widths = [operand.shape[1] // cut for operand, cut in zip(operands, cuts, strict=True)]
    inputs, specs, scratch = [], [], []
    for operand, cut, width in zip(operands, cuts, widths, strict=True):
        if isinstance(operand, Gathered):
            arrays, operand_specs, buffers = operand.plan(tile, most, blocks=cut, unpacked=False)
            if operand is dy_RN:  # which is taken once for each part of x: unpacked for the first
                buffers.append(pltpu.VMEM((most * tile, width + blocks.gap), dtype))
        else:
            arrays, operand_specs = [operand], [pl.BlockSpec(memory_space=pl.ANY)]
            buffers = [
                pltpu.VMEM((2, most * tile, width + blocks.gap), dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ]
        inputs.append(arrays)
        specs.append(operand_specs)
        scratch.append(buffers)
    sums = [
        pltpu.VMEM(tuple(widths), jnp.float32),
        pltpu.VMEM(tuple(widths), dtype),
        pltpu.SemaphoreType.DMA(()),
    ]
    (num_rows, height), width = x_RK.shape, dy_RN.shape[1]
    result = jax.ShapeDtypeStruct((num_experts, height, width), dtype)
    return pl.pallas_call(
        functools.partial(
            _kernel, blocks, operands, tile, [len(i) for i in inputs], [len(s) for s in scratch]
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Steps._fields),
            grid=(blocks.rows * blocks.columns, num_steps),
            in_specs=[*specs[0], *specs[1]],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[*scratch[0], *scratch[1], *sums],
        ),
        out_shape=result,
        cost_estimate=cost(*operands, result, macs=num_rows * height * width),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_bytes,
            disable_bounds_checks=True,
        ),
        interpret=interpret.params(),
        name="grouped_weight_gradient",
    )(*steps, *inputs[0], *inputs[1])


def _kernel(blocks, operands, tile, num_inputs, num_scratch, *refs):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    steps = Steps(*take(len(Steps._fields)))
    inputs, (dw_hbm,) = [take(n) for n in num_inputs], take(1)
    scratch, (sums, out, out_semaphore) = [take(n) for n in num_scratch], take(3)
    block, step = pl.program_id(0), pl.program_id(1)
    row_block, column_block = block // blocks.columns, block % blocks.columns
    num_steps = pl.num_programs(1)
    bodies = blocks.bodies
    counts = [count for body in bodies for count in body]
    parts = zip(
        operands,
        inputs,
        scratch,
        (row_block, column_block),
        (blocks.rows, blocks.columns),
        strict=True,
    )
    loads = [_stream(*part, steps, tile, blocks.gap) for part in parts]
    moving = [load for load in loads if isinstance(load, RowStream)]
    gathered = [load for load in loads if isinstance(load, GatherStream)]
    height, width = sums.shape

    def store(expert):
        there = dw_hbm.at[
            expert, pl.ds(row_block * height, height), pl.ds(column_block * width, width)
        ]
        return pltpu.make_async_copy(out, there, out_semaphore)

    @pl.when(step == 0)
    def _():
        for load in moving:
            load.start(0, counts)
        for load in gathered:
            load.start_first(0, 0)

    @pl.when(step + 1 < num_steps)
    def _():
        for load in moving:
            load.start(step + 1, counts)

    expert, count = steps.expert[step], steps.count[step]
    first = (step == 0) | (expert != steps.expert[jnp.maximum(step - 1, 0)])
    last = (step == num_steps - 1) | (expert != steps.expert[jnp.minimum(step + 1, num_steps - 1)])

    pl.when(last & (steps.run[step] > 0))(lambda: store(0).wait())
    for load in gathered:
        load.turn(step, step % 2, step + 1 < num_steps)
    for load in loads:
        load.wait(step, counts)

    def add(body, target):
        x, dy = loads
        for load in moving:
            for n in range(body[0], body[-1]):
                pl.when(count <= n)(functools.partial(load.clear, step % 2, n))
        parts = chunks(height, blocks.chunk)
        for n, down in enumerate(parts):
            for load in gathered:
                load.ahead(step, step % 2, body, n, len(parts))
            xt = _columns(x, step, body, down).T
            for across in chunks(width, CHUNK):
                partial = product(
                    xt, _columns(dy, step, body, across, again=n > 0), transposed=False
                )
                target[down, across] = (jnp.where(first, 0.0, sums[down, across]) + partial).astype(
                    target.dtype
                )

    for body in bodies:
        pl.when(last & (count >= body[0]) & (count <= body[-1]))(functools.partial(add, body, out))
    if blocks.only is None:
        pl.when(jnp.logical_not(last))(
            functools.partial(add, range(blocks.size, blocks.size + 1), sums)
        )

    @pl.when(count == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    pl.when(last)(lambda: store(expert).start())

    @pl.when(step == num_steps - 1)
    def _():
        store(0).wait()
        for load in gathered:
            load.wait_last(step)


def _stream(
    operand, hbm, buffers, block, cut: int, steps: Steps, tile: int, gap: int
) -> RowStream | GatherStream:
    """Rows of the block-th of `cut` parts of an operand's columns."""
    if isinstance(operand, Gathered):
        return operand.stream(hbm, buffers, steps, tile, block=block, blocks=cut)
    return RowStream(*hbm, *buffers, steps, block, tile, gap)


def _columns(
    load: RowStream | GatherStream, step, body: range, part: slice, *, again: bool = False
):
    """Columns of a step's rows, [body[-1] * tile, C]; again: they were requested before."""
    if isinstance(load, RowStream):
        return load.view(step % 2, body[-1])[:, part]
    if load.rows is None:
        return load.columns(step, body, part)
    if not again:
        load.rows[: body[-1] * load.tile, part] = load.columns(step, body, part)
    return load.rows[: body[-1] * load.tile, part]
