"""Rows that a kernel fetches itself, one copy a row, by their index: a buffer of gathered rows is neither written nor read.

A row of bfloat16 cannot be copied alone out of the usual layout, whose tiles hold 16 rows. So tokens are laid out anew (once a
token, not once for each of its rows): two columns to a 32-bit word, a token's words a block of their own.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tiles import Steps

LANES = 128
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Gathered:
    """An operand whose row r is x_TD[source_R[r]], or zeros where source is -1. x: bfloat16 or float32, D a multiple of 128."""

    x_TD: jax.Array
    source_R: jax.Array

    @property
    def halves(self) -> int:
        """Columns in one word."""
        return 4 // self.x_TD.dtype.itemsize

    @property
    def groups(self) -> int:
        """128-word groups of a token."""
        return -(-self.x_TD.shape[1] // (LANES * self.halves))

    def words(self) -> jax.Array:
        """uint32 [T + 1, groups, 128], the last token zeros. Word w of bfloat16: column w in the low half, groups * 128 + w in the high."""
        num_words = self.groups * LANES
        x = jnp.pad(self.x_TD, ((0, 1), (0, self.halves * num_words - self.x_TD.shape[1])))
        if self.halves == 1:
            words = lax.bitcast_convert_type(x, jnp.uint32)
        else:
            bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
            words = bits[:, :num_words] | (bits[:, num_words:] << 16)
        return words.reshape(-1, self.groups, LANES)

    def plan(self, tile: int, most: int, cores: int):
        """Inputs, their specs and the scratch of a GatherStream; most: tiles of a step.

        The sources of the tiles that a step starts to fetch come as blocks in SMEM; and, for the start, those of the first tiles.
        """
        num_tiles = len(self.source_R) // tile
        num_tokens = len(self.x_TD)
        source = jnp.where((self.source_R < 0) | (self.source_R > num_tokens), num_tokens, self.source_R).reshape(num_tiles, 1, tile)

        def spec(n, ahead):
            def index(core, _, index, *scalars):
                tiles = Steps(*scalars[:-1]).tile
                per_core = -(-scalars[-1][0] // cores)
                step = jnp.minimum(core * per_core + (index if ahead else 0), len(tiles) - 1)
                return jnp.minimum(tiles[step] + n + (most if ahead else 0), num_tiles - 1), 0, 0

            return pl.BlockSpec((1, 1, tile), index, memory_space=pltpu.SMEM)

        specs = [spec(n, ahead) for ahead in (False, True) for n in range(most)]
        pitch = -(-self.groups // SUBLANES) * SUBLANES
        scratch = [
            pltpu.VMEM((2 * most, tile * pitch, LANES), jnp.uint32),
            pltpu.VMEM((most * tile, self.x_TD.shape[1]), self.x_TD.dtype),
            pltpu.SemaphoreType.DMA((2 * most,)),
        ]
        return [self.words(), *[source] * len(specs)], [pl.BlockSpec(memory_space=pl.ANY), *specs], scratch


@dataclasses.dataclass(frozen=True)
class GatherStream:
    """Rows of a step, copied from words [T + 1, groups, 128] into a ring of tiles [2 * most, tile * pitch, 128], unpacked into `rows`.

    Used tiles follow each other in a buffer without gaps, whatever their experts. So a step of n tiles starts n others, `most`
    tiles ahead, from within its products: that many copies take as long to start as a fifth of a step, if nothing else runs.
    Behind the last tile it fetches on (what it likes), as long as tiles lie in the buffer; the last step waits for them.
    """

    words: jax.Ref
    sources: list  # of the first `most` tiles, then of those from `most` tiles ahead of a step on
    ring: jax.Ref
    rows: jax.Ref
    semaphore: jax.Ref
    steps: Steps
    tile: int

    @property
    def most(self) -> int:
        return len(self.sources) // 2

    @property
    def pitch(self) -> int:
        return self.ring.shape[1] // self.tile

    def start_first(self, step):
        for n in range(self.most):
            slot = (self.steps.tile[step] + n) % (2 * self.most)
            lax.fori_loop(0, self.tile, lambda row, _, slot=slot, n=n: self.start_row(slot, self.sources[n], row), None)

    def start_row(self, slot, source, row):
        groups = self.words.shape[1]
        first = row * self.pitch if isinstance(row, int) else pl.multiple_of(row * self.pitch, SUBLANES)
        here = self.ring.at[slot, pl.ds(first, groups)]
        pltpu.make_async_copy(self.words.at[source[0, 0, row]], here, self.semaphore.at[slot]).start()

    def ahead(self, step, count: int, part: int, parts: int):
        """Starts the part-th of `parts` shares of the rows that a step of count tiles has to start."""
        num_rows = count * self.tile
        slots = [(self.steps.tile[step] + self.most + n) % (2 * self.most) for n in range(count)]
        for row in range(part * num_rows // parts, (part + 1) * num_rows // parts):
            n, row_of_tile = divmod(row, self.tile)
            self.start_row(slots[n], self.sources[self.most + n], row_of_tile)

    def wait_tile(self, tile):
        """A copy's semaphore counts bytes: one wait for all rows of a tile."""
        slot = tile % (2 * self.most)
        arrived = self.ring.at[slot, pl.ds(0, self.tile * self.words.shape[1])]
        pltpu.make_async_copy(arrived, arrived, self.semaphore.at[slot]).wait()

    def wait(self, step, counts):
        for n in range(max(counts)):
            pl.when(self.steps.count[step] > n)(lambda n=n: self.wait_tile(self.steps.tile[step] + n))

    def wait_last(self, step):
        end = self.steps.tile[step] + self.steps.count[step]
        for n in range(self.most):
            self.wait_tile(end + n)

    def unpack(self, step, count: int):
        width, groups = self.rows.shape[1], self.words.shape[1]
        for n in range(count):
            slot, rows = (self.steps.tile[step] + n) % (2 * self.most), pl.ds(n * self.tile, self.tile)
            for group in range(groups):
                word = self.ring[slot, pl.ds(group, self.tile, stride=self.pitch), :]
                if self.rows.dtype == jnp.float32:
                    halves = [lax.bitcast_convert_type(word, jnp.float32)]
                else:
                    halves = [lax.bitcast_convert_type(bits, jnp.float32) for bits in (word << 16, word & jnp.uint32(0xFFFF0000))]
                for half, values in enumerate(halves):
                    start = (half * groups + group) * LANES
                    if start < width:
                        self.rows[rows, pl.ds(start, LANES)] = values.astype(self.rows.dtype)
        return self.rows.at[pl.ds(0, count * self.tile)]
