"""The loop that the products over rows share: for each block of columns, all steps of rows, an
expert's matrices staying while its rows pass. Every load and store is a copy of its own, in flight
while a step multiplies: rows come one step early, matrices a whole expert early, so that they
arrive at an even rate and not in the last step before they are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.cost import cost
from pallas_kernels.grouped_matmul.gather import Gathered, GatherStream
from pallas_kernels.grouped_matmul.rows import row_shape
from pallas_kernels.grouped_matmul.shapes import Blocks
from pallas_kernels.grouped_matmul.streams import (
    MatrixStream,
    NumberStream,
    RowStream,
    WordStream,
    for_count,
)
from pallas_kernels.grouped_matmul.tiles import RowTiles, Steps, row_steps


@dataclasses.dataclass(frozen=True)
class Rows:
    """An operand [R, W] that passes by step; split: a column block takes its own part of the W
    columns, else all. number: one number a row in lanes, [1, R / tile, 1, tile].
    """

    array: jax.Array
    split: bool = False
    number: bool = False

    def plan(self, tile: int, most: int, columns: int):
        """Inputs, their specs and the scratch of a stream; most: tiles of a step."""
        width = self.array.shape[1] // (columns if self.split else 1)
        shape = (2, most, 1, tile) if self.number else (2, most * tile, width)
        scratch = [pltpu.VMEM(shape, self.array.dtype), pltpu.SemaphoreType.DMA((2,))]
        return [self.array], [pl.BlockSpec(memory_space=pl.ANY)], scratch

    def stream(self, inputs, scratch, steps: Steps, tile: int, block) -> RowStream:
        """What plan requested, as refs inside of the kernel, of a block of columns."""
        stream = NumberStream if self.number else RowStream
        return stream(*inputs, *scratch, steps, block if self.split else 0, tile)


@dataclasses.dataclass(frozen=True)
class Matrices:
    """An operand [E, A, B] of which a step holds its expert's matrix, the columns of axis 1 or 2
    split in blocks.
    """

    array: jax.Array
    axis: int

    def plan(self, columns: int, gap: int):
        """As of Rows."""
        height, width = (
            n // columns if axis == self.axis else n
            for axis, n in enumerate(self.array.shape)
            if axis
        )
        buffers = pltpu.VMEM((2, height, width + gap), self.array.dtype)
        scratch = [buffers, pltpu.SemaphoreType.DMA((2,))]
        return [self.array], [pl.BlockSpec(memory_space=pl.ANY)], scratch

    def stream(self, inputs, scratch, block, gap: int) -> MatrixStream:
        """As of Rows."""
        return MatrixStream(*inputs, *scratch, block, self.axis, gap)


@dataclasses.dataclass(frozen=True)
class Result:
    """[R, W], a block of columns at a time; words: as rows.row_shape has them; number: by column
    blocks, one number a row in lanes, float32 [blocks, R / tile, 1, tile].
    """

    width: int
    dtype: jnp.dtype
    words: bool = False
    number: bool = False

    def plan(self, tiles: RowTiles, most: int, columns: int):
        """The whole of it, and the scratch of a stream."""
        tile = tiles.tile
        if self.words:
            whole = row_shape(tiles.rows, self.width, self.dtype)
            part = most * tile, 1, whole.shape[2] // columns
        elif self.number:
            whole = jax.ShapeDtypeStruct((columns, len(tiles.expert), 1, tile), self.dtype)
            part = most, 1, tile
        else:
            whole = jax.ShapeDtypeStruct((tiles.rows, self.width), self.dtype)
            part = most * tile, self.width // columns
        return whole, [pltpu.VMEM((2, *part), whole.dtype), pltpu.SemaphoreType.DMA((2,))]

    def stream(self, output, scratch, steps: Steps, tile: int, block) -> RowStream:
        """As of Rows."""
        stream = NumberStream if self.number else WordStream if self.words else RowStream
        return stream(output, *scratch, steps, block, tile)


def sweep(compute, tiles: RowTiles, rows, matrices, results, *, blocks: Blocks, name: str):
    """Runs compute(rows, matrices, results, beside) for every step: refs of what is in VMEM, rows
    [n * tile, W or a block of it], matrices [A, B] with one axis divided by blocks.columns. It
    calls beside(part, parts) for each of the parts of its work, which starts copies while that
    runs. What it computes for rows of tiles that the step does not have goes nowhere. rows: Rows or
    Gathered. Rows of results in tiles past the used ones are not written.
    """
    steps, num_steps = row_steps(tiles, blocks.size, join=blocks.join, visit_empty=False)
    columns, most = blocks.columns, blocks.bodies[-1][-1]
    per_core = -(-num_steps // blocks.cores)
    plans = [
        operand.plan(tiles.tile, most)
        if isinstance(operand, Gathered)
        else operand.plan(tiles.tile, most, columns)
        for operand in rows
    ]
    plans += [operand.plan(columns, blocks.gap) for operand in matrices]
    inputs, specs, scratch = (list(part) for part in zip(*plans, strict=True))
    shapes, result_scratch = zip(
        *(result.plan(tiles, most, columns) for result in results), strict=True
    )
    moved = [
        operand if isinstance(operand, Gathered) else operand.array
        for operand in (*rows, *matrices)
    ]
    macs = sum(tiles.rows * math.prod(w.array.shape[1:]) for w in matrices)
    (out,) = pl.pallas_call(
        functools.partial(_kernel, compute, (rows, matrices, results), blocks, tiles.tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(blocks.cores, columns, per_core),
            in_specs=[specs],
            out_specs=[[pl.BlockSpec(memory_space=pl.ANY) for _ in results]],
            scratch_shapes=[[*scratch, *result_scratch]],
        ),
        out_shape=[list(shapes)],
        cost_estimate=cost(*moved, *shapes, macs=macs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_bytes,
            # of copies: a check after every row's keeps the products from running meanwhile
            disable_bounds_checks=True,
        ),
        interpret=interpret.params(),
        name=name,
    )(steps, num_steps.reshape(1), inputs)
    return out


def _kernel(compute, operands, blocks, tile, steps, num_steps, inputs, outputs, scratch):
    rows, matrices, results = operands
    block = pl.program_id(1)
    own = zip([*inputs, *outputs], scratch, strict=True)  # HBM and scratch of each
    loads = [
        operand.stream(*next(own), steps, tile)
        if isinstance(operand, Gathered)
        else operand.stream(*next(own), steps, tile, block)
        for operand in rows
    ]
    fetches = [operand.stream(*next(own), block, blocks.gap) for operand in matrices]
    stores = [result.stream(*next(own), steps, tile, block) for result in results]
    step = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    end = jnp.minimum((pl.program_id(0) + 1) * pl.num_programs(2), num_steps[0])
    pl.when(step < end)(
        functools.partial(_step, compute, steps, blocks.bodies, loads, fetches, stores, step, end)
    )


def _step(compute, steps: Steps, bodies, loads, fetches, stores, step, end):
    """One step of those of this core, which end before `end`."""
    counts = [count for body in bodies for count in body]
    moving = [load for load in loads if isinstance(load, RowStream)]
    gathered = [load for load in loads if isinstance(load, GatherStream)]
    index, run = pl.program_id(2), steps.run[step]

    @pl.when(index == 0)
    def _():
        for load in moving:
            load.start(step, counts)
        for load in gathered:
            load.start_first(step, step % 2)
        for fetch in fetches:
            fetch.start(steps.expert[step], run % 2)

    @pl.when(step + 1 < end)
    def _():
        for load in moving:
            load.start(step + 1, counts)

    @pl.when((index == 0) | (run != steps.run[jnp.maximum(step - 1, 0)]))
    def _():
        for fetch in fetches:
            fetch.wait(run % 2)

        @pl.when(run != steps.run[end - 1])
        def _():
            for fetch in fetches:
                fetch.start(steps.following[step], (run + 1) % 2)

    for load in gathered:
        load.turn(step, step % 2, step + 1 < end)
    for load in loads:
        load.wait(step, counts)

    @pl.when(index >= 2)
    def _():
        for store in stores:
            store.wait_store(step - 2, counts)

    def multiply(body):
        def beside(part, parts):
            for load in gathered:
                load.ahead(step, step % 2, body, part, parts)

        compute(
            [
                load.unpack(step, body)
                if isinstance(load, GatherStream)
                else load.view(step % 2, body[-1])
                for load in loads
            ],
            [fetch.view(run % 2) for fetch in fetches],
            [store.view(step % 2, body[-1]) for store in stores],
            beside,
        )

    for body in bodies:
        pl.when((steps.count[step] >= body[0]) & (steps.count[step] <= body[-1]))(
            functools.partial(multiply, body)
        )
    for store in stores:
        for_count(
            steps,
            step,
            counts,
            lambda count, store=store: store.copy(step, count, store=True).start(),
        )

    @pl.when(step == end - 1)
    def _():
        for load in gathered:
            load.wait_last(step)
        for store in stores:
            pl.when(index >= 1)(functools.partial(store.wait_store, step - 1, counts))
            store.wait_store(step, counts)
