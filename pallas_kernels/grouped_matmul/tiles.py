"""Rows sorted by expert, every expert's first row at a multiple of a row tile: which tiles are
whose, and in which steps they pass.

A tile then has one matrix: no masks, no tile computed twice. What it costs are the rows between,
half a tile an expert.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTiles:
    """Tiles of a buffer of R rows, int32.

    expert: of each tile, [R / tile]; those of tiles past the used ones mean nothing. used: number
    of tiles that have rows, [1].
    first: first tile of each expert, [E]. sizes: rows of each expert, [E]. tile: rows of a tile.
    """

    expert: jax.Array
    used: jax.Array
    first: jax.Array
    sizes: jax.Array
    tile: int = dataclasses.field(metadata={"static": True})

    @property
    def rows(self) -> int:
        return len(self.expert) * self.tile


class Steps(NamedTuple):
    """What a kernel's steps take, int32 [steps], read as scalars: `count` tiles of `expert` from
    `tile` on. run: number of experts before this one; following: the next one, -1 after the last.
    """

    tile: jax.Array
    count: jax.Array
    expert: jax.Array
    run: jax.Array
    following: jax.Array


def buffer_rows(num_rows: int, num_experts: int, tile: int) -> int:
    """Rows of a buffer that holds num_rows rows, each expert's from a multiple of tile on, however
    num_experts experts share them.
    """
    return -(-(num_rows + min(num_experts, num_rows) * (tile - 1)) // tile) * tile


def row_tiles(group_sizes_E: jax.Array, num_rows_buffer: int, tile: int) -> RowTiles:
    """Tiles of a buffer of num_rows_buffer rows: a multiple of tile, at least the sizes' sum with
    each rounded up to tile.
    """
    if num_rows_buffer % tile:
        raise ValueError(f"num_rows_buffer={num_rows_buffer} is no multiple of tile={tile}")
    sizes = group_sizes_E.astype(jnp.int32)
    counts = -(-sizes // tile)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    return RowTiles(_owner(ends, num_rows_buffer // tile), ends[-1:], ends - counts, sizes, tile)


def row_steps(
    tiles: RowTiles, size: int, *, join: bool, visit_empty: bool
) -> tuple[Steps, jax.Array]:
    """Steps of `size` tiles and their number; an expert's last step has what is left.

    join: tiles that are left over after an expert's steps of `size` join the last of those.
    visit_empty: experts without rows get a step of 0 tiles.
    """
    counts = -(-tiles.sizes // tiles.tile)
    steps = -(-counts // size)
    if join:
        steps = jnp.where(counts > size, counts // size, steps)
    if visit_empty:
        steps = jnp.maximum(steps, 1)
    ends = jnp.cumsum(steps, dtype=jnp.int32)
    bound = len(tiles.expert) + (len(steps) if visit_empty else 0)
    expert = _owner(ends, bound)
    index = jnp.arange(bound, dtype=jnp.int32) - (ends - steps)[expert]
    count = jnp.where(index == steps[expert] - 1, counts[expert] - index * size, size)
    visited = steps > 0
    # The next visited expert: the least index among those after, by a running minimum from the
    # end.
    at_or_after = jax.lax.cummin(
        jnp.where(visited, jnp.arange(len(steps), dtype=jnp.int32), len(steps)), reverse=True
    )
    after = jnp.concatenate([at_or_after[1:], jnp.full(1, len(steps), jnp.int32)])
    after = jnp.where(after == len(steps), -1, after)
    run = jnp.cumsum(visited, dtype=jnp.int32) - visited
    return Steps(
        tiles.first[expert] + index * size, count, expert, run[expert], after[expert]
    ), ends[-1]


def most_tiles(size: int, *, join: bool) -> int:
    """Tiles that a step of row_steps has at most."""
    return 2 * size - 1 if join else size


def bodies_of_step(most: int, granule: int) -> list[range]:
    """Numbers of tiles of a step, 1 to most, by the body of a kernel that takes them: one for each
    multiple of granule.
    """
    return [
        range(max(last - granule, 0) + 1, last + 1)
        for last in range(granule, most + granule, granule)
    ]


def _owner(ends_E, num: int):
    """Whose range each of num indices lies in; the last one's after all."""
    owner = jnp.sum(
        jnp.arange(num, dtype=jnp.int32)[:, None] >= ends_E[None], axis=1, dtype=jnp.int32
    )
    return jnp.minimum(owner, len(ends_E) - 1)
