"""The routed experts of one device: from top-k expert indices to rows sorted by expert, through
their feed-forwards, and back.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import interpret
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.moe_dispatch import reference, routed
from pallas_kernels.moe_dispatch.sorting import Dispatch, combine_rows, gather_rows, sort_by_expert
from pallas_kernels.target import target_platform

__all__ = [
    "IMPLEMENTATIONS",
    "Dispatch",
    "Quantized",
    "combine_rows",
    "gather_rows",
    "routed_ffn",
    "sort_by_expert",
]

IMPLEMENTATIONS = ("auto", "reference", "batched", "ragged_dot", "pallas", "mosaic_gpu")
# an expert, from which on one product for gate and up pays for writing their matrices side by side
MANY_ROWS = 64


class InStack(Protocol):
    """One layer's matrices [E, D, F] where they lie in a stack of all layers': arrays, or quantised
    ones.
    """

    stack: jax.Array | Quantized
    layer: jax.Array
    shape: tuple[int, ...]

    def astype(self, dtype) -> jax.Array: ...


class Quantized(Protocol):
    """A stack of matrices [E, D, F] in few bits: values times the scale of their block [D /
    block[0], F / block[1]].
    """

    values: jax.Array
    scale: jax.Array
    block: tuple[int, int]
    shape: tuple[int, ...]

    def astype(self, dtype) -> jax.Array: ...


def routed_ffn(
    x_TD: jax.Array,
    expert_TK: jax.Array,
    weights_TK: jax.Array | None,
    gate_EDF: jax.Array | Quantized | InStack,
    up_EDF: jax.Array | Quantized | InStack,
    down_EFD: jax.Array | Quantized | InStack,
    *,
    implementation: str,
) -> jax.Array:
    """y_t = sum_k weights_tk down_e(silu(gate_e(x_t)) * up_e(x_t)), e = expert_tk.

    Args:
      x_TD: tokens, [T, D].
      expert_TK: int32; an index outside of 0..E-1 means: no expert, which adds nothing.
      weights_TK: float; None: 1.
      gate_EDF, up_EDF, down_EFD: matrices in x's type, or quantised or in a stack, which have no
        gradient.
      implementation: `pallas` for TPU: bfloat16 or float32, D and F multiples of 128. Without a
        gradient to come, up to routed.FEW_PAIRS rows (T * K) go through kernels that read each
        chosen matrix once, where it lies, FP8 in 128 x 128 blocks and int8 in columns as they are;
        where rows are more they are converted to x's type first, as every other implementation
        does. `batched` for CPUs, `ragged_dot` for GPUs, `mosaic_gpu` for Hopper GPUs, `reference`;
        `auto`: pallas on a TPU, batched on a CPU, else ragged_dot.

    Returns:
      [T, D] in x's type. Differentiable in x, weights and matrices; their gradients come in their
      own types.

    Raises:
      ValueError: for an unknown implementation, shapes that do not fit, and what the implementation
        does not take.
    """
    implementation = chosen(implementation)
    _check_shapes(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD)
    x_TD, expert_TK = jnp.asarray(x_TD), jnp.asarray(expert_TK)
    if implementation == "pallas":
        _check_pallas(x_TD, *down_EFD.shape[1:])
        return routed.routed_ffn(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD)
    matrices = [w.astype(x_TD.dtype) for w in (gate_EDF, up_EDF, down_EFD)]
    if implementation == "reference":
        return reference.routed_ffn(x_TD, expert_TK, weights_TK, *matrices)
    return _sorted(x_TD, expert_TK, weights_TK, *matrices, implementation=implementation)


def chosen(implementation: str) -> str:
    """The implementation that a name means in the current trace. Raises ValueError for an unknown
    name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"grouped_matmul={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation != "auto":
        return implementation
    return {"cpu": "batched", "tpu": "pallas"}.get(target_platform(), "ragged_dot")


def _sorted(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD, *, implementation: str):
    """By XLA: rows are gathered, three grouped products or two, rows are combined."""
    num_experts = down_EFD.shape[0]
    plan = sort_by_expert(expert_TK, num_experts)
    x_RD = checkpoint_name(gather_rows(x_TD, plan), "expert_rows")

    def product(x, w):
        return checkpoint_name(
            grouped_matmul(x, w, plan.group_sizes_E, implementation=implementation),
            "expert_products",
        )

    if len(x_RD) < MANY_ROWS * num_experts:
        gate_RF, up_RF = product(x_RD, gate_EDF), product(x_RD, up_EDF)
    else:
        gate_RF, up_RF = jnp.split(
            product(x_RD, jnp.concatenate([gate_EDF, up_EDF], axis=-1)), 2, axis=-1
        )
    y_RD = product(jax.nn.silu(gate_RF) * up_RF, down_EFD)
    return combine_rows(y_RD, weights_TK, plan)


def _check_shapes(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD):
    experts, ffn, width = down_EFD.shape
    fit = x_TD.shape == (len(expert_TK), width) and gate_EDF.shape == up_EDF.shape == (
        experts,
        width,
        ffn,
    )
    if not fit or (weights_TK is not None and weights_TK.shape != expert_TK.shape):
        weights = None if weights_TK is None else weights_TK.shape
        shapes = (
            f"x {x_TD.shape}, experts {expert_TK.shape}, weights {weights}, gate {gate_EDF.shape},"
            f" up {up_EDF.shape}"
        )
        raise ValueError(f"shapes of {shapes}, down {down_EFD.shape} do not fit")


def _check_pallas(x_TD, ffn: int, width: int):
    if x_TD.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"routed_ffn: rows of type {x_TD.dtype}: 'pallas' takes bfloat16 and float32;"
            " 'ragged_dot' takes others"
        )
    for name, size in (("model width", width), ("feed-forward width", ffn)):
        if size % 128:
            raise ValueError(
                f"routed_ffn: {name} {size}: 'pallas' takes multiples of 128; 'ragged_dot' and"
                " 'batched' take others"
            )
    if not interpret.available():
        raise ValueError(
            "routed_ffn: 'pallas' needs a TPU, or pallas_kernels.interpret.on; 'batched' is for"
            " this CPU"
        )
