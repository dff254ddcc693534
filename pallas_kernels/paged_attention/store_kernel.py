"""Stores new keys and values in the pages of a cache, in place: reads the pages that get new
tokens, puts them in, writes them back.

XLA's scatter wants the cache in another layout than attention does, and copies all of it between
them, in every layer.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret, tuning
from pallas_kernels.cost import cost
from pallas_kernels.once import once
from pallas_kernels.paged_attention.reference import saturated
from pallas_kernels.target import heads_of_core

LANES = 128
SLOTS = 4  # pages in flight: two are fetched and two written while one is changed


@once("cores")
def store(
    k_SLGH, v_SLGH, k_pages, v_pages, layer, tables_SP, starts_S, counts_S, cores: int, works=None
):
    """As api.store. cores: of the chip, which share the heads where they can, else the pages.
    works: as `work` gives them.
    """
    length, groups, size = k_SLGH.shape[1:]
    page_size = k_pages.shape[4]
    new_dtype = jnp.bfloat16 if k_pages.dtype == jnp.float8_e4m3fn else k_pages.dtype
    rows = 32 // jnp.dtype(new_dtype).itemsize  # of a tile
    # what others hold is multiplied by zero, which NaN would survive
    real_SL = (jnp.arange(length) < counts_S[:, None])[..., None, None]
    padding = ((0, 0), (0, 0), (0, -length % rows), (0, 0))
    k_SGLH, v_SGLH = (
        jnp.pad(_numbers(jnp.where(real_SL, x, 0), k_pages.dtype).swapaxes(1, 2), padding)
        for x in (k_SLGH, v_SLGH)
    )

    heads = heads_of_core(groups, cores)
    if works is None:
        works = work(length, k_pages, tables_SP, starts_S, counts_S, cores)
    # What of a page is read and written: along lanes for keys, along sublanes for values.
    k_window, v_window = (
        _window(length, tile, page_size) for tile in (LANES, 32 // k_pages.dtype.itemsize)
    )
    new_window = min(k_SGLH.shape[2], page_size + rows)
    kernel = functools.partial(
        _kernel, heads=heads, shared=heads != groups, page_size=page_size, length=k_SGLH.shape[2],
        rows=rows,
    )  # fmt: skip
    scratch = [
        (heads, size, k_window),
        (heads, v_window, size),
        (heads, new_window, size),
        (heads, new_window, size),
    ]
    dtypes = (k_pages.dtype, v_pages.dtype, new_dtype, new_dtype)
    scalars = (
        *works,
        starts_S.astype(jnp.int32),
        counts_S.astype(jnp.int32),
        jnp.asarray(layer, jnp.int32)[None],
    )
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (k_pages, v_pages)],
        cost_estimate=cost(k_SGLH, v_SGLH),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[
                *(
                    pltpu.VMEM((SLOTS, *shape), dtype)
                    for shape, dtype in zip(scratch, dtypes, strict=True)
                ),
                pltpu.SemaphoreType.DMA((SLOTS, 4)),
                pltpu.SemaphoreType.DMA((SLOTS, 2)),
            ],
        ),
        input_output_aliases={len(scalars) + 2: 0, len(scalars) + 3: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tuning.vmem_limit()
        ),
        interpret=interpret.params(),
        name="store_pages",
    )(*scalars, k_SGLH, v_SGLH, k_pages, v_pages)


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


def work(length: int, k_pages, tables_SP, starts_S, counts_S, cores: int) -> tuple[jax.Array, ...]:
    """What the kernel walks over for `length` new tokens of a row: the same in every layer."""
    groups, page_size = k_pages.shape[2], k_pages.shape[4]
    return _work(
        starts_S,
        counts_S,
        tables_SP,
        length,
        page_size,
        cores,
        split=heads_of_core(groups, cores) == groups,
    )


def _work(starts_S, counts_S, tables_SP, length, page_size, cores, *, split: bool):
    """The list of pages that get new tokens: row, number of the page's block of positions, and page
    [W], others after them. Where each core's part of it begins and ends [2 cores]; each core's
    part is all unless `split`.
    """
    num_blocks = -(-(length - 1) // page_size) + 1
    block_SB = (starts_S // page_size)[:, None] + jnp.arange(num_blocks)
    end_S = jnp.where(counts_S > 0, starts_S + counts_S, 0)
    live_W = ((block_SB * page_size < end_S[:, None]) & (block_SB < tables_SP.shape[1])).reshape(-1)
    page_SB = jnp.take_along_axis(tables_SP, jnp.minimum(block_SB, tables_SP.shape[1] - 1), axis=1)
    row_SB = jnp.broadcast_to(jnp.arange(len(starts_S))[:, None], block_SB.shape)
    order_W = jnp.argsort(~live_W, stable=True)
    lists = (x.reshape(-1)[order_W].astype(jnp.int32) for x in (row_SB, block_SB, page_SB))
    live = jnp.sum(live_W)
    ends = jnp.arange(cores + 1) * live // cores
    part = (
        jnp.stack([ends[:-1], ends[1:]], axis=1)
        if split
        else jnp.tile(jnp.stack([0, live])[None], (cores, 1))
    )
    return *lists, part.reshape(-1).astype(jnp.int32)


def _kernel(
    row_W, block_W, page_W, part, starts_S, counts_S, layer, k_new_hbm, v_new_hbm, _k, _v, k_hbm,
    v_hbm,
    k_buf, v_buf, k_new, v_new, load_sems, store_sems,
    *, heads: int, shared: bool, page_size: int, length: int, rows: int,
):  # fmt: skip
    """One core's part of the list. first: the new token, of a row, that a page's first position is
    for; may be negative.
    """
    core = pl.program_id(0)
    begin, stop = part[2 * core], part[2 * core + 1]
    own = pl.ds(core * heads if shared else 0, heads)
    (k_window, v_window), new_window = (k_buf.shape[3], v_buf.shape[2]), k_new.shape[2]
    precision = lax.Precision.HIGHEST if k_new.dtype == jnp.float32 else None
    dot = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )

    def offset(low, window, tile):
        return pl.multiple_of(
            jnp.minimum(low // tile * tile, page_size - window), math.gcd(tile, page_size - window)
        )

    def offsets(w):
        row = row_W[w]
        first = block_W[w] * page_size - starts_S[row]
        # positions of the page that get tokens
        low, high = jnp.maximum(-first, 0), jnp.minimum(counts_S[row] - first, page_size)
        tile = 32 // v_buf.dtype.itemsize
        k_at, v_at = offset(low, k_window, LANES), offset(low, v_window, tile)
        new_at = pl.multiple_of(jnp.clip(first // rows * rows, 0, length - new_window), rows)
        return row, first, low, high, k_at, v_at, new_at

    def of_pages(w, sems, do, *, to_hbm: bool):
        k_at, v_at = offsets(w)[4:6]
        slot = (w - begin) % SLOTS
        k_at = k_hbm.at[layer[0], page_W[w], own, :, pl.ds(k_at, k_window)]
        v_at = v_hbm.at[layer[0], page_W[w], own, pl.ds(v_at, v_window), :]
        for number, (hbm, buf) in enumerate(((k_at, k_buf.at[slot]), (v_at, v_buf.at[slot]))):
            do(
                pltpu.make_async_copy(
                    *((buf, hbm) if to_hbm else (hbm, buf)), sems.at[slot, number]
                )
            )

    def loads(w, do):
        row, _, low, high, *_, new_at = offsets(w)
        slot = (w - begin) % SLOTS
        for number, (hbm, buf) in enumerate(((k_new_hbm, k_new), (v_new_hbm, v_new))):
            do(
                pltpu.make_async_copy(
                    hbm.at[row, own, pl.ds(new_at, new_window)],
                    buf.at[slot],
                    load_sems.at[slot, 2 + number],
                )
            )

        @pl.when(high - low < page_size)  # else nothing of the page is kept
        def _():
            of_pages(w, load_sems, do, to_hbm=False)

    def compute(w):
        _, first, low, high, k_at, v_at, new_at = offsets(w)
        slot = (w - begin) % SLOTS
        iota = lambda shape, axis: lax.broadcasted_iota(jnp.int32, shape, axis)
        # Each new token at its position, by a product with ones and zeros, which is exact.
        k_place = (
            iota((new_window, k_window), 0) + new_at
            == iota((new_window, k_window), 1) + k_at + first
        )
        v_place = (
            iota((v_window, new_window), 1) + new_at
            == iota((v_window, new_window), 0) + v_at + first
        )
        k_place, v_place = (jnp.where(x, 1.0, 0.0).astype(k_new.dtype) for x in (k_place, v_place))
        k_position, v_position = iota(k_buf.shape[2:], 1) + k_at, iota(v_buf.shape[2:], 0) + v_at
        for h in range(heads):
            k = dot(k_new[slot, h], k_place, (((0,), (0,)), ((), ())))
            v = dot(v_place, v_new[slot, h], (((1,), (0,)), ((), ())))
            k_buf[slot, h] = _merged(k_buf[slot, h], k, (k_position >= low) & (k_position < high))
            v_buf[slot, h] = _merged(v_buf[slot, h], v, (v_position >= low) & (v_position < high))

    start, wait = (lambda copy: copy.start()), (lambda copy: copy.wait())
    for ahead in range(2):

        @pl.when(begin + ahead < stop)
        def _(ahead=ahead):
            loads(begin + ahead, start)

    def step(w, _):
        @pl.when(w - begin >= 2)
        def _():
            of_pages(w - 2, store_sems, wait, to_hbm=True)

        @pl.when(w + 2 < stop)
        def _():
            loads(w + 2, start)

        loads(w, wait)
        compute(w)
        of_pages(w, store_sems, start, to_hbm=True)
        return 0

    lax.fori_loop(begin, stop, step, 0)
    for back in (2, 1):

        @pl.when(stop - begin >= back)
        def _(back=back):
            of_pages(stop - back, store_sems, wait, to_hbm=True)


def _merged(old, new, mask):
    """A page's values with new ones, float32 as `_numbers` has them, where the mask says."""
    if old.dtype != jnp.float8_e4m3fn:
        return jnp.where(mask, new, old.astype(jnp.float32)).astype(old.dtype)
    bits = pltpu.bitcast(old, jnp.int8).astype(jnp.int32)
    new = new.astype(jnp.int32)
    new = jnp.where(new > 127, new - 256, new)
    return pltpu.bitcast(jnp.where(mask, new, bits).astype(jnp.int8), old.dtype)
