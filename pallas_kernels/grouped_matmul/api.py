"""Rows sorted by group times that group's matrix: checks its inputs and runs the named
implementation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import interpret
from pallas_kernels.grouped_matmul import batched, differentiable, mosaic_gpu, reference
from pallas_kernels.grouped_matmul.shapes import LANES, TILE
from pallas_kernels.target import target_platform

IMPLEMENTATIONS = ("auto", "reference", "batched", "ragged_dot", "pallas", "mosaic_gpu")


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str,
    alignment: int = 1,
) -> jax.Array:
    """y_r = x_r w_g for the group g that row r belongs to; rows of no group give zeros and zero
    gradients, whatever stands in them.

    Args:
      x_RD: rows, those of group 0 first, then group 1, ...: [R, D].
      w_EDF: one matrix a group, [E, D, F].
      group_sizes_E: int32, rows of each group; any sizes that fit R, zeros included.
      implementation: `pallas` for TPUs; `batched` for CPUs; `ragged_dot` (XLA's own) for GPUs, on a
        CPU one dense product a group; `mosaic_gpu` for NVIDIA's Hopper; `reference`; `auto`: by
        what the trace is for, batched on a CPU, ragged_dot on a GPU, and on a TPU pallas for rows
        that are aligned as it wants, else ragged_dot.
      alignment: a group's first row is the sum of the sizes before, each rounded up to this; R is a
        multiple of it. pallas wants a multiple of 64.

    Returns:
      [R, F], differentiable in x and w.

    Raises:
      ValueError: for an unknown implementation, shapes that do not fit, and what pallas does not
        take.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"grouped_matmul={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
        )
    if (
        x_RD.ndim != 2
        or w_EDF.ndim != 3
        or x_RD.shape[1] != w_EDF.shape[1]
        or group_sizes_E.shape != w_EDF.shape[:1]
    ):
        raise ValueError(
            f"shapes of x {x_RD.shape}, w {w_EDF.shape}, group sizes {group_sizes_E.shape} do"
            " not fit"
        )
    if alignment < 1 or x_RD.shape[0] % alignment:
        raise ValueError(
            f"alignment={alignment} must be positive and divide the {x_RD.shape[0]} rows of x"
        )
    if implementation == "auto":
        implementation = _for_target(alignment)
    if implementation == "pallas":
        _check_pallas(x_RD, w_EDF, alignment)
        return differentiable.grouped_matmul(x_RD, w_EDF, group_sizes_E, alignment)
    if implementation == "mosaic_gpu":
        _check_mosaic_gpu(x_RD, w_EDF)
    run = {
        "batched": batched.grouped_matmul, "ragged_dot": lax.ragged_dot,
        "mosaic_gpu": mosaic_gpu.grouped_matmul,
        "reference": reference.grouped_matmul,
    }[implementation]  # fmt: skip
    if alignment == 1:
        return run(x_RD, w_EDF, group_sizes_E)
    live_R1 = reference.live_rows(group_sizes_E, x_RD.shape[0], alignment)[:, None]
    y_RF = run(
        jnp.where(live_R1, x_RD, 0), w_EDF, reference.aligned_sizes(group_sizes_E, alignment)
    )
    return jnp.where(live_R1, y_RF, 0)


def _for_target(alignment: int) -> str:
    platform = target_platform()
    if platform == "tpu":
        return "pallas" if alignment % TILE == 0 else "ragged_dot"
    return "batched" if platform == "cpu" else "ragged_dot"


def _check_pallas(x_RD, w_EDF, alignment: int):
    others = "batched, ragged_dot and reference take it"
    if alignment % TILE:
        raise ValueError(
            f"grouped_matmul='pallas' takes an alignment that is a multiple of {TILE}, not"
            f" {alignment}; {others}"
        )
    if x_RD.dtype != w_EDF.dtype or x_RD.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"grouped_matmul='pallas' takes bfloat16 or float32 for both, not {x_RD.dtype} and"
            f" {w_EDF.dtype}; {others}"
        )
    for name, width in zip("DF", w_EDF.shape[1:], strict=True):
        if width % LANES:
            raise ValueError(
                f"grouped_matmul='pallas' takes widths that are multiples of {LANES}, not"
                f" {name}={width}; {others}"
            )
    if not interpret.available():
        raise ValueError(
            "grouped_matmul='pallas' runs on TPUs; on this backend batched, ragged_dot and"
            " reference do, or interpret.on()"
        )


def _check_mosaic_gpu(x_RD, w_EDF):
    others = "batched, ragged_dot and reference take it"
    if x_RD.dtype != w_EDF.dtype or x_RD.dtype not in mosaic_gpu.DTYPES:
        raise ValueError(
            f"grouped_matmul='mosaic_gpu' takes bfloat16 or float16 for both, not {x_RD.dtype} and"
            f" {w_EDF.dtype}; {others}"
        )
    for name, width in zip("DF", w_EDF.shape[1:], strict=True):
        if width % mosaic_gpu.BLOCK:
            raise ValueError(
                f"grouped_matmul='mosaic_gpu' takes multiples of {mosaic_gpu.BLOCK}, not"
                f" {name}={width}; {others}"
            )
    if target_platform() != "gpu":
        raise ValueError(
            f"grouped_matmul='mosaic_gpu': the program is for {target_platform()}, no GPU; {others}"
        )
