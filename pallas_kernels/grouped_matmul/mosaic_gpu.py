"""The grouped product for NVIDIA's Hopper GPUs, by the Mosaic GPU kernels that JAX ships: rows of
no group are neither read nor written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import reference

BLOCK = 128  # rows and columns of a block of the result
DEPTH = 64  # of a step of the sum: 128 bytes of bfloat16, as wide as a swizzle
STEPS = 4  # blocks in flight
DTYPES = (jnp.bfloat16, jnp.float16)


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """As api.grouped_matmul; D and F are multiples of 128, x and w of one of DTYPES."""
    return _forward(x_RD, w_EDF, group_sizes_E)[0]


def _forward(x_RD, w_EDF, group_sizes_E):
    y_RF = product(x_RD, w_EDF, group_sizes_E, transposed=False)
    return jnp.where(_live(x_RD, group_sizes_E), y_RF, 0), (x_RD, w_EDF, group_sizes_E)


def _backward(residuals, dy_RF):
    x_RD, w_EDF, group_sizes_E = residuals
    live_R1 = _live(x_RD, group_sizes_E)
    # the last block of the last group reads past its end
    x_RD, dy_RF = jnp.where(live_R1, x_RD, 0), jnp.where(live_R1, dy_RF, 0)
    dx_RD = jnp.where(live_R1, product(dy_RF, w_EDF, group_sizes_E, transposed=True), 0)
    return (
        dx_RD,
        weight_gradient(x_RD, dy_RF, group_sizes_E),
        np.zeros(group_sizes_E.shape, jax.dtypes.float0),
    )


grouped_matmul.defvjp(_forward, _backward)


def _live(x_RD, group_sizes_E):
    return reference.live_rows(group_sizes_E, len(x_RD), 1)[:, None]


def product(x_RD, w_EDF, group_sizes_E, *, transposed: bool) -> jax.Array:
    """x w, or x w^T, of each row's group; rows of no group hold anything."""
    # brings JAX's test machinery along
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    rows, x_RD = len(x_RD), _at_least_a_block(x_RD)
    blocks = _blocks(w_EDF.shape[1 if transposed else 2])
    return ragged_dot(
        x_RD, w_EDF, group_sizes=group_sizes_E.astype(jnp.int32), transpose_rhs=transposed, **blocks
    )[:rows]


def weight_gradient(x_RD, dy_RF, group_sizes_E) -> jax.Array:
    """x_e^T dy_e of each group's rows, [E, D, F]; every row holds finite numbers."""
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    x_RD, dy_RF = _at_least_a_block(x_RD), _at_least_a_block(dy_RF)
    return transposed_ragged_dot(
        x_RD, dy_RF, group_sizes=group_sizes_E.astype(jnp.int32), **_blocks(dy_RF.shape[1])
    )


def _at_least_a_block(x_RD):
    return jnp.pad(x_RD, ((0, max(BLOCK - len(x_RD), 0)), (0, 0)))


def _blocks(width: int) -> dict[str, int]:
    columns = width // BLOCK
    # columns that neighbouring blocks share while rows are in L2
    together = max(n for n in (1, 2, 4, 8) if columns % n == 0)
    return {
        "block_m": BLOCK,
        "block_n": BLOCK,
        "block_k": DEPTH,
        "max_concurrent_steps": STEPS,
        "grid_block_n": together,
    }
