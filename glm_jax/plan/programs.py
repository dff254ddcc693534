"""The programs of a run, lowered for a pod that is not there: the training step, the engine's
decode call and its prefill call.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from glm_jax.config import ModelConfig
from glm_jax.infer import quantize
from glm_jax.infer.config import EngineConfig, num_shards
from glm_jax.infer.sampling import MAX_STOP_TOKENS, RowParams
from glm_jax.infer.steps import Rows, decode, prefill
from glm_jax.model.cache import PAGES, empty_pages
from glm_jax.model.transformer import abstract_model
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.sharding import named
from glm_jax.train.state import TrainSpec
from glm_jax.train.step import StepScalars, compile_step


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


def trace_engine(model: ModelConfig, engine: EngineConfig, mesh: Mesh, *, prefilling: bool):
    """The engine's call with all rows, traced for the mesh; and the weights and the cache as placed
    shapes.

    prefilling: a chunk of engine.prefill_chunk tokens of each row; else engine.decode_steps tokens
    are sampled.
    """
    shards = num_shards(mesh)
    for field in ("num_rows", "num_pages"):
        if getattr(engine, field) % shards:
            raise ValueError(
                f"engine.{field}={getattr(engine, field)} cannot be split over {shards} shards of"
                " the mesh"
            )
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(abstract_model(model))
        state = quantize.abstract(state, engine.weights, model.compute_dtype, mesh)
        pages = _pages(model, engine, mesh)
        rows, tokens, tables = _rows(engine, mesh)
        drafting = engine.draft_tokens > 0
        if prefilling:
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
