"""Parameters and the small layers: linear, RMSNorm, rotary embedding, SwiGLU feed-forward."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.config import ModelConfig
from glm_jax.sharding import by_device, parts, spec
from pallas_kernels.grouped_matmul import few_rows_shapes as few_rows


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """Declares a float32 parameter once: shape, logical axes (checked against sharding.RULES) and
    initializer.

    Abstract state, shardings, optimizer groups and the Hugging Face table all derive from this
    declaration. A stack of layers adds a leading `layers` dimension to the array and leaves `axes`
    as declared (see `axes_of`).
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    spec(axes)
    return kind(init(rngs.params(), shape, jnp.float32), axes=axes)


class Matrix(nnx.Param):
    """A parameter that is only a factor of products, by `product` or routed_ffn: it need not be an
    array (InStack, Quantized).
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class InStack:
    """One layer's matrices where they lie in the stack of all layers: what is scanned is copied out
    of it first.

    stack: an array or quantised, [layers, ...]. layer: int32 scalar.
    """

    stack: Any
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    def astype(self, dtype) -> jax.Array:
        return self.taken().astype(dtype)

    def taken(self):
        """The layer's own array or quantised matrices."""
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False), self.stack
        )


def in_stack(state: nnx.State, layer: jax.Array) -> nnx.State:
    """A stack's state as that of one of its layers, matrices as InStack."""

    def one(variable):
        found = InStack(variable.get_value(), layer)
        return variable.replace(found if isinstance(variable, Matrix) else found.taken())

    return nnx.from_flat_state(
        [(path, one(variable)) for path, variable in nnx.to_flat_state(state)]
    )


def product(x_BLD: jax.Array, w, axes, implementation: str) -> jax.Array:
    """x times a matrix [D, F] with logical axes, in x's type: [B, L, F].

    Few rows by a TPU kernel that reads quantised matrices, and those in a stack, as they are and
    where they lie.
    """
    if not isinstance(w, jax.Array) and has_few_rows(x_BLD, w, axes, implementation):
        return few_rows_product(x_BLD, w, x_BLD.dtype)
    # Rows as one dimension: the weight's gradient then contracts one dimension. Over two, XLA:CPU
    # transposes dy first and fuses what made dy into that strided loop. A split length must stay a
    # dimension of its own.
    x = x_BLD if parts("length") > 1 else x_BLD.reshape(-1, x_BLD.shape[-1])
    return (x @ w.astype(x.dtype)).reshape(*x_BLD.shape[:-1], -1)


def has_few_rows(x_BLD: jax.Array, w, axes, implementation: str) -> bool:
    """Whether few_rows_product takes them, the matrix being whole on each device."""
    whole = all(parts(axis) == 1 for axis in (*axes, "length"))
    return whole and few_rows.takes(
        math.prod(x_BLD.shape[:-1]) // parts("batch"), w, x_BLD.dtype, implementation
    )


def few_rows_product(x_BLD: jax.Array, w, dtype) -> jax.Array:
    """x times a matrix [D, F] in a type, [B, L, F], by the TPU kernel. No gradient."""

    def run(x_bLD, w):
        return few_rows.dense(x_bLD.reshape(-1, x_bLD.shape[-1]), w, dtype).reshape(
            *x_bLD.shape[:-1], -1
        )

    batch = ("batch", None, None)
    return by_device(run, (batch, None), batch)(x_BLD, w)


def axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Logical axes of a variable's array, with `layers` in front where it is one of a stack."""
    axes = tuple(variable.get_metadata("axes"))
    stacked = len(variable.get_value().shape) - len(axes)
    assert stacked in (0, 1), (axes, variable.get_value().shape)
    return ("layers",) * stacked + axes


def normal(config: ModelConfig):
    """Initializer of every weight matrix: normal with the config's standard deviation (0.02 in
    GLM-4.5).
    """
    return jax.nn.initializers.normal(config.init_std)


class Linear(nnx.Module):
    """y = x W (+ b), W of shape [in, out]: the transpose of the Hugging Face tensor."""

    def __init__(
        self,
        config: ModelConfig,
        size_in: int,
        size_out: int,
        axes,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.implementation = config.grouped_matmul
        self.weight = param(rngs, (size_in, size_out), axes, normal(config), Matrix)
        self.bias = param(rngs, (size_out,), axes[1:], jax.nn.initializers.zeros) if bias else None

    def product(self, x_BLD: jax.Array) -> jax.Array:
        """Without the bias."""
        return product(
            x_BLD, self.weight.get_value(), self.weight.get_metadata("axes"), self.implementation
        )

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        y_BLF = self.product(x_BLD)
        return y_BLF if self.bias is None else y_BLF + self.bias.astype(x_BLD.dtype)


class RMSNorm(nnx.Module):
    """Normalises the last dimension in float32, then multiplies by the weight in x's own type, as
    the oracle does.
    """

    def __init__(self, config: ModelConfig, size: int, *, rngs: nnx.Rngs):
        self.eps = config.norm_eps
        self.weight = param(rngs, (size,), ("norm",), jax.nn.initializers.ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.weight.astype(x.dtype) * x32.astype(x.dtype)


def rope_angles(config: ModelConfig, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, made in float32, in the compute type: [B, L, rotary_size /
    2].
    """
    exponent = jnp.arange(0, config.rotary_size, 2, dtype=jnp.float32) / config.rotary_size
    angles = positions_BL[..., None].astype(jnp.float32) * (1.0 / config.rope_theta**exponent)
    made = (
        jnp.cos(angles).astype(config.compute_dtype),
        jnp.sin(angles).astype(config.compute_dtype),
    )
    return jax.lax.optimization_barrier(made)  # XLA would convert them anew in each layer


def apply_rope(x_BLNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the first `rotary_size` dimensions of every head, halves paired (i, i + rotary_size /
    2); passes the rest.
    """
    cos, sin = (a[:, :, None, :] for a in angles)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BLNH, [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class MLP(nnx.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)); the dense layers' and the shared
    experts'.
    """

    def __init__(self, config: ModelConfig, ffn_size: int, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.gate_proj = Linear(config, width, ffn_size, ("embed", "mlp"), rngs=rngs)
        self.up_proj = Linear(config, width, ffn_size, ("embed", "mlp"), rngs=rngs)
        self.down_proj = Linear(config, ffn_size, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))
