"""Operands and results of a kernel over rows, between HBM and two buffers each in VMEM: every load
and store is a copy of its own, in flight while a step multiplies.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tiles import Steps


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
