"""The real TPU compiler as a planner: does a program fit a pod, and what does it take there? Needs libtpu, no hardware."""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.config import ModelConfig
from glm_jax.infer import quantize
from glm_jax.infer.engine import EngineConfig
from glm_jax.infer.sampling import MAX_STOP_TOKENS, RowParams
from glm_jax.infer.steps import Rows, decode
from glm_jax.model.cache import PAGES, empty_pages
from glm_jax.model.transformer import abstract_model
from glm_jax.sharding import BATCH_AXES, MeshConfig, make_mesh, named
from pallas_kernels.compiler import tpu_devices

HBM_GIB = {"v4": 15.25, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}  # that the compiler gives a program


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says about a program; bytes are of one device, which is a chip, or half of one on v4 and tpu7x."""

    topology: str
    num_devices: int
    fits: bool
    hbm_capacity_bytes: int
    hbm_bytes_per_chip: int  # 0 where the compiler gave up
    weight_bytes: int
    cache_bytes: int
    temporary_bytes: int
    compile_seconds: float
    message: str  # the compiler's, where it does not fit


def plan_decode(model: ModelConfig, engine: EngineConfig, mesh_config: MeshConfig, topology: str) -> tuple[Plan, dict]:
    """Compiles the engine's decode call with all rows for a pod, and says what one chip holds.

    Returns the plan and, besides, `cache_bytes_per_token` (of its own chip) and `cached_tokens_that_fit` on the whole pod: those
    of the plan's cache and of what it leaves free.
    """
    devices = tpu_devices(topology)
    mesh = make_mesh(mesh_config, devices)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    for field in ("num_rows", "num_pages"):
        if getattr(engine, field) % shards:
            raise ValueError(f"engine.{field}={getattr(engine, field)} cannot be split over {shards} shards of the mesh")
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(abstract_model(model))
        state = quantize.abstract(state, engine.weights, model.compute_dtype, mesh)
        pages = abstract_pages(model, engine, mesh)
        rows, tokens, tables = abstract_rows(engine, mesh)
        capacity = int(HBM_GIB[topology.split(":", maxsplit=1)[0]] * 2**30)
        weight_bytes, cache_bytes = on_a_chip(state), on_a_chip(pages)
        start, message = time.perf_counter(), ""
        try:
            traced = decode.trace(graphdef, state, pages, rows, tokens, tables, engine.decode_steps, engine.draft_tokens)
            memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
            temporary = memory.temp_size_in_bytes
            total = temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            temporary, total, message = 0, 0, str(error)
        seconds = time.perf_counter() - start
    plan = Plan(
        topology, len(devices), not message, capacity, total, weight_bytes, cache_bytes, temporary, round(seconds, 1), message
    )  # fmt: skip
    a_token = cache_bytes / (engine.num_pages // shards * engine.page_size)
    fit = 0 if message else int(shards * (cache_bytes + capacity - total) / a_token)
    return plan, {"cache_bytes_per_token": a_token, "cached_tokens_that_fit": fit}


def on_a_chip(tree) -> int:
    """Bytes of placed shapes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def abstract_pages(model: ModelConfig, engine: EngineConfig, mesh: Mesh):
    """Cache.pages as placed shapes."""
    num_layers = model.num_layers + (engine.draft_tokens > 0)
    dtype = model.compute_dtype if engine.cache_dtype == "compute" else engine.cache_dtype
    shapes = jax.eval_shape(lambda: empty_pages(model, num_layers, engine.num_pages, engine.page_size, dtype, engine.keep_experts))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named(mesh, PAGES[: x.ndim])), shapes)


def abstract_rows(engine: EngineConfig, mesh: Mesh):
    """Rows, last tokens and page tables of a full batch, replicated as the host sends them."""
    size, whole = engine.num_rows, NamedSharding(mesh, PartitionSpec())
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=whole)  # noqa: E731
    ints, floats = array(jnp.int32), array(jnp.float32)
    params = RowParams(floats, ints, floats, floats, array(jnp.uint32, 3), array(jnp.int32, MAX_STOP_TOKENS), floats)
    width = -(-(engine.context + engine.draft_tokens) // engine.page_size)
    return Rows(ints, ints, ints, params), ints, array(jnp.int32, width)
