"""The Pallas products as one differentiable function; whole MoE layers put the kernels together
themselves.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import kernel, reference
from pallas_kernels.grouped_matmul.shapes import TILE, blocks_for
from pallas_kernels.grouped_matmul.tiles import row_tiles
from pallas_kernels.grouped_matmul.weight_gradient import weight_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, alignment: int
) -> jax.Array:
    """As api.grouped_matmul. Rows of no group are cleared outside of the kernels: in the result,
    and in what the gradient of w sums.
    """
    return _forward(x_RD, w_EDF, group_sizes_E, alignment)[0]


def _rows(group_sizes_E, num_rows, alignment):
    tiles = row_tiles(reference.aligned_sizes(group_sizes_E, alignment), num_rows, TILE)
    return tiles, reference.live_rows(group_sizes_E, num_rows, alignment)[:, None]


def _forward(x_RD, w_EDF, group_sizes_E, alignment):
    tiles, live_R1 = _rows(group_sizes_E, len(x_RD), alignment)
    blocks = blocks_for("matmul", *w_EDF.shape[1:], x_RD.dtype)
    y_RF = kernel.matmul(x_RD, w_EDF, tiles, blocks=blocks)
    return jnp.where(live_R1, y_RF, 0), (x_RD, w_EDF, group_sizes_E)


def _backward(alignment, residuals, dy_RF):
    x_RD, w_EDF, group_sizes_E = residuals
    depth, width = w_EDF.shape[1:]
    tiles, live_R1 = _rows(group_sizes_E, len(x_RD), alignment)
    x_RD, dy_RF = jnp.where(live_R1, x_RD, 0), jnp.where(live_R1, dy_RF, 0)
    dx_RD = kernel.matmul(
        dy_RF,
        w_EDF,
        tiles,
        transposed=True,
        blocks=blocks_for("transposed", width, depth, x_RD.dtype),
    )
    dw_EDF = weight_gradient(
        x_RD, dy_RF, tiles, blocks=blocks_for("weight_gradient", depth, width, x_RD.dtype)
    )
    return jnp.where(live_R1, dx_RD, 0), dw_EDF, np.zeros(group_sizes_E.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_forward, _backward)
