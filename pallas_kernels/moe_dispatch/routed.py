"""The routed feed-forward by the TPU kernels, forward and backward as one operation: gathers and SwiGLU inside of the products, the
weighted sum of a token's rows inside of the way back.

With out_t = sum over the rows r of token t of w_r y_r, y_r = h_r down, h = silu(gate) * up and u_r = dout_t down^T:
dweights_r = u_r h_r, so that y is not needed; dh_r = w_r u_r; down's gradient is the sum of (w_r h_r)^T dout_t.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import few_rows, few_rows_shapes, kernel
from pallas_kernels.grouped_matmul.gather import gathered
from pallas_kernels.grouped_matmul.shapes import TILE, blocks_for
from pallas_kernels.grouped_matmul.tiles import row_tiles
from pallas_kernels.grouped_matmul.weight_gradient import weight_gradient
from pallas_kernels.moe_dispatch.sorting import Dispatch, gather_rows, sort_by_expert, source_tokens, sum_words, take

FEW_PAIRS = 2048  # of token and expert, up to which reading matrices is all that costs


@jax.custom_vjp
def routed_ffn(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD):
    """As api.routed_ffn with `pallas`."""
    if expert_TK.size <= FEW_PAIRS:
        return _few(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD)
    matrices = [w.astype(x_TD.dtype) for w in (gate_EDF, up_EDF, down_EFD)]
    return _many(x_TD, expert_TK, weights_TK, *matrices, keep=False)[0]


def _plan(expert_TK, num_experts: int, alignment: int) -> Dispatch:
    """The sort, pairs without an expert in no row: what the kernels leave there is unwritten memory."""
    plan = sort_by_expert(expert_TK, num_experts, alignment)
    known = (expert_TK >= 0) & (expert_TK < num_experts)
    source_R = jnp.where(take(known.reshape(-1), plan.source_R), plan.source_R, -1)
    return dataclasses.replace(plan, source_R=source_R, slot_TK=jnp.where(known, plan.slot_TK, -1), whole=False, pallas=True)


def _many(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD, *, keep: bool):
    """y [T, D], and with `keep` what the backward pass takes: the plan, gate and up of each row."""
    num_experts, ffn, width = down_EFD.shape
    plan = _plan(expert_TK, num_experts, TILE)
    tiles = row_tiles(plan.group_sizes_E, len(plan.source_R), TILE)
    x_RD = gathered(x_TD, source_tokens(plan))
    h_RF, *kept = kernel.swiglu(x_RD, gate_EDF, up_EDF, tiles, keep=keep, blocks=blocks_for("swiglu", width, ffn, x_TD.dtype))
    y = kernel.matmul(h_RF, down_EFD, tiles, words=True, blocks=blocks_for("matmul", ffn, width, x_TD.dtype))
    return sum_words(y, weights_TK, plan, width=width, dtype=x_TD.dtype), (plan, *kept)


def _forward(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD):
    matrices = gate_EDF, up_EDF, down_EFD
    for w in matrices:
        if hasattr(w, "scale"):
            raise ValueError(f"routed_ffn: matrices of type {w.values.dtype} in blocks of {w.block} have no gradient: dequantise them")
    y_TD, kept = _many(x_TD, expert_TK, weights_TK, *(w.astype(x_TD.dtype) for w in matrices), keep=True)
    return y_TD, (x_TD, weights_TK, matrices, kept)


def _backward(residuals, dout_TD):
    x_TD, weights_TK, matrices, (plan, gate_RF, up_RF) = residuals
    gate_EDF, up_EDF, down_EFD = (w.astype(x_TD.dtype) for w in matrices)
    ffn, width = down_EFD.shape[1:]
    tiles, dtype = row_tiles(plan.group_sizes_E, len(plan.source_R), TILE), x_TD.dtype
    tokens_R = source_tokens(plan)
    x_RD, dout_RD = gathered(x_TD, tokens_R), gathered(dout_TD, tokens_R)
    ones = jnp.ones(plan.slot_TK.shape, jnp.float32) if weights_TK is None else weights_TK.astype(jnp.float32)
    dgate_RF, dup_RF, hw_RF, dweights_R = kernel.swiglu_backward(
        dout_RD, down_EFD, gate_RF, up_RF, take(ones.reshape(-1), plan.source_R), tiles,
        blocks=blocks_for("swiglu_backward", width, ffn, dtype),
    )  # fmt: skip
    dx = kernel.two_matmul(dgate_RF, dup_RF, gate_EDF, up_EDF, tiles, words=True, blocks=blocks_for("two_matmul", ffn, width, dtype))
    dx_TD = sum_words(dx, None, plan, width=width, dtype=dtype)
    blocks = blocks_for("gathered_x_gradient", width, ffn, dtype)
    dgate_EDF, dup_EDF = (weight_gradient(x_RD, d_RF, tiles, blocks=blocks) for d_RF in (dgate_RF, dup_RF))
    ddown_EFD = weight_gradient(hw_RF, dout_RD, tiles, blocks=blocks_for("gathered_dy_gradient", ffn, width, dtype))
    dweights_TK = None if weights_TK is None else take(dweights_R, plan.slot_TK).astype(weights_TK.dtype)
    gradients = (d.astype(w.dtype) for d, w in zip((dgate_EDF, dup_EDF, ddown_EFD), matrices, strict=True))
    return dx_TD, None, dweights_TK, *gradients


routed_ffn.defvjp(_forward, _backward)


def _few(x_TD, expert_TK, weights_TK, gate, up, down):
    """Decoding: every chosen expert's matrices are read once, quantised ones as they are."""
    num_experts, ffn, width = down.shape
    alignment = few_rows_shapes.alignment_for(expert_TK.size, num_experts, x_TD.dtype)
    plan = dataclasses.replace(_plan(expert_TK, num_experts, alignment), pallas=False)
    (gate, gate_scale, first), (up, up_scale, _), (down, down_scale, _) = (few_rows.operands(w, x_TD.dtype) for w in (gate, up, down))
    h_RF = few_rows.few_rows_swiglu(
        gather_rows(x_TD, plan), gate, up, plan.group_sizes_E, gate_scale=gate_scale, up_scale=up_scale, first=first,
        alignment=alignment, blocks=few_rows_shapes.blocks_for(width, ffn, 2, gate.dtype),
    )  # fmt: skip
    blocks = few_rows_shapes.blocks_for(ffn, width, 1, down.dtype)
    y_RD = few_rows.few_rows_matmul(
        h_RF, down, plan.group_sizes_E, scale=down_scale, first=first, alignment=alignment, blocks=blocks
    )  # fmt: skip
    y_TKD = take(y_RD, plan.slot_TK).astype(jnp.float32)
    y_TD = jnp.sum(y_TKD, axis=1) if weights_TK is None else jnp.einsum("tk,tkd->td", weights_TK.astype(jnp.float32), y_TKD)
    return y_TD.astype(x_TD.dtype)
