"""The loop that the products over rows share: for each block of columns, all steps of rows, an
expert's matrices staying while its rows pass. Every load and store is a copy of its own, in flight
while a step multiplies: rows come one step early, matrices a whole expert early, so that they
arrive at an even rate and not in the last step before they are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
from pallas_kernels.grouped_matmul.tiles import RowTiles, Steps, row_steps


@dataclasses.dataclass(frozen=True)
class Rows:
    """An operand [R, W] that passes by step; split: a column block takes its own part of the W
    columns, else all. number: one number a row in lanes, [1, R / tile, 1, tile].
    """

    array: jax.Array
    split: bool = False
    number: bool = False


@dataclasses.dataclass(frozen=True)
class Matrices:
    """An operand [E, A, B] of which a step holds its expert's matrix, the columns of axis 1 or 2
    split in blocks.
    """

    array: jax.Array
    axis: int


@dataclasses.dataclass(frozen=True)
class Result:
    """[R, W], a block of columns at a time; words: as rows.row_shape has them; number: by column
    blocks, one number a row in lanes, float32 [blocks, R / tile, 1, tile].
    """

    width: int
    dtype: jnp.dtype
    words: bool = False
    number: bool = False


def sweep(compute, tiles: RowTiles, rows, matrices, results, *, blocks: Blocks, name: str):
    """Runs compute(rows, matrices, results, beside) for every step: refs of what is in VMEM, rows
    [n * tile, W or a block of it], matrices [A, B] with one axis divided by blocks.columns. It
    calls beside(part, parts) for each of the parts of its work, which starts copies while that
    runs. What it computes for rows of tiles that the step does not have goes nowhere. rows: Rows or
    Gathered. Rows of results in tiles past the used ones are not written.
    """
    steps, num_steps = row_steps(tiles, blocks.size, join=blocks.join, visit_empty=False)
    bodies = blocks.bodies
    columns = blocks.columns
    per_core = -(-num_steps // blocks.cores)
    tile, most = tiles.tile, bodies[-1][-1]
    scratch, inputs, specs = [], [], []
    for operand in rows:
        if isinstance(operand, Gathered):
            arrays, operand_specs, buffers = operand.plan(tile, most)
        else:
            arrays, operand_specs = [operand.array], [pl.BlockSpec(memory_space=pl.ANY)]
            width = operand.array.shape[1] // (columns if operand.split else 1)
            shape = (2, most, 1, tile) if operand.number else (2, most * tile, width)
            buffers = [pltpu.VMEM(shape, operand.array.dtype), pltpu.SemaphoreType.DMA((2,))]
        inputs.append(arrays)
        specs.append(operand_specs)
        scratch.append(buffers)
    for operand in matrices:
        height, width = (
            n // columns if axis == operand.axis else n
            for axis, n in enumerate(operand.array.shape)
            if axis
        )
        inputs.append([operand.array])
        specs.append([pl.BlockSpec(memory_space=pl.ANY)])
        scratch.append(
            [
                pltpu.VMEM((2, height, width + blocks.gap), operand.array.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ]
        )
    shapes = []
    for result in results:
        if result.words:
            whole = row_shape(tiles.rows, result.width, result.dtype)
            part = most * tile, 1, whole.shape[2] // columns
        elif result.number:
            whole = jax.ShapeDtypeStruct((columns, len(tiles.expert), 1, tile), result.dtype)
            part = most, 1, tile
        else:
            whole = jax.ShapeDtypeStruct((tiles.rows, result.width), result.dtype)
            part = most * tile, result.width // columns
        shapes.append(whole)
        scratch.append([pltpu.VMEM((2, *part), whole.dtype), pltpu.SemaphoreType.DMA((2,))])
    moved = [
        operand if isinstance(operand, Gathered) else operand.array
        for operand in (*rows, *matrices)
    ]
    kernel = functools.partial(
        _kernel,
        compute,
        rows,
        matrices,
        results,
        bodies,
        tile,
        blocks.gap,
        [len(i) for i in inputs],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Steps._fields) + 1,
            grid=(blocks.cores, columns, per_core),
            in_specs=list(itertools.chain(*specs)),
            out_specs=[pl.BlockSpec(memory_space=pl.ANY) for _ in results],
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        cost_estimate=cost(
            *moved, *shapes, macs=sum(tiles.rows * math.prod(w.array.shape[1:]) for w in matrices)
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_bytes,
            # of copies: a check after every row's keeps the products from running meanwhile
            disable_bounds_checks=True,
        ),
        interpret=interpret.params(),
        name=name,
    )(*steps, num_steps.reshape(1), *itertools.chain(*inputs))


def _kernel(compute, rows, matrices, results, bodies, tile, gap, num_refs, *refs):
    steps = Steps(*refs[: len(Steps._fields)])
    num_steps = refs[len(Steps._fields)]
    refs = list(refs[len(Steps._fields) + 1 :])
    inputs = [[refs.pop(0) for _ in range(n)] for n in num_refs]
    outputs = [refs.pop(0) for _ in results]
    block = pl.program_id(1)
    loads, fetches, stores = [], [], []
    for operand, hbm, scratch in zip(rows, inputs, refs, strict=False):
        if isinstance(operand, Gathered):
            loads.append(operand.stream(hbm, scratch, steps, tile))
        else:
            stream = NumberStream if operand.number else RowStream
            loads.append(stream(hbm[0], *scratch, steps, block if operand.split else 0, tile))
    for operand, hbm, scratch in zip(
        matrices, inputs[len(rows) :], refs[len(rows) :], strict=False
    ):
        fetches.append(MatrixStream(hbm[0], *scratch, block, operand.axis, gap))
    for result, hbm, scratch in zip(
        results, outputs, refs[len(rows) + len(matrices) :], strict=True
    ):
        stream = NumberStream if result.number else WordStream if result.words else RowStream
        stores.append(stream(hbm, *scratch, steps, block, tile))
    step = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    end = jnp.minimum((pl.program_id(0) + 1) * pl.num_programs(2), num_steps[0])
    pl.when(step < end)(
        functools.partial(_step, compute, steps, bodies, loads, fetches, stores, step, end)
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


def for_count(steps: Steps, step, counts, do):
    """do(count) with the step's number of tiles as a Python number."""
    for count in counts:
        pl.when(steps.count[step] == count)(functools.partial(do, count))


