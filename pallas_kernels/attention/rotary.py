"""Heads between their projection and attention, one pass over memory each way: bias, RMS norm of
each head (QK-Norm), rotary embedding.

XLA goes over the heads six times forward and ten times backward, in layouts of its own. Heads stay
side by side, [B, L, N x 128], as projections write and the attention kernels read them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.cost import cost
from pallas_kernels.once import once
from pallas_kernels.tuning import vmem_limit

SIZE = 128  # of a head: the lanes of a register
ROWS = 128  # of a step: tokens, which become lanes where each has a number
SUBLANES = 8
UNROLL = 4  # heads written out together, to hide each other's latencies


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def rotated(
    x_BLX, bias_X, weight_H, angles, eps: float, factor: float
) -> tuple[jax.Array, jax.Array]:
    """factor * rotary(norm(x + bias) * weight) of each head, and the lengths of the heads as they
    are rounded, float32 [B, N, L], without gradients.

    Args:
      x_BLX: heads of 128 side by side, [B, L, N x 128], L a multiple of 128.
      bias_X: [N x 128], or None. weight_H: of the RMS norm, [128]; None: no norm.
      angles: cos and sin, [B, L, R / 2]: the first R dimensions of a head turn, halves paired, the
        others pass.
      eps: of the norm.
    """
    return _forward(x_BLX, bias_X, weight_H, angles, eps, factor)[0]


def rotated_tokens(x_TX, bias_X, weight_H, angles, eps: float) -> jax.Array:
    """As `rotated` with a factor of 1, for any number of tokens, without lengths and gradients: x
    [T, N x 128], angles [T, R / 2].
    """
    padded = [
        jnp.pad(x, ((0, -len(x_TX) % min(ROWS, len(x_TX))), (0, 0)))[None] for x in (x_TX, *angles)
    ]
    return _forward(padded[0], bias_X, weight_H, padded[1:], eps, 1.0, lengths=False)[0][0][
        0, : len(x_TX)
    ]


def _forward(x_BLX, bias_X, weight_H, angles, eps, factor, lengths: bool = True):
    vectors = (_vector(bias_X, 0, x_BLX.shape[2]), _vector(weight_H, 1, SIZE))
    tables = tuple(a.astype(x_BLX.dtype) for a in angles)
    options = {"half": angles[0].shape[-1], "normed": weight_H is not None, "lengths": lengths}
    out = _rotate(x_BLX, *vectors, *tables, eps=eps, factor=factor, **options)
    return tuple(out), (x_BLX, bias_X, weight_H, angles, vectors, tables)


def _backward(eps, factor, residuals, cotangents):
    x_BLX, bias_X, weight_H, angles, vectors, tables = residuals
    options = {
        "eps": eps,
        "factor": factor,
        "half": angles[0].shape[-1],
        "normed": weight_H is not None,
    }
    dx_BLX, *sums = _rotate_backward(
        x_BLX, cotangents[0].astype(x_BLX.dtype), *vectors, *tables, **options
    )
    gradients = (
        None if v is None else jnp.sum(d, axis=(0, 1, 2)).astype(v.dtype)
        for v, d in zip((bias_X, weight_H), sums, strict=True)
    )
    return dx_BLX, *gradients, None


rotated.defvjp(_forward, _backward)


def _vector(vector, default: int, size: int):
    return jnp.full((1, size), default, jnp.float32) if vector is None else vector[None]


def _grid(x_BLX, name: str, kernel, inputs, in_specs, out_shape, out_specs):
    batch, length, _ = x_BLX.shape
    return pl.pallas_call(
        kernel,
        grid=(batch, length // min(length, ROWS)),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        cost_estimate=cost(*inputs, *jax.tree.leaves(out_shape)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_limit()
        ),
        interpret=interpret.params(),
        name=name,
    )(*inputs)


def _block(width: int, rows: int = ROWS) -> pl.BlockSpec:
    return pl.BlockSpec((None, rows, width), lambda b, i: (b, i, 0))


def _row(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, width), lambda b, i: (0, 0))


@once("eps", "factor", "half", "normed", "lengths")
def _rotate(
    x_BLX,
    bias,
    weight,
    cos,
    sin,
    *,
    eps: float,
    factor: float,
    half: int,
    normed: bool,
    lengths: bool,
):
    (batch, length, width), heads = x_BLX.shape, x_BLX.shape[2] // SIZE

    def kernel(x_ref, bias_ref, weight_ref, cos_ref, sin_ref, out_ref, *lengths_refs):
        swap, weight = _swap(half, x_ref.dtype), weight_ref[...] * factor
        own, partner = _tables(cos_ref[...], sin_ref[...])
        own = own * weight
        partner = (
            partner * _dot(jnp.broadcast_to(weight, (SUBLANES, SIZE)), _swap(half, jnp.float32))[:1]
        )

        def head(h, _):
            at = pl.ds(pl.multiple_of(h * SIZE, SIZE), SIZE)
            x = x_ref[:, at] + bias_ref[:, at].astype(x_ref.dtype)
            swapped, x = _dot(x, swap), x.astype(jnp.float32)
            y = x * own + swapped * partner
            if normed:
                y = y * _inverse_rms(x, eps)
            y = y.astype(out_ref.dtype)
            out_ref[:, at] = y
            for ref in lengths_refs:
                ref[pl.ds(h, 1), :] = jnp.sqrt(_row_sums(jnp.square(y.astype(jnp.float32))))

        lax.fori_loop(0, heads, head, None, unroll=UNROLL if heads % UNROLL == 0 else 1)

    block = functools.partial(_block, rows=min(length, ROWS))
    out = [(jax.ShapeDtypeStruct(x_BLX.shape, x_BLX.dtype), block(width))]
    if lengths:
        out.append((jax.ShapeDtypeStruct((batch, heads, length), jnp.float32), _numbers(heads)))
    return _grid(
        x_BLX, "rotate_heads", kernel, (x_BLX, bias, weight, cos, sin),
        [block(width), _row(width), _row(SIZE), block(half), block(half)],
        *map(list, zip(*out, strict=True)),
    )  # fmt: skip


@once("eps", "factor", "half", "normed")
def _rotate_backward(
    x_BLX, dy_BLX, bias, weight, cos, sin, *, eps: float, factor: float, half: int, normed: bool
):
    """dx, and the gradients of bias and weight in parts, float32 [B, steps, 8, N x 128] and [B,
    steps, 8, 128].
    """
    (batch, length, width), heads = x_BLX.shape, x_BLX.shape[2] // SIZE
    parts = batch, length // ROWS, SUBLANES

    def kernel(
        x_ref, dy_ref, bias_ref, weight_ref, cos_ref, sin_ref, dx_ref, dbias_ref, dweight_ref
    ):
        swap, weight = _swap(half, dy_ref.dtype), weight_ref[...]
        own, partner = (table * factor for table in _tables(cos_ref[...], sin_ref[...]))

        def head(h, sums):
            at = pl.ds(pl.multiple_of(h * SIZE, SIZE), SIZE)
            dy = dy_ref[:, at]
            dx = dy.astype(jnp.float32) * own - _dot(dy, swap) * partner  # rotated back
            if normed:
                x = (x_ref[:, at] + bias_ref[:, at].astype(x_ref.dtype)).astype(jnp.float32)
                inverse = _inverse_rms(x, eps)
                x = x * inverse
                dxx = dx * x
                sums += _eighths(dxx)
                dx = inverse * (dx * weight - x * (_lane_sums(dxx * weight) * (1 / SIZE)))
            dx_ref[:, at] = dx.astype(dx_ref.dtype)
            dbias_ref[:, at] = _eighths(dx)
            return sums

        zeros = jnp.zeros((SUBLANES, SIZE), jnp.float32)
        dweight_ref[...] = lax.fori_loop(
            0, heads, head, zeros, unroll=UNROLL if heads % UNROLL == 0 else 1
        )

    return _grid(
        x_BLX, "rotate_heads_backward", kernel, (x_BLX, dy_BLX, bias, weight, cos, sin),
        [_block(width), _block(width), _row(width), _row(SIZE), _block(half), _block(half)],
        [jax.ShapeDtypeStruct(x_BLX.shape, x_BLX.dtype),
         *(jax.ShapeDtypeStruct((*parts, n), jnp.float32) for n in (width, SIZE))],
        [_block(width),
         *(pl.BlockSpec((None, None, SUBLANES, n), lambda b, i: (b, i, 0, 0)) for n in (width,
                                                                                        SIZE))],
    )  # fmt: skip


@once()
def head_products(a_BLX: jax.Array, b_BLX: jax.Array) -> jax.Array:
    """Sum of a * b over each head of 128, float32 [B, N, L], L a multiple of 128."""
    (batch, length, width), heads = a_BLX.shape, a_BLX.shape[2] // SIZE

    def kernel(a_ref, b_ref, out_ref):
        def head(h, _):
            at = pl.ds(pl.multiple_of(h * SIZE, SIZE), SIZE)
            out_ref[pl.ds(h, 1), :] = _row_sums(
                a_ref[:, at].astype(jnp.float32) * b_ref[:, at].astype(jnp.float32)
            )

        lax.fori_loop(0, heads, head, None, unroll=UNROLL if heads % UNROLL == 0 else 1)

    return _grid(
        a_BLX, "head_products", kernel, (a_BLX, b_BLX), [_block(width)] * 2,
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32), _numbers(heads),
    )  # fmt: skip


def _numbers(heads: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, heads, ROWS), lambda b, i: (b, 0, i))


# --- inside of kernels ---


def _dot(a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _tables(cos, sin):
    """For all lanes of a head: what a number is multiplied by, and what its partner is, float32
    [rows, 128] both, from [rows, half].
    """
    half = cos.shape[1]
    row, column = (lax.broadcasted_iota(jnp.int32, (half, SIZE), axis) for axis in (0, 1))
    first, second = (jnp.where(column == row + start, 1.0, 0.0) for start in (0, half))
    passing = jnp.where(lax.broadcasted_iota(jnp.int32, (1, SIZE), 1) < 2 * half, 0.0, 1.0)
    return _dot(cos, (first + second).astype(cos.dtype)) + passing, _dot(
        sin, (second - first).astype(sin.dtype)
    )


def _swap(half: int, dtype):
    """The matrix that gives each of the first 2 * half lanes its partner's number, lane i that of
    lane i + half and the reverse, and zeros to others: the MXU is idle, and has no need to
    wait for the units that move lanes.
    """
    row, column = (lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), axis) for axis in (0, 1))
    there = (row == column + half) & (column < half) | (row == column - half) & (column < 2 * half)
    return jnp.where(there, 1.0, 0.0).astype(dtype)


def _lane_sums(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _eighths(x):
    """Every eighth row added up, [8, C]."""
    return jnp.sum(x.reshape(-1, SUBLANES, x.shape[1]), axis=0)


def _inverse_rms(x, eps: float):
    return lax.rsqrt(_lane_sums(x * x) * (1 / SIZE) + eps)


def _row_sums(x):
    """Sums over lanes, of [128, 128] as [1, 128]."""
    row, column = (lax.broadcasted_iota(jnp.int32, (ROWS, SIZE), axis) for axis in (0, 1))
    return jnp.sum(jnp.where(row == column, _lane_sums(x), 0.0), axis=0, keepdims=True)
