"""From top-k expert indices to rows sorted by expert, and back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

RANK_BLOCK = 128  # rows that are compared with each other


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dispatch:
    """A stable sort of the R = T * K (token, choice) pairs by expert.

    source_R: pair (t * K + k) that stands in each sorted row. slot_TK: sorted row of each pair. group_sizes_E: rows of
    each expert; pairs whose expert is not in 0..E-1 stand behind all groups.
    """

    source_R: jax.Array
    slot_TK: jax.Array
    group_sizes_E: jax.Array


def sort_by_expert(expert_TK: jax.Array, num_experts: int) -> Dispatch:
    """Counting sort: histogram, prefix sums, ranks. Any index outside 0..E-1 means: no expert here."""
    pairs = expert_TK.reshape(-1)
    pairs = jnp.where((pairs >= 0) & (pairs < num_experts), pairs, num_experts)
    num_rows = pairs.shape[0]
    padded = jnp.pad(pairs, (0, -num_rows % RANK_BLOCK), constant_values=num_experts).reshape(-1, RANK_BLOCK)
    before = jnp.tril(jnp.ones((RANK_BLOCK, RANK_BLOCK), bool), k=-1)
    rank_in_block = jnp.sum((padded[:, :, None] == padded[:, None, :]) & before, axis=-1)
    block_counts = jnp.sum(padded[..., None] == jnp.arange(num_experts + 1), axis=1)
    sizes = jnp.sum(block_counts, axis=0)
    first_row = jnp.cumsum(sizes) - sizes
    rows_before = jnp.cumsum(block_counts, axis=0) - block_counts + first_row
    slot = (rank_in_block + jnp.take_along_axis(rows_before, padded, axis=1)).reshape(-1)[:num_rows]
    source = jnp.zeros(num_rows, jnp.int32).at[slot].set(jnp.arange(num_rows, dtype=jnp.int32), unique_indices=True)
    return Dispatch(source, slot.reshape(expert_TK.shape), sizes[:-1])


@jax.custom_vjp
def gather_rows(x_TD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """The token of every sorted row, [R, D]. The gradient is a gather, too, and no scatter: a sum over each token's rows."""
    return _gather_rows(x_TD, dispatch)[0]


def _gather_rows(x_TD, dispatch):
    return x_TD[dispatch.source_R // dispatch.slot_TK.shape[1]], dispatch


def _gather_rows_backward(dispatch, dx_RD):
    return jnp.sum(dx_RD[dispatch.slot_TK], axis=1), None


gather_rows.defvjp(_gather_rows, _gather_rows_backward)


@jax.custom_vjp
def combine_rows(y_RD: jax.Array, weights_TK: jax.Array, dispatch: Dispatch) -> jax.Array:
    """y_t = sum_k weights_tk y_row(t, k), [T, D]."""
    return _combine_rows(y_RD, weights_TK, dispatch)[0]


def _combine_rows(y_RD, weights_TK, dispatch):
    out = jnp.einsum("tk,tkd->td", weights_TK.astype(y_RD.dtype), y_RD[dispatch.slot_TK])
    return out, (y_RD, weights_TK, dispatch)


def _combine_rows_backward(residuals, dout_TD):
    y_RD, weights_TK, dispatch = residuals
    dout_RD = gather_rows(dout_TD, dispatch)
    dweights_R = jnp.sum(y_RD.astype(jnp.float32) * dout_RD.astype(jnp.float32), axis=-1)
    dy_RD = dout_RD * weights_TK.reshape(-1)[dispatch.source_R, None].astype(y_RD.dtype)
    return dy_RD, dweights_R[dispatch.slot_TK].astype(weights_TK.dtype), None


combine_rows.defvjp(_combine_rows, _combine_rows_backward)
