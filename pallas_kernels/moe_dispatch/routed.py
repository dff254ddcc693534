"""The routed feed-forward by the TPU kernels, forward and backward as one operation: gathers and
SwiGLU inside of the products, the weighted sum of a token's rows inside of the combine.

With out_t = sum over the rows r of token t of w_r y_r, y_r = h_r down, h = silu(gate) * up and u_r
= dout_t down^T: dweights_r = u_r h_r, so that y is not needed; dh_r = w_r u_r; down's gradient is
the sum of (w_r h_r)^T dout_t.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import few_rows, few_rows_shapes, kernel
from pallas_kernels.grouped_matmul.gather import Gathered
from pallas_kernels.grouped_matmul.rows import pack
from pallas_kernels.grouped_matmul.shapes import TILE, blocks_for
from pallas_kernels.grouped_matmul.tiles import buffer_rows, row_tiles
from pallas_kernels.grouped_matmul.weight_gradient import weight_gradient
from pallas_kernels.moe_dispatch import few_tokens
from pallas_kernels.moe_dispatch.sorting import (
    Dispatch,
    gather_rows,
    sort_by_expert,
    source_tokens,
    sum_words,
    take,
)

FEW_PAIRS = 2048  # of token and expert, up to which reading matrices is all that costs


@jax.custom_vjp
def routed_ffn(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD):
    """As api.routed_ffn with `pallas`."""
    matrices = gate_EDF, up_EDF, down_EFD
    if expert_TK.size <= FEW_PAIRS:
        return _few(x_TD, expert_TK, weights_TK, *matrices)
    matrices = in_type(matrices, x_TD.dtype)
    return _whole(x_TD, plan_rows(expert_TK, len(matrices[2])), weights_TK, matrices, keep=False)[0]


def plan_rows(expert_TK, num_experts: int, alignment: int = TILE) -> Dispatch:
    """The sort, pairs without an expert in no row: what the kernels leave there is unwritten
    memory.
    """
    plan = sort_by_expert(expert_TK, num_experts, alignment)
    known = (expert_TK >= 0) & (expert_TK < num_experts)
    source_R = jnp.where(take(known.reshape(-1), plan.source_R), plan.source_R, -1)
    return dataclasses.replace(
        plan,
        source_R=source_R,
        slot_TK=jnp.where(known, plan.slot_TK, -1),
        whole=False,
        pallas=True,
    )


def in_type(matrices, dtype, *, differentiable: bool = False) -> list[jax.Array]:
    """Matrices in a type. Raises ValueError for quantised ones where there is to be a gradient."""
    for w in matrices:
        if differentiable and hasattr(w, "scale"):
            raise ValueError(
                f"routed_ffn: matrices of type {w.values.dtype} in blocks of {w.block} have no"
                " gradient: dequantise them"
            )
    return [w.astype(dtype) for w in matrices]


def forward(x_words, tokens_R, plan: Dispatch, weights_R, matrices, dtype, *, keep: bool):
    """(w_r h_r) down of each row as words [R, 1, W], weights None: 1; and with `keep` gate and up
    of each row.

    x_words: of tokens and one of zeros after; tokens_R: the token of each row, -1: none; plan: as
    plan_rows makes it.
    """
    gate_EDF, up_EDF, down_EFD = matrices
    ffn, width = down_EFD.shape[1:]
    tiles = row_tiles(plan.group_sizes_E, len(plan.source_R), TILE)
    x_RD = Gathered(x_words, tokens_R, dtype)
    h_RF, *kept = kernel.swiglu(
        x_RD,
        gate_EDF,
        up_EDF,
        tiles,
        weights_R,
        keep=keep,
        blocks=blocks_for("swiglu", width, ffn, dtype),
    )
    return (
        kernel.matmul(
            h_RF, down_EFD, tiles, words=True, blocks=blocks_for("matmul", ffn, width, dtype)
        ),
        kept,
    )


def backward(x_words, dout_words, tokens_R, plan: Dispatch, weights_R, matrices, kept, dtype):
    """Gradients of rows as words, of their weights, and of the matrices. dout_words: of tokens, and
    one of zeros after.
    """
    (gate_EDF, up_EDF, down_EFD), (gate_RF, up_RF) = matrices, kept
    ffn, width = down_EFD.shape[1:]
    tiles = row_tiles(plan.group_sizes_E, len(plan.source_R), TILE)
    x_RD, dout_RD = (Gathered(words, tokens_R, dtype) for words in (x_words, dout_words))
    dgate_RF, dup_RF, hw_RF, dweights_R = kernel.swiglu_backward(
        dout_RD,
        down_EFD,
        gate_RF,
        up_RF,
        weights_R,
        tiles,
        blocks=blocks_for("swiglu_backward", width, ffn, dtype),
    )
    dx = kernel.two_matmul(
        dgate_RF,
        dup_RF,
        gate_EDF,
        up_EDF,
        tiles,
        words=True,
        blocks=blocks_for("two_matmul", ffn, width, dtype),
    )
    blocks = blocks_for("gathered_x_gradient", width, ffn, dtype)
    dgate_EDF, dup_EDF = (
        weight_gradient(x_RD, d_RF, tiles, blocks=blocks) for d_RF in (dgate_RF, dup_RF)
    )
    ddown_EFD = weight_gradient(
        hw_RF, dout_RD, tiles, blocks=blocks_for("gathered_dy_gradient", ffn, width, dtype)
    )
    return dx, dweights_R, (dgate_EDF, dup_EDF, ddown_EFD)


def _whole(x_TD, plan: Dispatch, weights_TK, matrices, *, keep: bool):
    y, kept = forward(
        pack(x_TD, zeros=1), source_tokens(plan), plan, None, matrices, x_TD.dtype, keep=keep
    )
    return sum_words(y, weights_TK, plan, width=x_TD.shape[1], dtype=x_TD.dtype), kept


def _forward(x_TD, expert_TK, weights_TK, *matrices):
    typed = in_type(matrices, x_TD.dtype, differentiable=True)
    plan = plan_rows(expert_TK, len(typed[2]))
    y_TD, kept = _whole(x_TD, plan, weights_TK, typed, keep=True)
    return y_TD, (x_TD, weights_TK, matrices, plan, kept)


def _backward(residuals, dout_TD):
    x_TD, weights_TK, matrices, plan, kept = residuals
    dtype, tokens_R = x_TD.dtype, source_tokens(plan)
    ones = (
        jnp.ones(plan.slot_TK.shape, jnp.float32)
        if weights_TK is None
        else weights_TK.astype(jnp.float32)
    )
    weights_R = take(ones.reshape(-1), plan.source_R)
    words = pack(x_TD, zeros=1), pack(dout_TD, zeros=1)
    dx, dweights_R, gradients = backward(
        *words, tokens_R, plan, weights_R, in_type(matrices, dtype), kept, dtype
    )
    dx_TD = sum_words(dx, None, plan, width=x_TD.shape[1], dtype=dtype)
    dweights_TK = (
        None if weights_TK is None else take(dweights_R, plan.slot_TK).astype(weights_TK.dtype)
    )
    return (
        dx_TD,
        None,
        dweights_TK,
        *(d.astype(w.dtype) for d, w in zip(gradients, matrices, strict=True)),
    )


routed_ffn.defvjp(_forward, _backward)


def _few(x_TD, expert_TK, weights_TK, gate, up, down):
    """Decoding: every chosen expert's matrices are read once, quantised ones as they are."""
    num_experts = down.shape[0]
    alignment = few_rows_shapes.alignment_for(expert_TK.size, num_experts, x_TD.dtype)
    num_rows = buffer_rows(expert_TK.size, num_experts, alignment)
    if few_tokens.takes(len(x_TD), num_rows, x_TD.shape[1], x_TD.dtype):
        x_RD, slot_TK, sizes_E = few_tokens.dispatch(
            x_TD,
            expert_TK,
            num_groups=num_experts,
            num_rows=num_rows,
            alignment=alignment,
            words=False,
        )
        y_RD = few_products(x_RD, few_rows.steps_of(sizes_E, alignment), alignment, gate, up, down)
        return few_tokens.combine(y_RD, slot_TK, weights_TK, width=x_TD.shape[1], dtype=x_TD.dtype)
    plan = dataclasses.replace(plan_rows(expert_TK, num_experts, alignment), pallas=False)
    y_RD = few_products(
        gather_rows(x_TD, plan),
        few_rows.steps_of(plan.group_sizes_E, alignment),
        alignment,
        gate,
        up,
        down,
    )
    y_TKD = take(y_RD, plan.slot_TK).astype(jnp.float32)
    y_TD = (
        jnp.sum(y_TKD, axis=1)
        if weights_TK is None
        else jnp.einsum("tk,tkd->td", weights_TK.astype(jnp.float32), y_TKD)
    )
    return y_TD.astype(x_TD.dtype)


def few_products(x_RD, steps_4E, alignment: int, gate, up, down):
    """down(silu(gate(x)) * up(x)) of a small batch of rows sorted by expert, as few_rows.steps_of
    says.
    """
    ffn, width = down.shape[1:]
    (gate, gate_scale, first), (up, up_scale, _), (down, down_scale, _) = (
        few_rows.operands(w, x_RD.dtype) for w in (gate, up, down)
    )
    h_RF = few_rows.few_rows_swiglu(
        x_RD, gate, up, steps_4E, gate_scale=gate_scale, up_scale=up_scale, first=first,
        alignment=alignment,
        blocks=few_rows_shapes.blocks_for(width, ffn, 2, gate.dtype),
    )  # fmt: skip
    blocks = few_rows_shapes.blocks_for(ffn, width, 1, down.dtype)
    return few_rows.few_rows_matmul(
        h_RF, down, steps_4E, scale=down_scale, first=first, alignment=alignment, blocks=blocks
    )
