"""Which tiles of the scores hold an allowed pair: made on the device from the segment ids, read by
the kernels as scalars.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

NONE = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tiles:
    """Per block of queries and of keys; ids of padding (0) left out of minima and maxima.

    offsets: int32 [2], where the first query and the first key stand in the row. queries: int32 [6,
    B, Q + 1]: least id, greatest id, the only id of a block without padding (else -1), first key
    block that it visits, one past the last (both 0: it visits none), and the next query block that
    visits any, of which place 0 is for the beginning and place i + 1 for block i. keys: int32 [3,
    B, M]: least, greatest, only id (else -2).
    """

    offsets: jax.Array
    queries: jax.Array
    keys: jax.Array


LEAST, GREATEST, ONLY, FIRST, STOP, NEXT = range(6)


def tiles(
    q_segment_ids_BL, kv_segment_ids_BM, q_offset, kv_offset, q_block: int, kv_block: int
) -> Tiles:
    """Exact for documents in order; where an id comes back later in the row, some tiles between are
    visited for nothing.
    """
    q_least, q_greatest, q_only = _ids(q_segment_ids_BL, q_block, -1)
    kv_least, kv_greatest, kv_only = _ids(kv_segment_ids_BM, kv_block, -2)
    visited = visits(
        q_least, q_greatest, kv_least, kv_greatest, q_offset, kv_offset, q_block, kv_block
    )
    any_visited = visited.any(-1)
    first = jnp.where(any_visited, jnp.argmax(visited, -1), 0)
    stop = jnp.where(any_visited, visited.shape[-1] - jnp.argmax(visited[..., ::-1], -1), 0)
    block = jnp.where(any_visited, jnp.arange(visited.shape[1]), visited.shape[1])
    following = jax.lax.cummin(block, axis=1, reverse=True)
    following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=visited.shape[1])
    queries = jnp.stack(
        [jnp.pad(x, ((0, 0), (0, 1))) for x in (q_least, q_greatest, q_only, first, stop)]
        + [following]
    )
    offsets = jnp.stack([jnp.asarray(q_offset, jnp.int32), jnp.asarray(kv_offset, jnp.int32)])
    return Tiles(
        offsets,
        queries.astype(jnp.int32),
        jnp.stack([kv_least, kv_greatest, kv_only]).astype(jnp.int32),
    )


def visits(
    q_least, q_greatest, kv_least, kv_greatest, q_offset, kv_offset, q_block: int, kv_block: int
):
    """bool [B, Q, M]: the ranges of ids overlap and the block's last query is not before the
    block's first key.
    """
    overlap = (kv_least[:, None] <= q_greatest[..., None]) & (
        kv_greatest[:, None] >= q_least[..., None]
    )
    last_query = q_offset + (jnp.arange(q_least.shape[1]) + 1) * q_block - 1
    first_key = kv_offset + jnp.arange(kv_least.shape[1]) * kv_block
    return overlap & (first_key <= last_query[:, None])


def _ids(segment_ids_BL, block: int, several: int):
    """Least, greatest and only id of each block, [B, L / block]."""
    ids = segment_ids_BL.reshape(segment_ids_BL.shape[0], -1, block)
    least, greatest = jnp.min(jnp.where(ids > 0, ids, NONE), -1), jnp.max(ids, -1)
    greatest = jnp.where(greatest > 0, greatest, -1)
    return (
        least,
        greatest,
        jnp.where((jnp.min(ids, -1) == greatest) & (greatest > 0), greatest, several),
    )
