"""The programs of a run, lowered for a pod that is not there: the training step, and the engine's
calls that decode, verify drafts and prefill, and the swap of its weights.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from glm_jax.config import ModelConfig, check_choice
from glm_jax.infer import quantize, swap
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.sampling import MAX_STOP_TOKENS, RowParams
from glm_jax.infer.steps import Rows, decode, prefill
from glm_jax.model.cache import PAGES, empty_pages
from glm_jax.model.transformer import abstract_model
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.sharding import named
from glm_jax.train.state import TrainSpec, build_model
from glm_jax.train.step import StepScalars, compile_step

ENGINE_MODES = ("decode", "verify", "prefill")


def trace_train(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    balance_weight: float,
    mesh: Mesh,
    rows: int,
    length: int,
):
    """The training step of one microbatch of `rows` rows, traced for the mesh; and its state as
    placed shapes.
    """
    spec = TrainSpec.create(model, optimizer)
    state, shape = spec.abstract_state(mesh), (1, rows, length)
    array = lambda dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=named(mesh, (None, "batch", "length"), shape, "batch")
    )
    batch = {name: array(jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}

    def scalar(dtype) -> Any:  # stands for an array in what is traced
        return jax.ShapeDtypeStruct((), dtype, sharding=named(mesh, ()))

    scalars = StepScalars(scalar(jnp.int32), *[scalar(jnp.float32)] * 3)
    step = compile_step(spec, balance_weight, mesh)
    # not around the above, which runs operations of its own: the devices are not here
    with jax.set_mesh(mesh):
        return step.trace(state, batch | {"loss_weights": array(jnp.float32)}, scalars), state


def check_engine_mode(mode: str, engine: EngineConfig):
    """Raises ValueError for a mode that is none of ENGINE_MODES, or a program that an engine of
    this number of drafts does not run.
    """
    check_choice("mode", mode, ENGINE_MODES)
    drafts = f"engine.draft_tokens={engine.draft_tokens}"
    if mode == "verify" and not engine.draft_tokens:
        raise ValueError(f"mode=verify: {drafts} leaves nothing to verify, it must be positive")
    if mode == "decode" and engine.draft_tokens:
        raise ValueError(
            f"mode=decode: with {drafts} the engine runs the program of mode=verify instead"
        )


def trace_engine(model: ModelConfig, engine: EngineConfig, mesh: Mesh, mode: str):
    """The engine's call with all rows, traced for the mesh; and the weights and the cache as placed
    shapes.

    mode: `decode`, engine.decode_steps tokens are sampled one after the other; `verify`, the same
    in passes of engine.draft_tokens + 1 tokens, each of which ends with the drafts for the next;
    `prefill`, a chunk of engine.prefill_chunk tokens of each row.
    Raises ValueError where the engine does not run that, or does not fit the model and the mesh.
    """
    check_engine_mode(mode, engine)
    engine.check_sizes(model, mesh)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(abstract_model(model))
        state = quantize.abstract(state, engine.weights, model.compute_dtype, mesh)
        pages = _pages(model, engine, mesh)
        rows, tokens, tables = _rows(engine, mesh)
        drafting = engine.draft_tokens > 0
        if mode == "prefill":
            chunk = jax.ShapeDtypeStruct(
                (engine.num_rows, engine.prefill_chunk), jnp.int32, sharding=tokens.sharding
            )
            traced = prefill.trace(
                graphdef, state, pages, rows, chunk, chunk, tables, drafting, False, False
            )
        else:
            traced = decode.trace(
                graphdef,
                state,
                pages,
                rows,
                tokens,
                tables,
                engine.decode_steps,
                engine.draft_tokens,
            )
    return traced, state, pages


def trace_swap(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    engine: EngineConfig,
    trainer_mesh: Mesh,
    engine_mesh: Mesh,
):
    """What the engine runs for new weights, traced; and the trainer's state, the engine's weights
    and its cache as placed shapes. Both meshes are of the same devices.
    """
    engine.check_sizes(model, engine_mesh)
    state = TrainSpec.create(model, optimizer).abstract_state(trainer_mesh)
    weights = nnx.state(build_model(model, state.params, state.router))
    changes, target = swap.changes_of(weights, engine.weights, model.compute_dtype, engine_mesh)
    traced = swap.make.trace(changes, jax.tree.leaves(weights))
    return traced, state, target, _pages(model, engine, engine_mesh)


def on_a_chip(tree) -> int:
    """Bytes of placed shapes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _pages(model: ModelConfig, engine: EngineConfig, mesh: Mesh):
    """Cache.pages as placed shapes."""
    num_layers = model.num_layers + (engine.draft_tokens > 0)
    dtype = model.compute_dtype if engine.cache_dtype == "compute" else engine.cache_dtype
    shapes = jax.eval_shape(
        lambda: empty_pages(
            model, num_layers, engine.num_pages, engine.page_size, dtype, engine.keep_experts
        )
    )
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named(mesh, PAGES[: x.ndim])),
        shapes,
    )


def _rows(engine: EngineConfig, mesh: Mesh):
    """Rows, last tokens and page tables of a full batch, replicated as the host sends them."""
    size, whole = engine.num_rows, named(mesh, ())

    def array(dtype, *shape) -> Any:  # stands for an array in what is traced
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=whole)

    ints, floats = array(jnp.int32), array(jnp.float32)
    params = RowParams(
        floats,
        ints,
        floats,
        floats,
        array(jnp.uint32, 3),
        array(jnp.int32, MAX_STOP_TOKENS),
        floats,
    )
    width = -(-(engine.context + engine.draft_tokens) // engine.page_size)
    return Rows(ints, ints, ints, params), ints, array(jnp.int32, width)
