"""Stores new keys and values in the pages of a cache, in place: reads the pages that get new
tokens, puts them in, writes them back.

XLA's scatter wants the cache in another layout than attention does, and copies all of it between
them, in every layer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret, tuning
from pallas_kernels.attention.walk import product
from pallas_kernels.cost import cost
from pallas_kernels.once import once
from pallas_kernels.paged_attention.reference import saturated
from pallas_kernels.paged_attention.work import Written
from pallas_kernels.target import heads_of_core

LANES = 128
SLOTS = 4  # pages in flight: two are fetched and two written while one is changed


class _Rows(NamedTuple):
    """The other scalars."""

    starts_S: jax.Ref
    counts_S: jax.Ref
    layer: jax.Ref


class _Both(NamedTuple):
    """Of keys and of values."""

    k: jax.Ref
    v: jax.Ref


class _Scratch(NamedTuple):
    """Of each slot: what is read and written of a page, [heads, H, window] and [heads, window, H],
    and new tokens that go there, [heads, window, H].
    """

    pages: _Both
    new: _Both
    load_semaphores: jax.Ref  # [slots, 4]: of pages, of new tokens
    store_semaphores: jax.Ref  # [slots, 2]


class _Place(NamedTuple):
    """Which new tokens of a row go to a page. first: the one that the page's first position is for;
    may be negative. low, high: the page's positions that get tokens, from low to before high. What
    begins where: keys' and values' windows in the page, and that of the new tokens.
    """

    row: jax.Array
    first: jax.Array
    low: jax.Array
    high: jax.Array
    k_at: jax.Array
    v_at: jax.Array
    new_at: jax.Array


@once()
def store(k_SLGH, v_SLGH, k_pages, v_pages, layer, starts_S, counts_S, work: Written):
    """As api.store. work: as work.written gives them for the chip's cores, which share the heads
    where they can, else the pages.
    """
    length, groups, size = k_SLGH.shape[1:]
    page_size, cores = k_pages.shape[4], len(work.part) // 2
    new_dtype = jnp.bfloat16 if k_pages.dtype == jnp.float8_e4m3fn else k_pages.dtype
    rows = 32 // jnp.dtype(new_dtype).itemsize  # of a tile
    # what others hold is multiplied by zero, which NaN would survive
    real_SL = (jnp.arange(length) < counts_S[:, None])[..., None, None]
    padding = ((0, 0), (0, 0), (0, -length % rows), (0, 0))
    new_SGLH = _Both(
        *(
            jnp.pad(_numbers(jnp.where(real_SL, x, 0), k_pages.dtype).swapaxes(1, 2), padding)
            for x in (k_SLGH, v_SLGH)
        )
    )

    heads = heads_of_core(groups, cores)
    # What of a page is read and written: along lanes for keys, along sublanes for values.
    k_window, v_window = (
        _window(length, tile, page_size) for tile in (LANES, 32 // k_pages.dtype.itemsize)
    )
    new = pltpu.VMEM((SLOTS, heads, min(new_SGLH.k.shape[2], page_size + rows), size), new_dtype)
    scratch = _Scratch(
        pages=_Both(
            pltpu.VMEM((SLOTS, heads, size, k_window), k_pages.dtype),
            pltpu.VMEM((SLOTS, heads, v_window, size), v_pages.dtype),
        ),
        new=_Both(new, new),
        load_semaphores=pltpu.SemaphoreType.DMA((SLOTS, 4)),
        store_semaphores=pltpu.SemaphoreType.DMA((SLOTS, 2)),
    )
    scalars = (
        work,
        _Rows(
            starts_S.astype(jnp.int32),
            counts_S.astype(jnp.int32),
            jnp.asarray(layer, jnp.int32)[None],
        ),
    )
    anywhere = _Both(*[pl.BlockSpec(memory_space=pl.ANY)] * 2)
    num_before = len(jax.tree.leaves((scalars, new_SGLH)))  # the pages
    (pages,) = pl.pallas_call(
        _kernel,
        out_shape=[_Both(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_pages, v_pages)))],
        cost_estimate=cost(*new_SGLH),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores,),
            in_specs=[anywhere, anywhere],
            out_specs=[anywhere],
            scratch_shapes=[scratch],
        ),
        input_output_aliases={num_before: 0, num_before + 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tuning.vmem_limit()
        ),
        interpret=interpret.params(),
        name="store_pages",
    )(*scalars, new_SGLH, _Both(k_pages, v_pages))
    return tuple(pages)


def _numbers(x, dtype) -> jax.Array:
    """x in a cache's type; of float8 its bits, 0 to 255, as bfloat16: not all chips know float8."""
    x = saturated(x, dtype)
    return (
        lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.bfloat16)
        if dtype == jnp.float8_e4m3fn
        else x
    )