@dataclasses.dataclass(frozen=True)
class RowStream:
    """Rows of a step between HBM [R, W] and two buffers [2, n * tile, W or a block of it], whose
    rows may be `gap` longer.
    """

    hbm: jax.Ref
    buffer: jax.Ref
    semaphore: jax.Ref
    steps: Steps
    block: jax.Array
    tile: int
    gap: int = 0

    def copy(self, step, count: int, *, store: bool):
        width = self.buffer.shape[2] - self.gap
        there = self.hbm.at[
            pl.ds(self.steps.tile[step] * self.tile, count * self.tile),
            pl.ds(self.block * width, width),
        ]
        here = self.view(step % 2, count)
        source, target = (here, there) if store else (there, here)
        return pltpu.make_async_copy(source, target, self.semaphore.at[step % 2])

    def start(self, step, counts):
        for_count(
            self.steps, step, counts, lambda count: self.copy(step, count, store=False).start()
        )

    def wait(self, step, counts):
        for_count(
            self.steps, step, counts, lambda count: self.copy(step, count, store=False).wait()
        )

    def wait_store(self, step, counts):
        for_count(self.steps, step, counts, lambda count: self.copy(step, count, store=True).wait())

    def view(self, slot, count: int):
        return self.buffer.at[
            slot, pl.ds(0, count * self.tile), pl.ds(0, self.buffer.shape[2] - self.gap)
        ]

    def clear(self, slot, n: int):
        """Makes zeros of the n-th tile of a step."""
        here = self.buffer.at[slot, pl.ds(n * self.tile, self.tile)]
        here[...] = jnp.zeros(here.shape, here.dtype)


class WordStream(RowStream):
    """Rows as words, [R, 1, W], from two buffers [2, n * tile, 1, W or a block of it]."""

    def copy(self, step, count: int, *, store: bool):
        width = self.buffer.shape[3]
        there = self.hbm.at[
            pl.ds(self.steps.tile[step] * self.tile, count * self.tile),
            :,
            pl.ds(self.block * width, width),
        ]
        return pltpu.make_async_copy(self.view(step % 2, count), there, self.semaphore.at[step % 2])

    def view(self, slot, count: int):
        return self.buffer.at[slot, pl.ds(0, count * self.tile)]


@dataclasses.dataclass(frozen=True)
class NumberStream(RowStream):
    """One number a row, [blocks, R / tile, 1, tile], from two buffers [2, n, 1, tile]."""

    def copy(self, step, count: int, *, store: bool):
        there = self.hbm.at[self.block, pl.ds(self.steps.tile[step], count)]
        here = self.view(step % 2, count)
        source, target = (here, there) if store else (there, here)
        return pltpu.make_async_copy(source, target, self.semaphore.at[step % 2])

    def view(self, slot, count: int):
        return self.buffer.at[slot, pl.ds(0, count)]


@dataclasses.dataclass(frozen=True)
class MatrixStream:
    """An expert's matrix or a block of its columns, from HBM [E, A, B] into two buffers whose rows
    may be `gap` longer.
    """

    hbm: jax.Ref
    buffer: jax.Ref
    semaphore: jax.Ref
    block: jax.Array
    axis: int
    gap: int

    def copy(self, expert, slot):
        width = self.buffer.shape[self.axis] - (self.gap if self.axis == 2 else 0)
        part = pl.ds(self.block * width, width)
        there = self.hbm.at[expert, part] if self.axis == 1 else self.hbm.at[expert, :, part]
        return pltpu.make_async_copy(there, self.view(slot), self.semaphore.at[slot])

    def view(self, slot):
        return self.buffer.at[slot, :, pl.ds(0, self.buffer.shape[2] - self.gap)]

    def start(self, expert, slot):
        self.copy(expert, slot).start()

    def wait(self, slot):
        self.copy(0, slot).wait()
