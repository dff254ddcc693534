"""Rows that a kernel fetches itself, one copy a row, by their index: a buffer of gathered rows is
neither written nor read.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.rows import load_columns, pack, per_word
from pallas_kernels.grouped_matmul.shapes import LANES
from pallas_kernels.grouped_matmul.tiles import Steps


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("words", "source_R"), meta_fields=("dtype",)
)
@dataclasses.dataclass(frozen=True)
class Gathered:
    """An operand [R, D] whose row r is x_TD[source_R[r]], or zeros where source is not in 0..T-1.

    words: rows of x [T, D] as rows.pack makes them, and one of zeros after. dtype: of x.
    """

    words: jax.Array
    source_R: jax.Array
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.source_R), self.words.shape[2] * per_word(self.words)

    def plan(self, tile: int, most: int, *, blocks: int = 1, unpacked: bool = True):
        """Inputs, their specs and the scratch of a GatherStream; most: tiles of a step. blocks: of
        columns, one of which is fetched at a time. unpacked: with room for a step's rows as values.
        """
        zeros = len(self.words) - 1
        num_tiles = len(self.source_R) // tile
        width = self.words.shape[2] // blocks
        source = jnp.where((self.source_R < 0) | (self.source_R > zeros), zeros, self.source_R)
        source = jnp.pad(source, (0, 2 * most * tile), constant_values=zeros).reshape(
            num_tiles + 2 * most, 1, tile
        )
        scratch = [
            pltpu.VMEM(((2 * most + 1) * tile, 1, _pitch(width)), self.words.dtype),
            pltpu.SemaphoreType.DMA((2 * most,)),
            pltpu.SMEM((2, most, 1, tile), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
        ]
        if unpacked:
            scratch.append(pltpu.VMEM((most * tile, self.shape[1] // blocks), self.dtype))
        return [self.words, source], [pl.BlockSpec(memory_space=pl.ANY)] * 2, scratch

    def stream(
        self, inputs, scratch, steps: Steps, tile: int, *, block=0, blocks: int = 1
    ) -> GatherStream:
        """What plan requested, as refs inside of the kernel; block: the one of the columns that is
        fetched.
        """
        return GatherStream(
            *inputs,
            *scratch[:4],
            steps,
            block,
            self.words.shape[2] // blocks,
            tile,
            self.dtype,
            *scratch[4:],
        )


def _pitch(width: int) -> int:
    """Words from a row of the ring to the next: an odd number of lines, so that a load of one line
    of eight rows meets different banks.
    """
    return (width // LANES | 1) * LANES


def gathered(x_TD: jax.Array, source_R: jax.Array) -> Gathered:
    """Rows of x, laid out anew once a token: a row of bfloat16 cannot be copied alone out of the
    usual layout.
    """
    return Gathered(pack(x_TD, zeros=1), source_R, x_TD.dtype)


@dataclasses.dataclass(frozen=True)
class GatherStream:
    """Rows of a step, copied from words [T + 1, 1, W] into a ring of 2 * most tiles, [(2 * most +
    1) * tile, 1, width or a little more], after which lies one of zeros; width: of a block of W.

    Used tiles follow each other in a buffer without gaps, whatever their experts. So a step of n
    tiles starts n others, `most` tiles ahead, from within its products: that many copies take as
    long to start as a fifth of a step, if nothing else runs. Their sources come one step earlier.
    Behind the last tile it fetches on, rows that no one needs; the last step waits for them.
    """

    words: jax.Ref
    sources: jax.Ref  # int32 [tiles + 2 * most, 1, tile]
    ring: jax.Ref
    semaphore: jax.Ref
    indices: jax.Ref  # of the tiles that a step starts: two buffers
    index_semaphore: jax.Ref
    steps: Steps
    block: jax.Array
    width: int
    tile: int
    dtype: jnp.dtype
    rows: jax.Ref | None = None

    @property
    def most(self) -> int:
        return self.indices.shape[1]

    def slot(self, tile):
        return tile % (2 * self.most)

    def fetch_sources(self, tile, half):
        there = self.sources.at[pl.ds(tile, self.most)]
        return pltpu.make_async_copy(there, self.indices.at[half], self.index_semaphore.at[half])

    def start_first(self, step, half):
        """The first `most` tiles; half: step's of the two buffers."""
        first = self.steps.tile[step]
        self.fetch_sources(first, 1 - half).start()
        self.fetch_sources(first + self.most, half).start()
        self.fetch_sources(first, 1 - half).wait()
        for n in range(self.most):
            self.start_tile(first + n, 1 - half, n)
        zeros = self.ring.at[pl.ds(2 * self.most * self.tile, self.tile)]
        zeros[...] = jnp.zeros(zeros.shape, zeros.dtype)

    def turn(self, step, half, more):
        """To be called once a step: its sources are here, the next one's come, if there are
        more.
        """
        self.fetch_sources(0, half).wait()
        pl.when(more)(
            lambda: self.fetch_sources(self.steps.tile[step + 1] + self.most, 1 - half).start()
        )

    def start_tile(self, tile, half, n: int):
        lax.fori_loop(
            0,
            self.tile,
            lambda row, _: self.start_row(tile, row, self.indices[half, n, 0, row]),
            None,
        )

    def start_row(self, tile, row, source):
        there = self.words.at[source, :, pl.ds(self.block * self.width, self.width)]
        here = self.ring.at[self.slot(tile) * self.tile + row, :, pl.ds(0, self.width)]
        pltpu.make_async_copy(there, here, self.semaphore.at[self.slot(tile)]).start()

    def ahead(self, step, half, counts: range, part: int, parts: int):
        """Starts the part-th of `parts` shares of the rows that a step has to start, of as many
        tiles as one of counts says. Those that not all do come before the first share, by
        themselves.
        """
        if part == 0:
            for n in range(counts[0], counts[-1]):
                pl.when(self.steps.count[step] > n)(
                    functools.partial(
                        self.start_tile, self.steps.tile[step] + self.most + n, half, n
                    )
                )
        num_rows = counts[0] * self.tile
        for row in range(part * num_rows // parts, (part + 1) * num_rows // parts):
            n, row_of_tile = divmod(row, self.tile)
            self.start_row(
                self.steps.tile[step] + self.most + n,
                row_of_tile,
                self.indices[half, n, 0, row_of_tile],
            )

    def wait_tile(self, tile):
        """A copy's semaphore counts bytes: one wait for all rows of a tile."""
        slot = self.slot(tile)
        arrived = self.ring.at[pl.ds(slot * self.tile, self.tile), :, pl.ds(0, self.width)]
        pltpu.make_async_copy(arrived, arrived, self.semaphore.at[slot]).wait()

    def wait(self, step, counts):
        for n in range(max(counts)):
            pl.when(self.steps.count[step] > n)(
                lambda n=n: self.wait_tile(self.steps.tile[step] + n)
            )

    def wait_last(self, step):
        end = self.steps.tile[step] + self.steps.count[step]
        for n in range(self.most):
            self.wait_tile(end + n)

    def columns(self, step, counts: range, columns: slice) -> jax.Array:
        """Columns (whole lines of words) of the step's rows in the block, [counts[-1] * tile, C];
        zeros in tiles that it does not have.
        """
        parts = []
        for n in range(counts[-1]):
            slot = self.slot(self.steps.tile[step] + n)
            if n >= counts[0]:
                slot = jnp.where(n < self.steps.count[step], slot, 2 * self.most)
            parts.append(load_columns(self.ring, slot * self.tile, self.tile, columns, self.dtype))
        return jnp.concatenate(parts)

    def unpack(self, step, counts: range):
        """All of them, as a ref [counts[-1] * tile, D]."""
        rows, line = counts[-1] * self.tile, LANES * per_word(self.ring)
        for start in range(0, self.rows.shape[1], line):
            self.rows[:rows, start : start + line] = self.columns(
                step, counts, slice(start, start + line)
            )
        return self.rows.at[pl.ds(0, rows)]
