"""What a compiled program takes, estimated: XLA's operations by its own cycles, kernels by their
limit, collectives by their bytes over the links of the torus.

What that leaves out: kernels run at the rate of the MXU or HBM after LEAST_CYCLES, a collective
that XLA starts early is hidden by all that is scheduled until its end, routing is balanced, links
carry their full rate, and nothing is said about the host.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from glm_jax.plan.program import Operation, Program
from glm_jax.torus import Torus, place
from pallas_kernels import compiler
from pallas_kernels.target import target_kind

SENT_ONCE = ("send_rows", "send_result_gradients")  # scopes of moe_dispatch.exchange
ROW_KERNELS = ("grouped_", "copy_rows")  # whose estimates count an exchange's whole buffers
LINK_BYTES = {"v4": 45e9, "v5e": 45e9, "v5p": 90e9, "v6e": 90e9, "tpu7x": 90e9}  # a second, one way
LEAST_CYCLES = 2116  # XLA's estimate of its shortest operations, which our kernels are not spared
HOP_SECONDS = 1e-6  # of a message from one chip to the next


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


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of one device: floating-point operations, cycles, bytes of HBM and of a link one way, a
    second.
    """

    flops: float
    clock: float
    hbm: float
    link: float

    @classmethod
    def of(cls, topology: str) -> Rates:
        with jax.set_mesh(compiler.one_device(topology)):
            kind, core = target_kind(), pltpu.get_tpu_info()
            assert kind is not None, "the topology is one of TPUs"
        cores = 2 if kind == "v5p" else 1  # of a device
        return cls(
            cores * core.bf16_ops_per_second,
            core.bf16_ops_per_second / (8 * core.mxu_column_size**2),
            cores * core.mem_bw_bytes_per_second,
            LINK_BYTES[kind],
        )


class Collectives:
    """What the collectives of a program move and take, by their kind and the axes of the mesh that
    they go along.

    bytes: that one device receives. seconds: of those all, exposed_seconds: that nothing hides.
    """

    def __init__(self, mesh: Mesh, work: Work):
        self.mesh, self.work = mesh, work
        self.found = collections.defaultdict(lambda: collections.defaultdict[str, float](int))

    def filled(self, operation: Operation) -> float:
        """The share of an exchange's buffers that balanced routing fills; else 1."""
        share = self.work.filled if operation.opcode.startswith("ragged") else 1.0
        once = any(scope in operation.op_name for scope in SENT_ONCE)
        return share * (self.work.once if once else 1.0)

    def add(self, operation: Operation, times: int, seconds: float, exposed: float):
        key = operation.opcode.removesuffix("-start"), self._axes(operation)
        received = self.filled(operation) * operation.bytes * _received(operation)
        row = self.found[key]
        row["count"] += times
        row["bytes"] += times * received
        row["seconds"] += times * seconds
        row["exposed_seconds"] += times * exposed

    def listed(self) -> list[dict]:
        """Those that move most, first."""
        rows = [{"kind": kind, "axes": axes, **row} for (kind, axes), row in self.found.items()]
        return sorted(rows, key=lambda row: -row["bytes"])

    def _axes(self, operation: Operation) -> str:
        members = operation.pairs or (operation.group,)
        places = np.stack(np.unravel_index(np.array(members, int), self.mesh.devices.shape))
        among = (places != places[..., :1]).any(axis=(1, 2))
        return " x ".join(
            a for a, is_among in zip(self.mesh.axis_names, among, strict=True) if is_among
        )


def _received(operation: Operation) -> float:
    """Of the bytes of a collective's largest array, the share that a device receives."""
    if operation.pairs:
        return 1.0
    size = max(len(operation.group), 1)
    return (size - 1) / size * (2 if operation.opcode.startswith("all-reduce") else 1)


def estimate(read: Program, work: Work, mesh: Mesh, topology: str, outer_loops: int) -> dict:
    """The seconds of a Plan, its number of kernel calls and its collectives. outer_loops: as
    Program.times.
    """
    rates, collective = Rates.of(topology), Collectives(mesh, work)
    torus = Torus.of(list(mesh.devices.flat))
    places = [place(device) for device in mesh.devices.flat]

    @functools.cache
    def seconds(operation: Operation) -> float:
        if operation.kind == "collective":
            return collective.filled(operation) * collective_seconds(
                operation, torus, places, rates.link
            )
        if operation.kind == "kernel":
            filled = work.filled if operation.name.startswith(ROW_KERNELS) else 1.0
            return (
                filled * max(operation.flops / rates.flops, operation.moved_bytes / rates.hbm)
                + LEAST_CYCLES / rates.clock
            )
        return operation.cycles / rates.clock

    total, parts, calls = collections.defaultdict(float), collections.defaultdict(float), 0
    for operation, times in read.executed(outer_loops):
        spent = seconds(operation)
        if operation.kind == "collective":
            hidden = sum(map(seconds, read.meanwhile.get(operation.name, ())))
            exposed = max(0.0, spent - hidden)
            collective.add(operation, times, spent, exposed)
            spent = exposed
        total[{"collective": "collective", "kernel": "kernel"}.get(operation.kind, "xla")] += (
            times * spent
        )
        parts[_part(operation)] += times * spent
        calls += operation.kind == "kernel"
    step = sum(total.values())
    return {
        "xla_seconds": total["xla"], "kernel_seconds": total["kernel"],
        "exposed_collective_seconds": total["collective"],
        "estimated_step_seconds": step, "estimated_mfu": work.flops / rates.flops / step,
        "needed_hbm_seconds": work.hbm_bytes / rates.hbm,
        "kernel_calls": calls, "parts": dict(sorted(parts.items(), key=lambda part: -part[1])),
        "collectives": collective.listed(),
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
    """By the largest array. An all-to-all as Torus.spread, a permutation by its busiest link, all
    else on rings through the block of its devices, both ways around; and never less than
    HOP_SECONDS a link to the farthest device. places: of each device of the mesh; link_bytes: a
    second, one way.
    """
    if operation.pairs:
        pairs = [(places[source], places[target]) for source, target in operation.pairs]
        load, hops = torus.busiest(pairs)
        return max(operation.bytes * load / link_bytes, hops * HOP_SECONDS)
    size, kind = max(len(operation.group), 1), operation.opcode.removesuffix("-start")
    block = torus.block([places[device] for device in operation.group]) if size > 1 else None
    # one device, or no block: as if neighbours stood along one line
    if block is None:
        block = ((size, 1),)
    if kind.endswith("all-to-all"):
        spent = operation.bytes * torus.spread(block)
    else:
        spent = operation.bytes * _received(operation) / 2 / operation.rings * torus.ring(block)
    return max(spent / link_bytes, torus.hops(block) * HOP_SECONDS)
