"""The real TPU compiler as a planner: does a program fit a pod, what does it take there, and where
does its time go?

Needs libtpu, no hardware. Everything here is *compiled* or *estimated*, nothing measured. What the
estimate of time leaves out: kernels run at the rate of their limit (MXU or HBM) after
LEAST_CYCLES, a collective that XLA starts early is hidden by all that is scheduled until its end,
routing is balanced, links carry their full rate, and nothing is said about the host.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from glm_jax.config import ModelConfig
from glm_jax.infer.config import EngineConfig
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.plan import program as programs_text
from glm_jax.plan.program import Operation, Program
from glm_jax.plan.programs import on_a_chip, trace_engine, trace_train
from glm_jax.sharding import MeshConfig, make_mesh
from glm_jax.torus import Torus, place
from glm_jax.train.metrics import flops_per_token, matmul_parameters
from pallas_kernels import compiler
from pallas_kernels.target import target_kind

# that the compiler gives a program
HBM_GIB = {"v4": 15.25, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}
SENT_ONCE = ("send_rows", "send_result_gradients")  # scopes of moe_dispatch.exchange
ROW_KERNELS = ("grouped_", "copy_rows")  # whose estimates count an exchange's whole buffers
LINK_BYTES = {"v4": 45e9, "v5e": 45e9, "v5p": 90e9, "v6e": 90e9, "tpu7x": 90e9}  # a second, one way
LEAST_CYCLES = 2116  # XLA's estimate of its shortest operations, which our kernels are not spared
HOP_SECONDS = 1e-6  # of a message from one chip to the next


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of a program; bytes are of one device, which is a chip, or half of one
    on v4 and tpu7x.

    Seconds are of one step: a training step, a token of every row, or the last chunk of every row.
    estimated_step_seconds: XLA's operations by its own cycles, kernels by their limit, exposed
    collectives; parts: the same by kind of operation, kernel and collective, most first.
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
    message: str = ""  # the compiler's, where it does not fit


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step needs of one device: useful floating-point operations, and bytes that it must
    read and write once. Of an exchange's buffers, balanced routing fills the share `filled`, and
    `once` of that where a token goes once to a device.
    """

    flops: float
    hbm_bytes: float
    filled: float = 1.0
    once: float = 1.0


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
    """The engine's call with all rows; mode: `decode`, a token of every row over a full cache, or
    `prefill`, the last chunk of every row.

    Returns, besides, `cache_bytes_per_token` (of its own chip) and `cached_tokens_that_fit` on the
    whole pod: those of the plan's cache and of what it leaves free.
    """
    devices = compiler.tpu_devices(topology)
    mesh = make_mesh(mesh_config, devices)

    def trace():
        traced, state, pages = trace_engine(model, engine, mesh, prefilling=mode == "prefill")
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
    return dataclasses.replace(plan, **_estimate(read, work, mesh, topology, outer_loops)), read


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


def _estimate(read: Program, work: Work, mesh: Mesh, topology: str, outer_loops: int) -> dict:
    """The seconds of a Plan, and its number of kernel calls."""
    with jax.set_mesh(compiler.one_device(topology)):
        kind, core = target_kind(), pltpu.get_tpu_info()
        assert kind is not None, "the topology is one of TPUs"
    cores = 2 if kind == "v5p" else 1  # of a device
    peak = cores * core.bf16_ops_per_second
    clock = core.bf16_ops_per_second / (8 * core.mxu_column_size**2)
    bandwidth = cores * core.mem_bw_bytes_per_second
    torus = Torus.of(list(mesh.devices.flat))
    places = [place(device) for device in mesh.devices.flat]

    def seconds(operation: Operation) -> float:
        if operation.kind == "collective":
            share = work.filled if operation.opcode.startswith("ragged") else 1.0
            share *= work.once if any(scope in operation.op_name for scope in SENT_ONCE) else 1.0
            return share * collective_seconds(operation, torus, places, LINK_BYTES[kind])
        if operation.kind == "kernel":
            filled = work.filled if operation.name.startswith(ROW_KERNELS) else 1.0
            return (
                filled * max(operation.flops / peak, operation.moved_bytes / bandwidth)
                + LEAST_CYCLES / clock
            )
        return operation.cycles / clock

    total, parts, calls = collections.defaultdict(float), collections.defaultdict(float), 0
    for operation, times in read.executed(outer_loops):
        spent = seconds(operation)
        if operation.kind == "collective":
            spent = max(0.0, spent - sum(map(seconds, read.meanwhile.get(operation.name, ()))))
        total[{"collective": "collective", "kernel": "kernel"}.get(operation.kind, "xla")] += (
            times * spent
        )
        parts[_part(operation)] += times * spent
        calls += operation.kind == "kernel"
    step = sum(total.values())
    return {
        "xla_seconds": total["xla"], "kernel_seconds": total["kernel"],
        "exposed_collective_seconds": total["collective"],
        "estimated_step_seconds": step, "estimated_mfu": work.flops / peak / step,
        "needed_hbm_seconds": work.hbm_bytes / bandwidth,
        "kernel_calls": calls, "parts": dict(sorted(parts.items(), key=lambda part: -part[1])),
    }  # fmt: skip


def _part(operation: Operation) -> str:
    """What an operation's time is listed under."""
    kinds = {
        "product": "XLA products",
        "copy": "XLA copies",
        "other": "XLA, other",
        "kernel": f"kernel {operation.name.partition('.')[0]}",
    }
    found = kinds.get(operation.kind, f"exposed {operation.opcode.removesuffix('-start')}")
    return f"optimizer: {found}" if operation.source.startswith("glm_jax/optim/") else found


def collective_seconds(
    operation: Operation, torus: Torus, places: Sequence[tuple[int, ...]], link_bytes: float
) -> float:
    """By the largest array. An all-to-all as Torus.spread, all else on rings through the block of
    its devices, both ways around; and never less than HOP_SECONDS a link to the farthest device.
    places: of each device of the mesh; link_bytes: a second, one way.
    """
    size, kind = max(len(operation.group), 1), operation.opcode.removesuffix("-start")
    block = torus.block([places[device] for device in operation.group]) if size > 1 else None
    # one device, a permutation, or no block: as if neighbours stood along one line
    if block is None:
        block = ((size, 1),)
    if kind.endswith("all-to-all"):
        spent = operation.bytes * torus.spread(block)
    else:
        share = 1.0 if kind == "collective-permute" else (size - 1) / size / 2
        spent = (
            operation.bytes
            * share
            / operation.rings
            * torus.ring(block)
            * (2 if kind == "all-reduce" else 1)
        )
    return max(spent / link_bytes, torus.hops(block) * HOP_SECONDS)


def worst(read: Program, outer_loops: int, count: int = 10) -> list[tuple[Operation, int]]:
    """The operations with the most estimated cycles, with how often each runs."""
    total = collections.Counter()
    for operation, times in read.executed(outer_loops):
        total[operation] += times
    return sorted(total.items(), key=lambda item: -item[0].cycles * item[1])[:count]
