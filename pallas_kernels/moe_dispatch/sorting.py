"""Rows sorted by expert: which pair stands where, and the ways of values there and back."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.rows import pack
from pallas_kernels.grouped_matmul.tiles import buffer_rows
from pallas_kernels.moe_dispatch import kernel
from pallas_kernels.moe_dispatch.shapes import blocks_for
from pallas_kernels.target import target_platform

RANK_BLOCK = 128  # rows that are compared with each other
# numbers that are compared with as many others faster than XLA looks them up; RANK_BLOCK elsewhere
FEW = {"tpu": 512}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("source_R", "slot_TK", "group_sizes_E"),
    meta_fields=("whole", "pallas"),
)
@dataclasses.dataclass
class Dispatch:
    """Which of the T * K (token, choice) pairs stands in each row, and in which row each pair
    stands.

    source_R: pair (t * K + k) of each row, -1: none. slot_TK: row of each pair, -1: none.
    group_sizes_E: rows of each expert.
    whole: there is no -1. pallas: rows are summed by the TPU kernel.
    """

    source_R: jax.Array
    slot_TK: jax.Array
    group_sizes_E: jax.Array
    whole: bool = True
    pallas: bool = False


def sort_by_expert(expert_TK: jax.Array, num_experts: int, alignment: int = 1) -> Dispatch:
    """Stable counting sort: histogram, prefix sums, ranks. Every expert's rows start at a multiple
    of alignment.

    Any index outside 0..E-1 means: no expert here; such pairs stand after all groups.
    """
    pairs = expert_TK.reshape(-1)
    pairs = jnp.where((pairs >= 0) & (pairs < num_experts), pairs, num_experts)
    num_pairs = pairs.shape[0]
    num_rows = buffer_rows(num_pairs, num_experts, alignment)
    if few(num_pairs):
        before = jnp.tril(pairs[:, None] == pairs, k=-1)
        sizes = jnp.sum(pairs[:, None] == jnp.arange(num_experts + 1), axis=0, dtype=jnp.int32)
        slot = jnp.sum(before, axis=1, dtype=jnp.int32) + starts(
            -(-sizes // alignment) * alignment, pairs
        )
        return Dispatch(
            pair_in(slot, num_rows), slot.reshape(expert_TK.shape), sizes[:-1], whole=alignment == 1
        )
    padded = jnp.pad(pairs, (0, -num_pairs % RANK_BLOCK), constant_values=num_experts).reshape(
        -1, RANK_BLOCK
    )
    before = jnp.tril(jnp.ones((RANK_BLOCK, RANK_BLOCK), bool), k=-1)
    rank_in_block = jnp.sum((padded[:, :, None] == padded[:, None, :]) & before, axis=-1)
    block_counts = jnp.sum(padded[..., None] == jnp.arange(num_experts + 1), axis=1)
    sizes = jnp.sum(block_counts, axis=0)
    taken = sizes if alignment == 1 else -(-sizes // alignment) * alignment
    first_row = jnp.cumsum(taken) - taken
    rows_before = jnp.cumsum(block_counts, axis=0) - block_counts + first_row
    slot = (rank_in_block + jnp.take_along_axis(rows_before, padded, axis=1)).reshape(-1)[
        :num_pairs
    ]
    source = jnp.full(num_rows, 0 if alignment == 1 else -1, jnp.int32)
    source = source.at[slot].set(jnp.arange(num_pairs, dtype=jnp.int32), unique_indices=True)
    return Dispatch(source, slot.reshape(expert_TK.shape), sizes[:-1], whole=alignment == 1)


def few(*counts: int) -> bool:
    """Whether numbers are compared with each other instead of looked up, in the current trace."""
    return max(counts) <= FEW.get(target_platform(), RANK_BLOCK)


def starts(sizes_G: jax.Array, group: jax.Array) -> jax.Array:
    """Sum of the sizes of all groups before one; 0 for group -1."""
    if few(group.size):
        return jnp.sum(jnp.where(jnp.arange(len(sizes_G)) < group[..., None], sizes_G, 0), axis=-1)
    return take(jnp.cumsum(sizes_G) - sizes_G, group)


def pair_in(slot_P: jax.Array, num_rows: int) -> jax.Array:
    """Which of few pairs has each slot, -1: none."""
    pair = jnp.arange(1, len(slot_P) + 1, dtype=jnp.int32)
    return jnp.sum(jnp.where(slot_P == jnp.arange(num_rows)[:, None], pair, 0), axis=1) - 1


def source_tokens(dispatch: Dispatch) -> jax.Array:
    """The token of every row, int32 [R]; -1: none."""
    return dispatch.source_R // dispatch.slot_TK.shape[1]  # rounds down: -1 stays -1


@jax.custom_vjp
def gather_rows(x_TD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """The token of every row, [R, D]; any token where there is none, as a mask over all rows is not
    free. The gradient is a gather, too, and no scatter: a sum over each token's rows.
    """
    return _gather_rows(x_TD, dispatch)[0]


def _gather_rows(x_TD, dispatch):
    return _take_any(x_TD, source_tokens(dispatch)), dispatch


def _gather_rows_backward(dispatch, dx_RD):
    return sum_rows(dx_RD, None, dispatch), None


gather_rows.defvjp(_gather_rows, _gather_rows_backward)


@jax.custom_vjp
def gather_weights(weights_TK: jax.Array, dispatch: Dispatch) -> jax.Array:
    """The weight of every row's pair, [R]; any weight where there is none. The gradient is a
    gather, too.
    """
    return _take_any(weights_TK.reshape(-1), dispatch.source_R)


gather_weights.defvjp(
    lambda weights_TK, dispatch: (gather_weights(weights_TK, dispatch), dispatch),
    lambda dispatch, d_R: (_take(d_R, dispatch.slot_TK, dispatch), None),
)


@jax.custom_vjp
def combine_rows(y_RD: jax.Array, weights_TK: jax.Array | None, dispatch: Dispatch) -> jax.Array:
    """y_t = sum_k weights_tk y_row(t, k), [T, D]; weights None: 1."""
    return sum_rows(y_RD, weights_TK, dispatch)


def _combine_rows(y_RD, weights_TK, dispatch):
    return sum_rows(y_RD, weights_TK, dispatch), (y_RD, weights_TK, dispatch)


def _combine_rows_backward(residuals, dout_TD):
    y_RD, weights_TK, dispatch = residuals
    dout_RD = gather_rows(dout_TD, dispatch)
    if weights_TK is None:
        return dout_RD, None, None
    dweights_R = jnp.sum(y_RD.astype(jnp.float32) * dout_RD.astype(jnp.float32), axis=-1)
    dy_RD = dout_RD * _take_any(weights_TK.reshape(-1), dispatch.source_R)[:, None].astype(
        y_RD.dtype
    )
    return dy_RD, _take(dweights_R, dispatch.slot_TK, dispatch).astype(weights_TK.dtype), None


combine_rows.defvjp(_combine_rows, _combine_rows_backward)


def sum_rows(y_RD, weights_TK, dispatch: Dispatch) -> jax.Array:
    """combine_rows without a gradient."""
    if dispatch.pallas:
        return sum_words(pack(y_RD), weights_TK, dispatch, width=y_RD.shape[1], dtype=y_RD.dtype)
    y_TKD = _take(y_RD, dispatch.slot_TK, dispatch)
    if weights_TK is None:
        return jnp.sum(y_TKD, axis=1)
    return jnp.einsum("tk,tkd->td", weights_TK.astype(y_RD.dtype), y_TKD)


def sum_words(words_R1W, weights_TK, dispatch: Dispatch, *, width: int, dtype) -> jax.Array:
    """sum_rows of rows [R, width] in dtype that come as words (grouped_matmul/rows.py), by the TPU
    kernel.
    """
    blocks = blocks_for(dispatch.slot_TK.shape[1], width, dtype)
    return kernel.combine(
        words_R1W, dispatch.slot_TK, weights_TK, width=width, dtype=dtype, blocks=blocks
    )


def take(x, index):
    """x at the indices along its first axis; zeros at -1."""
    if x.ndim == 1 and few(len(x), index.size):
        return jnp.sum(jnp.where(index[..., None] == jnp.arange(len(x)), x, 0), axis=-1)
    return jnp.asarray(x).at[jnp.where(index < 0, len(x), index)].get(mode="fill", fill_value=0)


def _take(x, index, dispatch: Dispatch):
    return x[index] if dispatch.whole else take(x, index)


def _take_any(x, index):
    """x at the indices along its first axis; something of it, or zeros, at -1."""
    return (
        take(x, index)
        if x.ndim == 1 and few(len(x), index.size)
        else jnp.asarray(x).at[jnp.maximum(index, 0)].get(mode="clip")
    )
