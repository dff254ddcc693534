"""Training state: what it holds, how it is created sharded, and how a model is put together from
it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from glm_jax import sharding
from glm_jax.config import ModelConfig
from glm_jax.model import transformer
from glm_jax.model.layers import axes_of
from glm_jax.model.moe import RouterBias
from glm_jax.model.transformer import GLM
from glm_jax.optim.optimizer import OptimizerConfig, group_tree, make_optimizer

# Compiler options for programs that run once: XLA:CPU compiles them several times faster than it
# would fast ones.
FAST_COMPILE: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
# later ones have no other emitters, and end the process at an unknown option
if jax.__version_info__ < (0, 11, 1):
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """step: int32 scalar. params, router: nested dicts of arrays, router biases apart. opt_state:
    optax's.
    """

    step: jax.Array
    params: Any
    router: Any
    opt_state: Any


@functools.lru_cache(maxsize=8)
def abstract_model(config: ModelConfig):
    """(graphdef, parameters, router biases) of a model that is never allocated; nnx.States of
    ShapeDtypeStructs.
    """
    return nnx.split(transformer.abstract_model(config), nnx.Param, RouterBias)


def build_model(config: ModelConfig, params, router) -> GLM:
    """A GLM over the given nested dicts of arrays (or tracers)."""
    graphdef, abstract_params, abstract_router = abstract_model(config)
    states = []
    for abstract, values in ((abstract_params, params), (abstract_router, router)):
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, values)
        states.append(state)
    return nnx.merge(graphdef, *states)


def logical_axes(config: ModelConfig, *, stacked: bool):
    """Trees of logical axes like (params, router); `stacked` puts `layers` in front where an array
    is a stack of layers.
    """
    _, *states = abstract_model(config)
    take = axes_of if stacked else lambda v: tuple(v.get_metadata("axes"))
    return tuple(
        nnx.to_pure_dict(
            jax.tree.map(take, s, is_leaf=lambda x: isinstance(x, nnx.Variable)),
            extract_fn=lambda x: x,
        )
        for s in states
    )


def initial_weights(config: ModelConfig, key: jax.Array):
    """(params, router) as nested dicts, the same on any mesh; key: jax.random.key(seed)."""
    _, params, router = nnx.split(GLM(config, rngs=nnx.Rngs(key)), nnx.Param, RouterBias)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(router)


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """A model configuration with the optimizer over its parameters: what states are made for."""

    config: ModelConfig
    optimizer: optax.GradientTransformation
    groups: Any  # tree of group names like the parameters
    max_grad_norm: float

    @classmethod
    def create(cls, config: ModelConfig, optimizer: OptimizerConfig) -> TrainSpec:
        axes = logical_axes(config, stacked=False)[0]
        shapes = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(abstract_model(config)[1]))
        transformation = make_optimizer(optimizer, axes, shapes, config.head_size)
        return cls(config, transformation, group_tree(axes), optimizer.max_grad_norm)

    def initial_state(self, key: jax.Array) -> TrainState:
        params, router = initial_weights(self.config, key)
        return TrainState(jnp.zeros((), jnp.int32), params, router, self.optimizer.init(params))

    def abstract_state(self, mesh: Mesh) -> TrainState:
        """ShapeDtypeStructs with their shardings. Optimizer moments lie as their parameters do.

        Raises ValueError where a parameter's dimension does not divide over its mesh axes.
        """
        state = jax.eval_shape(self.initial_state, jax.random.key(0))
        param_axes, router_axes = logical_axes(self.config, stacked=True)
        is_axes = lambda x: isinstance(x, tuple)

        def place(axes, tree):
            return jax.tree.map_with_path(
                lambda path, a, x: jax.ShapeDtypeStruct(
                    x.shape, x.dtype,
                    sharding=sharding.named(mesh, a, x.shape,
                                            jax.tree_util.keystr(path, simple=True, separator="."))
                ),
                axes, tree, is_leaf=is_axes,
            )  # fmt: skip

        params = place(param_axes, state.params)
        scalar = lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding.named(mesh, (None,) * x.ndim)
        )
        masked = lambda x: isinstance(
            x, optax.MaskedNode
        )  # where another group's transformation has the parameter
        opt_state = optax.tree.map_params(
            self.optimizer, lambda x,
            p: x if masked(x) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
            state.opt_state, params, transform_non_params=scalar, is_leaf=masked,
        )  # fmt: skip
        step, router = scalar(state.step), place(router_axes, state.router)
        return dataclasses.replace(
            state, step=step, params=params, router=router, opt_state=opt_state
        )

    def create_state(self, mesh: Mesh, seed: int) -> TrainState:
        """Initial state, every array born on its own devices."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state(mesh))
        options = FAST_COMPILE if mesh.devices.flat[0].platform == "cpu" else None
        with jax.set_mesh(mesh):
            return jax.jit(self.initial_state, out_shardings=shardings, compiler_options=options)(
                jax.random.key(seed)
            )
