"""Rows sorted by group times that group's matrix: checks its inputs and runs the named implementation."""

from __future__ import annotations

import jax
from jax import lax

from pallas_kernels.grouped_matmul import batched, reference

IMPLEMENTATIONS = ("auto", "reference", "batched", "ragged_dot")


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, implementation: str) -> jax.Array:
    """y_r = x_r w_g for the group g that row r belongs to; rows past the last group give zeros and zero gradients.

    Args:
      x_RD: rows, those of group 0 first, then group 1, ...: [R, D].
      w_EDF: one matrix a group, [E, D, F].
      group_sizes_E: int32, rows of each group; any sizes with sum <= R, zeros included.
      implementation: `batched` for CPUs; `ragged_dot` (XLA's own) for TPU and GPU, on a CPU one dense product a group;
        `reference`; `auto`: batched on a CPU backend, else ragged_dot.

    Returns:
      [R, F], differentiable in x and w.

    Raises:
      ValueError: for an unknown implementation or shapes that do not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"grouped_matmul={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if x_RD.ndim != 2 or w_EDF.ndim != 3 or x_RD.shape[1] != w_EDF.shape[1] or group_sizes_E.shape != w_EDF.shape[:1]:
        raise ValueError(f"shapes of x {x_RD.shape}, w {w_EDF.shape}, group sizes {group_sizes_E.shape} do not fit")
    if implementation == "auto":
        implementation = "batched" if jax.default_backend() == "cpu" else "ragged_dot"
    if implementation == "batched":
        return batched.grouped_matmul(x_RD, w_EDF, group_sizes_E)
    if implementation == "ragged_dot":
        return lax.ragged_dot(x_RD, w_EDF, group_sizes_E)
    return reference.grouped_matmul(x_RD, w_EDF, group_sizes_E)
