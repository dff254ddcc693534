"""The real TPU compiler as a planner: does a program fit a pod, what does it take there, and where
does its time go?

Needs libtpu, no hardware. Everything here is *compiled* or *estimated* (estimate.py), nothing
measured.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from glm_jax.config import ModelConfig
from glm_jax.infer.config import EngineConfig
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.plan import program as programs_text
from glm_jax.plan.estimate import Work, estimate
from glm_jax.plan.program import Operation, Program
from glm_jax.plan.programs import on_a_chip, trace_engine, trace_swap, trace_train
from glm_jax.sharding import MeshConfig, make_mesh
from glm_jax.train.metrics import flops_per_token, matmul_parameters
from pallas_kernels import compiler

# that the compiler gives a program
HBM_GIB = {"v4": 15.25, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of a program; bytes are of one device, which is a chip, or half of one
    on v4 and tpu7x.

    Seconds are of one step: a training step; a token of every row; a pass that verifies the drafts
    of every row and makes the next; the last chunk of every row; or a swap of weights.
    estimated_step_seconds: XLA's operations by its own cycles, kernels by their limit, exposed
    collectives; parts: the same by kind of operation, kernel and collective, most first.
    collectives: of each kind and axes of the mesh, as estimate.Collectives has them.
    needed_hbm_seconds: what the step must read and write, once.
    """

    mode: str
    topology: str
    num_devices: int
    fits: bool
    hbm_capacity_bytes: int
    hbm_bytes_per_chip: int  # the compiler's peak; 0 where it gave up
    weight_bytes: int
    cache_bytes: int
    lower_seconds: float
    compile_seconds: float
    params_total: int
    params_active: int
    flops_per_token: float
    xla_seconds: float = 0.0
    kernel_seconds: float = 0.0
    exposed_collective_seconds: float = 0.0
    estimated_step_seconds: float = 0.0
    estimated_mfu: float = 0.0
    needed_hbm_seconds: float = 0.0
    kernel_calls: int = 0  # of the compiled program
    lowered_kernels: int = 0
    distinct_kernels: int = 0
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    collectives: Sequence[Mapping] = ()
    message: str = ""  # the compiler's, where it does not fit


def plan_train(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    balance_weight: float,
    mesh_config: MeshConfig,
    topology: str,
    rows: int,
    length: int,
) -> tuple[Plan, Program | None]:
    """A training step of one microbatch of `rows` rows. HBM: the state is read and written once."""
    devices = compiler.tpu_devices(topology)
    mesh = make_mesh(mesh_config, devices)

    def trace():
        traced, state = trace_train(model, optimizer, balance_weight, mesh, rows, length)
        held = on_a_chip(state)
        flops = rows * length * flops_per_token(model, length)
        parts = mesh.shape["expert"]
        choices = model.num_experts_per_token
        shares = (
            (1 / model.expert_buffer, parts * (1 - (1 - 1 / parts) ** choices) / choices)
            if parts > 1
            else ()
        )
        return traced, on_a_chip(state.params), 0, Work(flops / len(devices), 2 * held, *shares)

    return _plan("train", model, mesh, topology, trace, length=length, outer_loops=0)


