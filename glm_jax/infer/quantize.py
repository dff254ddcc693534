"""Weights of the engine in fewer bits: FP8 in blocks of 128 x 128, as rollouts use it, and int8 a
column (docs/glm45.md, "FP8 for rollouts").

A quantised matrix stands in the model where the float32 one stood and turns into compute precision
where it is used. It is made again at every swap of weights, on the device (swap.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from glm_jax.model.layers import axes_of
from glm_jax.sharding import named, parts

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


def quantize(w: jax.Array, format: str, split=((), ())) -> Quantized:
    """A matrix or a stack of them [..., D, F]. `fp8`: e4m3, scale = max|block| / 448, blocks of 128
    x 128. `int8`: symmetric, one scale a column.

    split: inside shard_map, where w is a device's part, the mesh axes that D and F are split over.
    Blocks are those of the whole matrix; where a part is not made of whole blocks, its scale is the
    whole matrix's along that dimension.
    """
    largest = FP8_MAX if format == "fp8" else 127.0
    w = w.astype(jnp.float32)
    depth = w.shape[-2] * math.prod(map(jax.lax.axis_size, split[0]))
    block, scale = block_of(format, (depth, w.shape[-1])), jnp.abs(w)
    dims = list(zip((-2, -1), block, split, strict=True))
    for dim, size, axes in sorted(dims, key=lambda d: len(d[2])):  # fewer are left to gather
        scale = _block_max(scale, w.ndim + dim, size, axes)
    scale = scale / largest
    scale = jnp.where(scale > 0, scale, 1.0)
    own = scale
    for dim, size, axes in dims:
        own = _own_blocks(own, w.ndim + dim, size, axes, w.shape[dim])
    values = w / own
    # By the type's own rounding for fp8; the division may land a last bit above the largest value,
    # which would be NaN.
    values = jnp.clip(values if format == "fp8" else jnp.round(values), -largest, largest)
    return Quantized(
        values.astype(jnp.float8_e4m3fn if format == "fp8" else jnp.int8), scale, block
    )


def block_of(format: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a matrix [..., D, F] that share a scale."""
    return (BLOCK, BLOCK) if format == "fp8" else (shape[-2], 1)


def scale_shape(format: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a matrix [..., D, F]; the last block of a dimension may be partial."""
    blocks = zip(shape[-2:], block_of(format, shape), strict=True)
    return *shape[:-2], *(-(-size // step) for size, step in blocks)


def _block_max(x: jax.Array, dim: int, size: int, axes) -> jax.Array:
    """The largest value of each block along a dimension that is split over mesh axes."""
    if axes and x.shape[dim] % size:  # a block lies on several devices
        step = math.gcd(x.shape[dim], size)
        x = jax.lax.all_gather(_block_max(x, dim, step, ()), axes, axis=dim, tiled=True)
        size //= step
    pad = [(0, 0)] * x.ndim
    pad[dim] = (0, -x.shape[dim] % size)
    x = jnp.pad(x, pad)
    return jnp.max(x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :]), axis=dim + 1)


def _own_blocks(scale: jax.Array, dim: int, size: int, axes, width: int) -> jax.Array:
    """Each block's scale at each place of a device's part, `width` of them along a dimension."""
    # A single one is repeated, however it is split: XLA divides by what it sees repeated in another
    # way, and every mesh must make the same bits.
    if axes and width % size and scale.shape[dim] > 1:
        places = jax.lax.axis_index(axes) * width + jnp.arange(width)
        return jnp.take(scale, places // size, axis=dim)
    return jax.lax.slice_in_dim(jnp.repeat(scale, size, axis=dim), 0, width, axis=dim)


def format_of(path, variable: nnx.Variable, format: str, compute_dtype: str) -> str:
    """`fp8` or `int8` where the engine quantises a parameter, else the type that it has there.

    Router weights and biases stay float32, because they decide; with a quantised format the
    matrices of KEPT and vectors are only cast.
    """
    if not isinstance(variable, nnx.Param) or "gate" in path:
        return str(variable.get_value().dtype)
    # A stack of layers adds a dimension, so a vector is known by its declaration.
    matrix = len(variable.get_metadata("axes")) > 1
    kept = format == "compute" or not matrix or not KEPT.isdisjoint(path)
    return compute_dtype if kept else format


def abstract(state: nnx.State, format: str, compute_dtype: str, mesh: Mesh | None) -> nnx.State:
    """The shapes that the engine makes of a model's parameters, placed on the mesh by the rules in
    use; mesh: None for one device. Raises ValueError where one does not divide over it.
    """

    def placed(path, variable):
        axes, shape = axes_of(variable), variable.get_value().shape
        found = format_of(path, variable, format, compute_dtype)

        def array(axes, shape, dtype) -> Any:  # stands for an array
            place = None if mesh is None else named(mesh, axes, shape, ".".join(map(str, path)))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        if found not in FORMATS:
            return array(axes, shape, found)
        shape = _whole_blocks(shape, axes)
        blocks = scale_shape(found, shape)
        dtype = jnp.float8_e4m3fn if found == "fp8" else jnp.int8
        scale = array(_fitting(axes, blocks, mesh), blocks, jnp.float32)
        return Quantized(array(axes, shape, dtype), scale, block_of(found, shape))

    return nnx.from_flat_state(
        [(path, v.replace(placed(path, v))) for path, v in nnx.to_flat_state(state)]
    )


def _whole_blocks(shape: tuple[int, ...], axes) -> tuple[int, ...]:
    """A feed-forward matrix gets zeros to whole blocks of its width inside, which add zeros to its
    sums: Air's dense layer has 85.5 blocks, and kernels take whole ones.
    """
    return tuple(
        size + (-size % BLOCK if axis == "mlp" and size > BLOCK else 0)
        for axis, size in zip(axes, shape, strict=True)
    )


def _fitting(axes, shape: tuple[int, ...], mesh: Mesh | None) -> list[str | None]:
    """The axes; a dimension of too few blocks is not split."""
    return [
        axis if size % parts(axis, mesh) == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
