"""The grouped product in plain jnp: the meaning that every implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def group_of_row(group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """Group of each of num_rows sorted rows, int32 [R]; E for the rows past the last group."""
    ends = jnp.cumsum(group_sizes_E)
    return jnp.sum(jnp.arange(num_rows)[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Every row times every matrix, the right product kept: E times the needed work."""
    num_groups = w_EDF.shape[0]
    one_hot_RE = jax.nn.one_hot(
        group_of_row(group_sizes_E, x_RD.shape[0]), num_groups, dtype=x_RD.dtype
    )
    return jnp.einsum("re,rd,edf->rf", one_hot_RE, x_RD, w_EDF)


def aligned_sizes(group_sizes_E: jax.Array, alignment: int) -> jax.Array:
    """Rows from each group's first one to the next group's, int32 [E]."""
    return -(-group_sizes_E // alignment) * alignment


def live_rows(group_sizes_E: jax.Array, num_rows: int, alignment: int) -> jax.Array:
    """Which rows belong to a group, where every group's first row is the sum of the aligned sizes
    before: bool [R].
    """
    aligned = aligned_sizes(group_sizes_E, alignment)
    last_E = jnp.cumsum(aligned) - aligned + group_sizes_E
    group_R = group_of_row(aligned, num_rows)
    return jnp.arange(num_rows) < last_E.at[group_R].get(mode="fill", fill_value=0)
