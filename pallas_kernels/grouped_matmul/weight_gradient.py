"""Gradient of the grouped product's matrices: x^T dy over each expert's rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.cost import cost
from pallas_kernels.grouped_matmul.gather import Gathered, GatherStream
from pallas_kernels.grouped_matmul.kernel import CHUNK, chunks, product
from pallas_kernels.grouped_matmul.shapes import GradientBlocks
from pallas_kernels.grouped_matmul.streams import RowStream
from pallas_kernels.grouped_matmul.tiles import RowTiles, Steps, row_steps
from pallas_kernels.once import once


class _Scratch(NamedTuple):
    """loads: what the streams of x and of dy take. total: sums of an expert's steps so far,
    float32. out: with its last step's, on their way to HBM.
    """

    loads: list[list]
    total: jax.Ref
    out: jax.Ref
    semaphore: jax.Ref


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
    inputs, specs, loads = [], [], []
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
        loads.append(buffers)
    scratch = _Scratch(
        loads,
        total=pltpu.VMEM(tuple(widths), jnp.float32),
        out=pltpu.VMEM(tuple(widths), dtype),
        semaphore=pltpu.SemaphoreType.DMA(()),
    )
    (num_rows, height), width = x_RK.shape, dy_RN.shape[1]
    result = jax.ShapeDtypeStruct((num_experts, height, width), dtype)
    return pl.pallas_call(
        functools.partial(_kernel, blocks, operands, tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks.rows * blocks.columns, num_steps),
            in_specs=[specs],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[scratch],
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
    )(steps, inputs)


def _kernel(blocks, operands, tile, steps, inputs, dw, scratch: _Scratch):
    block, step = pl.program_id(0), pl.program_id(1)
    part = block // blocks.columns, block % blocks.columns
    num_steps = pl.num_programs(1)
    cuts = blocks.rows, blocks.columns
    loads = [
        _stream(*own, steps, tile, blocks.gap)
        for own in zip(operands, inputs, scratch.loads, part, cuts, strict=True)
    ]
    _Gradient(blocks, steps, loads, dw, scratch, part, step, num_steps).run()


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """A step's rows, of one expert, for one block of the gradient."""

    blocks: GradientBlocks
    steps: Steps
    loads: list[RowStream | GatherStream]  # of x and of dy
    dw: jax.Ref
    scratch: _Scratch
    part: tuple[jax.Array, jax.Array]  # the block of rows and that of columns
    step: jax.Array
    num_steps: jax.Array

    @property
    def moving(self) -> list[RowStream]:
        return [load for load in self.loads if isinstance(load, RowStream)]

    @property
    def gathered(self) -> list[GatherStream]:
        return [load for load in self.loads if isinstance(load, GatherStream)]

    @property
    def counts(self) -> list[int]:
        return [count for body in self.blocks.bodies for count in body]

    def run(self):
        step, steps, scratch = self.step, self.steps, self.scratch
        self.start_loads()
        expert, count = steps.expert[step], steps.count[step]
        first = (step == 0) | (expert != steps.expert[jnp.maximum(step - 1, 0)])
        last = (step == self.num_steps - 1) | (
            expert != steps.expert[jnp.minimum(step + 1, self.num_steps - 1)]
        )

        pl.when(last & (steps.run[step] > 0))(lambda: self.store(0).wait())
        self.wait_loads()
        add = functools.partial(self.add, first, count)
        for body in self.blocks.bodies:
            pl.when(last & (count >= body[0]) & (count <= body[-1]))(
                functools.partial(add, body, scratch.out)
            )
        if self.blocks.only is None:
            whole = range(self.blocks.size, self.blocks.size + 1)
            pl.when(jnp.logical_not(last))(functools.partial(add, whole, scratch.total))

        @pl.when(count == 0)
        def _():
            scratch.out[...] = jnp.zeros_like(scratch.out)

        pl.when(last)(lambda: self.store(expert).start())

        @pl.when(step == self.num_steps - 1)
        def _():
            self.store(0).wait()
            for load in self.gathered:
                load.wait_last(step)

    def start_loads(self):
        """The first step starts its own and the next one's, every other the next one's."""

        @pl.when(self.step == 0)
        def _():
            for load in self.moving:
                load.start(0, self.counts)
            for load in self.gathered:
                load.start_first(0, 0)

        @pl.when(self.step + 1 < self.num_steps)
        def _():
            for load in self.moving:
                load.start(self.step + 1, self.counts)

    def wait_loads(self):
        for load in self.gathered:
            load.turn(self.step, self.step % 2, self.step + 1 < self.num_steps)
        for load in self.loads:
            load.wait(self.step, self.counts)

    def store(self, expert):
        """The copy of the block to its place in the gradient of an expert's matrix."""
        height, width = self.scratch.out.shape
        rows = pl.ds(self.part[0] * height, height)
        columns = pl.ds(self.part[1] * width, width)
        there = self.dw.at[expert, rows, columns]
        return pltpu.make_async_copy(self.scratch.out, there, self.scratch.semaphore)

    def add(self, first, count, body: range, target):
        """Writes to target the sums with those of this step's rows, of `count` tiles, by a body
        that takes as many; of an expert's first step these alone.
        """
        (x, dy), step, total = self.loads, self.step, self.scratch.total
        for load in self.moving:
            for n in range(body[0], body[-1]):
                pl.when(count <= n)(functools.partial(load.clear, step % 2, n))
        parts = chunks(total.shape[0], self.blocks.chunk)
        for n, down in enumerate(parts):
            for load in self.gathered:
                load.ahead(step, step % 2, body, n, len(parts))
            xt = _columns(x, step, body, down).T
            for across in chunks(total.shape[1], CHUNK):
                columns = _columns(dy, step, body, across, again=n > 0)
                partial = product(xt, columns, transposed=False)
                before = jnp.where(first, 0.0, total[down, across])
                target[down, across] = (before + partial).astype(target.dtype)


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