def _window(length: int, tile: int, page_size: int) -> int:
    """Positions that `length` tokens of a row lie within, in whole tiles."""
    return min(page_size, tile * (-(-(length - 1) // tile) + 1))


def _kernel(work, rows, new, _, pages, scratch):
    core, heads = pl.program_id(0), scratch.new.k.shape[1]
    begin, stop = work.part[2 * core], work.part[2 * core + 1]
    own = pl.ds(core * heads if heads != pages.k.shape[2] else 0, heads)
    _Core(work, rows, new, pages, scratch, begin, stop, own).run()


@dataclasses.dataclass(frozen=True)
class _Core:
    """One core's part of the list, the places from begin to before stop. w: place in it. own: the
    core's key-value heads.
    """

    work: Written
    rows: _Rows
    new: _Both
    pages: _Both
    scratch: _Scratch
    begin: jax.Array
    stop: jax.Array
    own: pl.Slice

    def run(self):
        for ahead in range(2):

            @pl.when(self.begin + ahead < self.stop)
            def _(ahead=ahead):
                self.load(self.begin + ahead, lambda copy: copy.start())

        lax.fori_loop(self.begin, self.stop, self.step, 0)
        for back in (2, 1):

            @pl.when(self.stop - self.begin >= back)
            def _(back=back):
                self.store(self.stop - back, lambda copy: copy.wait())

    def step(self, w, _):
        pl.when(w - self.begin >= 2)(lambda: self.store(w - 2, lambda copy: copy.wait()))
        pl.when(w + 2 < self.stop)(lambda: self.load(w + 2, lambda copy: copy.start()))
        self.load(w, lambda copy: copy.wait())
        self.merge(w)
        self.store(w, lambda copy: copy.start())
        return 0

    @property
    def page_size(self) -> int:
        return self.pages.k.shape[4]

    def slot(self, w):
        return (w - self.begin) % SLOTS

    def load(self, w, do):
        """Starts or waits for the copies of new tokens and of the page that they go to."""
        place, slot, semaphores = self.place(w), self.slot(w), self.scratch.load_semaphores
        for n, (hbm, buf) in enumerate(zip(self.new, self.scratch.new, strict=True)):
            there = hbm.at[place.row, self.own, pl.ds(place.new_at, buf.shape[2])]
            do(pltpu.make_async_copy(there, buf.at[slot], semaphores.at[slot, 2 + n]))

        @pl.when(place.high - place.low < self.page_size)  # else nothing of the page is kept
        def _():
            for there, here, semaphore in self.windows(w, semaphores):
                do(pltpu.make_async_copy(there, here, semaphore))

    def store(self, w, do):
        """Starts or waits for the copies of the page back."""
        for there, here, semaphore in self.windows(w, self.scratch.store_semaphores):
            do(pltpu.make_async_copy(here, there, semaphore))

    def windows(self, w, semaphores):
        """What of the page is read and written, of keys and of values: in HBM and in its slot, with
        the semaphore.
        """
        place, slot, (k, v) = self.place(w), self.slot(w), self.scratch.pages
        layer, page_W, own = self.rows.layer, self.work.page_W, self.own
        k_there = self.pages.k.at[layer[0], page_W[w], own, :, pl.ds(place.k_at, k.shape[3])]
        v_there = self.pages.v.at[layer[0], page_W[w], own, pl.ds(place.v_at, v.shape[2]), :]
        return (
            (k_there, k.at[slot], semaphores.at[slot, 0]),
            (v_there, v.at[slot], semaphores.at[slot, 1]),
        )

    def place(self, w) -> _Place:
        pages, new = self.scratch.pages, self.scratch.new
        row = self.work.row_W[w]
        first = self.work.block_W[w] * self.page_size - self.rows.starts_S[row]
        low = jnp.maximum(-first, 0)
        high = jnp.minimum(self.rows.counts_S[row] - first, self.page_size)
        k_at = self.window_at(low, pages.k.shape[3], LANES)
        v_at = self.window_at(low, pages.v.shape[2], 32 // pages.v.dtype.itemsize)
        tile, last = 32 // new.k.dtype.itemsize, self.new.k.shape[2] - new.k.shape[2]
        new_at = pl.multiple_of(jnp.clip(first // tile * tile, 0, last), tile)
        return _Place(row, first, low, high, k_at, v_at, new_at)

    def window_at(self, low, window: int, tile: int):
        last = self.page_size - window
        return pl.multiple_of(jnp.minimum(low // tile * tile, last), math.gcd(tile, last))

    def merge(self, w):
        """Puts the new tokens into the page."""
        place, slot, (k, v) = self.place(w), self.slot(w), self.scratch.pages
        new = self.scratch.new
        iota = lambda shape, axis: lax.broadcasted_iota(jnp.int32, shape, axis)
        # Each new token at its position, by a product with ones and zeros, which is exact.
        k_shape, v_shape = (new.k.shape[2], k.shape[3]), (v.shape[2], new.v.shape[2])
        k_place = iota(k_shape, 0) + place.new_at == iota(k_shape, 1) + place.k_at + place.first
        v_place = iota(v_shape, 1) + place.new_at == iota(v_shape, 0) + place.v_at + place.first
        k_place, v_place = (jnp.where(x, 1.0, 0.0).astype(new.k.dtype) for x in (k_place, v_place))
        k_position, v_position = (
            iota(k.shape[2:], 1) + place.k_at,
            iota(v.shape[2:], 0) + place.v_at,
        )
        gets = lambda position: (position >= place.low) & (position < place.high)
        for h in range(k.shape[1]):
            new_k = product(new.k[slot, h], k_place, 0, 0)
            new_v = product(v_place, new.v[slot, h], 1, 0)
            k[slot, h] = _merged(k[slot, h], new_k, gets(k_position))
            v[slot, h] = _merged(v[slot, h], new_v, gets(v_position))


def _merged(old, new, mask):
    """A page's values with new ones, float32 as `_numbers` has them, where the mask says."""
    if old.dtype != jnp.float8_e4m3fn:
        return jnp.where(mask, new, old.astype(jnp.float32)).astype(old.dtype)
    bits = pltpu.bitcast(old, jnp.int8).astype(jnp.int32)
    new = new.astype(jnp.int32)
    new = jnp.where(new > 127, new - 256, new)
    return pltpu.bitcast(jnp.where(mask, new, bits).astype(jnp.int8), old.dtype)