def plan_engine(
    model: ModelConfig, engine: EngineConfig, mesh_config: MeshConfig, topology: str, mode: str
) -> tuple[Plan, Program | None, dict]:
    """The engine's call with all rows; mode: `decode`, a token of every row over a full cache;
    `verify`, one pass of engine.draft_tokens + 1 tokens of every row; or `prefill`, the last chunk
    of every row. Errors as for trace_engine.

    Returns, besides, `cache_bytes_per_token` (of its own chip) and `cached_tokens_that_fit` on the
    whole pod: those of the plan's cache and of what it leaves free.
    """
    devices = compiler.tpu_devices(topology)
    mesh = make_mesh(mesh_config, devices)

    def trace():
        traced, state, pages = trace_engine(model, engine, mesh, mode)
        weights, cache = on_a_chip(state), on_a_chip(pages)
        tokens = engine.num_rows * (
            engine.prefill_chunk if mode == "prefill" else 1 + engine.draft_tokens
        )
        flops = tokens * _engine_flops(model, engine, head=mode != "prefill") / len(devices)
        return traced, weights, cache, Work(flops, weights + cache)

    plan, read = _plan(mode, model, mesh, topology, trace, length=engine.context, outer_loops=1)
    shards = len(devices)
    a_token = plan.cache_bytes / (engine.num_pages // shards * engine.page_size)
    fit = (
        int(
            shards
            * (plan.cache_bytes + plan.hbm_capacity_bytes - plan.hbm_bytes_per_chip)
            / a_token
        )
        if plan.fits
        else 0
    )
    return plan, read, {"cache_bytes_per_token": a_token, "cached_tokens_that_fit": fit}


def plan_swap(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    engine: EngineConfig,
    trainer_mesh: MeshConfig,
    engine_mesh: MeshConfig,
    topology: str,
) -> tuple[Plan, Program | None, dict]:
    """New weights for the engine from the trainer's, both on all devices of the pod. HBM: the
    trainer's are read and the engine's are written once.

    Returns, besides, bytes of a chip: `trainer_weight_bytes`; `resident_bytes`, which are there
    meanwhile and not in the program, the optimizer's state and the cache; and whether the program
    fits `beside_them`. The engine's old weights are freed before it runs.
    """
    devices = compiler.tpu_devices(topology)
    meshes = [make_mesh(config, devices) for config in (trainer_mesh, engine_mesh)]
    more = {}

    def trace():
        traced, state, target, pages = trace_swap(model, optimizer, engine, *meshes)
        taken, made = on_a_chip((state.params, state.router)), on_a_chip(target)
        cache = on_a_chip(pages)
        more["trainer_weight_bytes"] = taken
        more["resident_bytes"] = on_a_chip(state) - taken + cache
        return traced, made, cache, Work(0.0, taken + made)

    plan, read = _plan(
        "swap", model, meshes[0], topology, trace, length=engine.context, outer_loops=0
    )
    held = plan.hbm_bytes_per_chip + more["resident_bytes"]
    return plan, read, more | {"beside_them": plan.fits and held <= plan.hbm_capacity_bytes}


def _engine_flops(model: ModelConfig, engine: EngineConfig, head: bool) -> float:
    """Of a token at the end of the context, which sees what one of twice the length sees by the
    mean. head: whether logits are made.
    """
    run = model if engine.draft_tokens else dataclasses.replace(model, num_mtp_layers=0)
    heads = 0 if head else 2 * (1 + run.num_mtp_layers) * model.hidden_size * model.vocab_size
    return flops_per_token(run, 2 * engine.context - 1) / 3 - heads


def _plan(
    mode: str,
    model: ModelConfig,
    mesh: Mesh,
    topology: str,
    trace,
    *,
    length: int,
    outer_loops: int,
) -> tuple[Plan, Program | None]:
    kind = topology.split(":", maxsplit=1)[0]
    capacity = int(HBM_GIB[kind] * 2**30)
    start = time.perf_counter()
    traced, weights, cache, work = trace()
    lowered = traced.lower(lowering_platforms=("tpu",))
    kernels = re.findall(
        r'@tpu_custom_call.*?backend_config = "((?:[^"\\]|\\.)*)"', lowered.as_text()
    )
    lowering = time.perf_counter() - start
    start, message, peak, text = time.perf_counter(), "", 0, ""
    try:
        compiled = lowered.compile()
        peak = compiled.memory_analysis().peak_memory_in_bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = str(error)
    else:
        text = _text(compiled)
    compiling = time.perf_counter() - start
    plan = Plan(
        mode, topology, mesh.size, not message, capacity, peak, weights, cache, round(lowering, 1),
        round(compiling, 1),
        _parameters(model), matmul_parameters(model), flops_per_token(model, length),
        lowered_kernels=len(kernels), distinct_kernels=len(set(kernels)), message=message,
    )  # fmt: skip
    if message:
        return plan, None
    read = programs_text.read(text)
    return dataclasses.replace(plan, **estimate(read, work, mesh, topology, outer_loops)), read


def _text(compiled) -> str:
    """The program's text. Raises ValueError where this libtpu cannot give it."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        pairs = "jax 0.12 with libtpu 0.0.50 or 0.0.52, jax 0.10 with libtpu 0.0.42"
        raise ValueError(
            f"jax {jax.__version__} and this libtpu compiled the program but cannot write it down:"
            f" use {pairs}"
        ) from error


def _parameters(model: ModelConfig) -> int:
    """All of them, inactive experts included."""
    inactive = model.num_experts - model.num_experts_per_token
    moe_layers = model.num_moe_layers + model.num_mtp_layers
    return (
        matmul_parameters(model)
        + moe_layers * inactive * 3 * model.hidden_size * model.expert_ffn_size
        + (model.vocab_size * model.hidden_size)
    )


def worst(read: Program, outer_loops: int, count: int = 10) -> list[tuple[Operation, int]]:
    """The operations with the most estimated cycles, with how often each runs."""
    total = collections.Counter()
    for operation, times in read.executed(outer_loops):
        total[operation] += times
    return sorted(total.items(), key=lambda item: -item[0].cycles * item[1])[:count]
