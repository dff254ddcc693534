"""The grouped product for CPUs: one batched product over slabs of rows, then tiles for what does
not fit.

XLA:CPU runs a batched product of [E, C, D] x [E, D, F] near its peak, and a product inside a loop
at half of it or less. So the first C rows of each group go through one batched product, C a little
above the mean group, and the rows past C, few under balanced routing, through a loop over tiles.
Exact for any group sizes; the loop's trip count follows them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.reference import group_of_row

SLACK = 1.125  # slab rows over mean group size
TILE = 128  # rows of an overflow tile, or a slab's if that is less
# standard deviations of a group's size that slabs allow for, were rows dealt at random: counts
# where groups are small
SPREAD = 1.5


def grouped_matmul(x_RD, w_EDF, group_sizes_E):
    """As api.grouped_matmul. Where rows are not more than groups, every row fetches its own matrix:
    the others are not read at all.
    """
    if len(x_RD) <= len(w_EDF):
        group_R = group_of_row(group_sizes_E, len(x_RD))
        y_RF = jnp.einsum("rd,rdf->rf", x_RD, w_EDF.at[group_R].get(mode="clip"))
        return jnp.where(group_R[:, None] < len(w_EDF), y_RF, 0)
    return _slabs(x_RD, w_EDF, group_sizes_E)


@jax.custom_vjp
def _slabs(x_RD, w_EDF, group_sizes_E):
    return _forward(x_RD, w_EDF, group_sizes_E)[0]


def _slab_rows(num_rows: int, num_groups: int) -> int:
    mean = num_rows / num_groups
    return min(num_rows, -(-int(max(mean * SLACK, mean + SPREAD * mean**0.5)) // 8) * 8)


def _layout(group_sizes_E, num_rows):
    """Rows of slab slots [E, C] (R: none), slab slots of rows [R] (E * C: not in a slab), ends of
    the groups [E].
    """
    num_groups = group_sizes_E.shape[0]
    slab = _slab_rows(num_rows, num_groups)
    ends = jnp.cumsum(group_sizes_E)
    starts = ends - group_sizes_E
    slot = jnp.arange(slab)
    rows_EC = jnp.where(slot[None] < group_sizes_E[:, None], starts[:, None] + slot[None], num_rows)
    row = jnp.arange(num_rows)
    group_R = jnp.minimum(jnp.sum(row[:, None] >= ends[None], axis=1), num_groups - 1)
    rank = row - starts[group_R]
    in_slab = (rank < slab) & (row < ends[-1])
    slots_R = jnp.where(in_slab, group_R * slab + rank, num_groups * slab)
    return rows_EC, slots_R, ends


def _tiles(group_sizes_E, num_rows):
    """Overflow tiles: their rows, their number (dynamic), and group and first row of each (static
    bound).
    """
    num_groups = group_sizes_E.shape[0]
    slab = _slab_rows(num_rows, num_groups)
    size = min(TILE, slab)
    starts = jnp.cumsum(group_sizes_E) - group_sizes_E
    over = jnp.maximum(group_sizes_E - slab, 0)
    tile_ends = jnp.cumsum(-(-over // size))
    tile = jnp.arange(num_rows // size + num_groups)
    group = jnp.minimum(jnp.sum(tile[:, None] >= tile_ends[None], axis=1), num_groups - 1)
    first_tile = tile_ends - (-(-over // size))
    return size, tile_ends[-1], group, starts[group] + slab + (tile - first_tile[group]) * size


def _tile_rows(first, end, size, num_rows):
    """Start of a tile within the rows, and which of its rows lie in [first, end): bool [size,
    1].
    """
    start = jnp.minimum(first, num_rows - size)
    row = start + jnp.arange(size)[:, None]
    return start, (row >= first) & (row < end)


def _rows(x_RD, start, size):
    return lax.dynamic_slice_in_dim(x_RD, start, size, 0)


def _gather(x_RD, rows):
    """Rows of x, zeros where the index is R."""
    return x_RD.at[rows].get(mode="fill", fill_value=0)


def _product(x_RD, w_EDF, layout, tiles, *, transposed=False):
    """x w (or x w^T) for each group, [R, F], and the slabs of x [E, C, D]."""
    rows_EC, slots_R, ends = layout
    num_rows = x_RD.shape[0]
    slabs = _gather(x_RD, rows_EC)
    y_slabs = jnp.einsum("ecf,edf->ecd" if transposed else "ecd,edf->ecf", slabs, w_EDF)
    y = _gather(y_slabs.reshape(-1, y_slabs.shape[-1]), slots_R)
    size, count, groups, firsts = tiles

    def tile(i, y):
        start, live = _tile_rows(firsts[i], ends[groups[i]], size, num_rows)
        w_DF = lax.dynamic_index_in_dim(w_EDF, groups[i], 0, keepdims=False)
        product = _rows(x_RD, start, size) @ (w_DF.T if transposed else w_DF)
        return lax.dynamic_update_slice_in_dim(
            y, jnp.where(live, product, _rows(y, start, size)), start, 0
        )

    return lax.fori_loop(0, count, tile, y), slabs


def _forward(x_RD, w_EDF, group_sizes_E):
    layout = _layout(group_sizes_E, x_RD.shape[0])
    tiles = _tiles(group_sizes_E, x_RD.shape[0])
    y, slabs = _product(x_RD, w_EDF, layout, tiles)
    return y, (x_RD, slabs, w_EDF, layout, tiles)


def _backward(residuals, dy_RF):
    x_RD, slabs, w_EDF, layout, tiles = residuals
    num_rows = x_RD.shape[0]
    dx, dy_slabs = _product(dy_RF, w_EDF, layout, tiles, transposed=True)
    dw = jnp.einsum("ecd,ecf->edf", slabs, dy_slabs)
    size, count, groups, firsts = tiles
    ends = layout[2]

    def tile(i, dw):
        start, live = _tile_rows(firsts[i], ends[groups[i]], size, num_rows)
        return dw.at[groups[i]].add(
            jnp.where(live, _rows(x_RD, start, size), 0).T @ _rows(dy_RF, start, size)
        )

    return dx, lax.fori_loop(0, count, tile, dw), None


_slabs.defvjp(_forward, _backward)
