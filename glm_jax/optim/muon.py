"""Muon (momentum orthogonalised by Newton-Schulz) as an optax transformation over stacks of matrices.

Formulas: Moonlight, arXiv 2502.16982, section 2; GLM-4.5, arXiv 2508.06471, section 2.3 (N = 5, momentum 0.95, update RMS
0.2). The last two dimensions of a leaf are one matrix; all before them (layers, experts) are a batch of matrices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from glm_jax.sharding import MESH_AXES

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-8


class MuonState(NamedTuple):
    momentum: optax.Updates


def scale_by_muon(
    *, momentum: float, nesterov: bool, ns_steps: int, ns_dtype: str, update_rms: float, head_splits=None
) -> optax.GradientTransformation:
    """Replaces gradients by update_rms * sqrt(max(fan_in, fan_out)) * NewtonSchulz(momentum): RMS about update_rms.

    M = momentum * M + g; with Nesterov the direction is momentum * M + g. Add weight decay and the learning rate behind it.

    Args:
      momentum, nesterov: as above.
      ns_steps: Newton-Schulz iterations. ns_dtype: their precision, 'bfloat16' in the paper.
      update_rms: 0.2 matches AdamW's usual update, so that both share a learning rate.
      head_splits: optional tree of (axis, parts) or None like the parameters: `axis` (-1 or -2) is cut into `parts`
        matrices orthogonalised apart, one a head.
    """

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        buffer = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        direction = jax.tree.map(lambda m, g: momentum * m + g, buffer, grads) if nesterov else buffer

        def orthogonalize(x, split):
            axis, parts = split or (-1, 1)
            matrices = _split(x, axis, parts)
            scale = update_rms * math.sqrt(max(matrices.shape[-2:]))
            return _join(newton_schulz(matrices, ns_steps, ns_dtype) * scale, axis, parts)

        leaves, treedef = jax.tree.flatten(direction)
        splits = [None] * len(leaves) if head_splits is None else treedef.flatten_up_to(head_splits)
        return treedef.unflatten(map(orthogonalize, leaves, splits)), MuonState(buffer)

    return optax.GradientTransformation(init, update)


def _split(x, axis: int, parts: int):
    """[..., m, n] -> [..., parts, m, n / parts] (axis -1) or [..., parts, m / parts, n] (axis -2)."""
    if parts == 1:
        return x
    *batch, m, n = x.shape
    if axis == -2:
        return x.reshape(*batch, parts, m // parts, n)
    return jnp.moveaxis(x.reshape(*batch, m, parts, n // parts), -2, -3)


def _join(x, axis: int, parts: int):
    if parts == 1:
        return x
    if axis == -1:
        x = jnp.moveaxis(x, -3, -2)
        return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def newton_schulz(x: jax.Array, steps: int, dtype: str) -> jax.Array:
    """Brings the singular values of every matrix in x [..., m, n] near 1 (0.7 to 1.2 after five steps).

    X0 = X / ||X||_F; X <- a X + (b A + c A A) X with A = X X^T, on the shorter side. Returns x's shape and type.
    """
    out_dtype, transposed = x.dtype, x.shape[-2] > x.shape[-1]
    x = _spread(x)
    x = x.swapaxes(-1, -2) if transposed else x
    x = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + EPS)).astype(dtype)
    a, b, c = COEFFICIENTS

    def iteration(_, x):
        gram = x @ x.swapaxes(-1, -2)
        return a * x + (b * gram + c * (gram @ gram)) @ x

    x = jax.lax.fori_loop(0, steps, iteration, x)
    return (x.swapaxes(-1, -2) if transposed else x).astype(out_dtype)


def _spread(x: jax.Array) -> jax.Array:
    """Whole matrices on every device where there is a mesh, the leading batch dimension dealt out when it divides.

    Orthogonalising a matrix that is itself split would communicate in each of its fifteen products; this way it moves once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    entries: list = [None] * x.ndim
    free = [axis for axis in MESH_AXES if mesh.shape[axis] > 1]
    for dim in reversed(range(x.ndim - 2)):  # experts first, then layers
        taken = []
        for axis in list(free):
            if x.shape[dim] % math.prod(mesh.shape[a] for a in [*taken, axis]) == 0:
                taken.append(axis)
                free.remove(axis)
        entries[dim] = tuple(taken) or None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
