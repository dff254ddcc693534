"""Weights of the engine in fewer bits: FP8 in blocks of 128 x 128, as rollouts use it, and int8 a
column (docs/glm45.md, "FP8 for rollouts").

A quantised matrix stands in the model where the float32 one stood and turns into compute precision
where it is used. It is made again at every swap of weights, on the device.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from glm_jax.model.layers import axes_of
from glm_jax.sharding import constrain, named, parts

FORMATS = ("compute", "fp8", "int8")
FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)  # 448
BLOCK = 128
# Left alone, as in the released FP8 checkpoints: what follows is not a product of the layers, or
# decides which one.
KEPT = {"embed_tokens", "lm_head", "shared_head", "gate", "eh_proj"}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("block",)
)
@dataclasses.dataclass
class Quantized:
    """A matrix [..., D, F] as values times the scale of their block.

    values: float8_e4m3fn or int8, [..., D, F]. scale: float32, one a block, [..., ceil(D /
    block[0]), ceil(F / block[1])]; the last block of a dimension may be partial.
    """

    values: jax.Array
    scale: jax.Array
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, dtype) -> jax.Array:
        """The matrix in a float type."""
        rows, (*stack, depth, width) = self.block[0], self.shape
        if depth % rows:
            return (
                self.values.astype(jnp.float32) * spread(self.scale, self.block, self.shape)
            ).astype(dtype)
        # Only columns of scales are made: XLA writes no matrix of scales, and reads and writes the
        # values once.
        values = self.values.astype(jnp.float32).reshape(*stack, -1, rows, width)
        scale = spread(self.scale, (1, self.block[1]), (*stack, depth // rows, width))
        return (values * scale[..., None, :]).astype(dtype).reshape(self.shape)


def spread(scale: jax.Array, block: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """Each block's scale at each of its places, [..., D, F]."""
    for axis, size in zip((-2, -1), block, strict=True):
        scale = jax.lax.slice_in_dim(jnp.repeat(scale, size, axis=axis), 0, shape[axis], axis=axis)
    return scale


def quantize(w: jax.Array, format: str) -> Quantized:
    """A matrix or a stack of them [..., D, F]. `fp8`: e4m3, scale = max|block| / 448, blocks of 128
    x 128. `int8`: symmetric, one scale a column.
    """
    block = (BLOCK, BLOCK) if format == "fp8" else (w.shape[-2], 1)
    largest = FP8_MAX if format == "fp8" else 127.0
    w = w.astype(jnp.float32)
    padded = jnp.pad(
        w,
        [(0, 0)] * (w.ndim - 2)
        + [(0, -size % b) for size, b in zip(w.shape[-2:], block, strict=True)],
    )
    rows, columns = (size // b for size, b in zip(padded.shape[-2:], block, strict=True))
    blocks = padded.reshape(*w.shape[:-2], rows, block[0], columns, block[1])
    scale = jnp.max(jnp.abs(blocks), axis=(-3, -1)) / largest
    scale = jnp.where(scale > 0, scale, 1.0)
    values = w / spread(scale, block, w.shape)
    # By the type's own rounding for fp8; the division may land a last bit above the largest value,
    # which would be NaN.
    values = jnp.clip(values if format == "fp8" else jnp.round(values), -largest, largest)
    return Quantized(
        values.astype(jnp.float8_e4m3fn if format == "fp8" else jnp.int8), scale, block
    )


def prepare(state: nnx.State, format: str, compute_dtype: str, mesh: Mesh | None) -> nnx.State:
    """A model's state as the engine keeps it: matrices quantised, or cast to compute precision once
    and not in every step.

    Router weights and biases stay float32, because they decide; with a quantised format the
    matrices of KEPT and vectors are only cast. mesh: the current one, on which sharding.py places
    the weights, or None.
    """
    if mesh is not None:
        placed = [
            (path, v.replace(jax.device_put(v.get_value(), named(mesh, axes_of(v)))))
            for path, v in nnx.to_flat_state(state)
        ]
        state = nnx.from_flat_state(placed)
    return _prepare(state, format, compute_dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _prepare(state: nnx.State, format: str, compute_dtype: str) -> nnx.State:
    out = []
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        if isinstance(variable, nnx.Param) and "gate" not in path:
            # A stack of layers adds a dimension, so a vector is known by its declaration.
            matrix = len(variable.get_metadata("axes")) > 1
            kept = format == "compute" or not matrix or not KEPT.isdisjoint(path)
            value = (
                value.astype(compute_dtype)
                if kept
                else quantize(_whole_blocks(value, axes_of(variable)), format)
            )
            value = jax.tree.map(functools.partial(_pin, axes_of(variable)), value)
        out.append((path, variable.replace(value)))
    return nnx.from_flat_state(out)


def _whole_blocks(w: jax.Array, axes) -> jax.Array:
    """A feed-forward matrix with zeros to whole blocks of its width inside, which adds zeros to its
    sums: Air's dense layer has 85.5 blocks, and kernels take whole ones.
    """
    more = [
        -size % BLOCK if axis == "mlp" and size > BLOCK else 0
        for axis, size in zip(axes, w.shape, strict=True)
    ]
    return jnp.pad(w, [(0, n) for n in more]) if any(more) else w


def abstract(state: nnx.State, format: str, compute_dtype: str, mesh: Mesh) -> nnx.State:
    """What `prepare` makes of shapes instead of arrays: shapes, placed on the mesh, which is the
    current one.
    """

    def placed(variable):
        shape = lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=named(mesh, _fitting(axes_of(variable), x))
        )
        return variable.replace(jax.tree.map(shape, variable.get_value()))

    shapes = jax.eval_shape(lambda state: _prepare(state, format, compute_dtype), state)
    return nnx.from_flat_state(
        [(path, placed(variable)) for path, variable in nnx.to_flat_state(shapes)]
    )


def _pin(axes, x: jax.Array) -> jax.Array:
    """x placed like the matrix that it is or whose scales it holds."""
    return constrain(x, *_fitting(axes, x))


def _fitting(axes, x) -> list[str | None]:
    """The axes; a dimension of too few blocks is not split."""
    return [
        axis if size % parts(axis) == 0 else None for axis, size in zip(axes, x.shape, strict=True)
    ]
