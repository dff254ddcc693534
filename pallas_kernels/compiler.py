"""The real TPU compiler as the judge of kernels: what a chip can do, and a kernel's schedule, cycle
by cycle. Needs libtpu, no TPU.

Nothing here is measured on hardware: every figure is *compiled*.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.target import target_kind

KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# topologies
SMALLEST = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# The pass whose dump has one row a scheduled cycle; later ones turn idle cycles into delays.
PASS = "pre-delay_hlo"
SUFFIX = f"-{PASS}-static-per-bundle-utilization.txt"
PRODUCTS = ("MATMUL", "MXU")  # the column of issued products, by version of libtpu
VMEM_SUFFIX = "-vmem_report.html"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One core of a TPU: v4 and v5p chips have two, which share HBM and the parallel dimensions of
    a grid.
    """

    kind: str
    macs_per_cycle: int  # bfloat16 multiply-adds
    hbm_bytes_per_cycle: float
    vmem_bytes: int
    unit_size: int  # rows and columns of a MXU, 128 or 256


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's hot region: from the first to the last cycle that issues a product. A rolled loop
    shows once.

    slots: filled slots of each unit (MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL,
    VSTORE, VSTORE:SPILL, SALU) over the region; capacity: what a cycle offers. libtpu 0.0.50 calls
    MATMUL MXU, with the same numbers, and has no MATPUSH.
    """

    cycles: int
    slots: dict[str, int]
    capacity: dict[str, int]

    @property
    def fills(self) -> int:
        return self.slots["VLOAD:FILL"]

    @property
    def spills(self) -> int:
        return self.slots["VSTORE:SPILL"]

    def useful_rate(self, macs: int, chip: Chip) -> float:
        """Share of the peak: multiply-adds that the result of this region needs over those that its
        cycles could do.
        """
        return macs / (chip.macs_per_cycle * self.cycles)


@dataclasses.dataclass(frozen=True)
class Probe:
    """One call of a kernel at one shape with one choice of blocks, for the compiler to judge.

    function, args: what to compile, args as ShapeDtypeStructs. macs: per kernel in it (name of the
    pallas_call), the multiply-adds that the result needs of what the kernel's hot region shows: of
    one full tile or, where the region is one rolled loop, of one turn of it. hbm_bytes: moved by
    all blocks of the call; hbm_bytes_needed: every operand once and every result once.
    total_macs: that the whole call's result needs; computed_macs: that it costs, in full tiles,
    more where parts of them are for nothing.
    """

    function: Callable
    args: tuple
    macs: dict[str, int]
    hbm_bytes: int
    hbm_bytes_needed: int
    total_macs: int
    computed_macs: int | None = None  # total_macs

    def cycles(self, rate: float, chip: Chip) -> tuple[float, float]:
        """Of the whole call: those of the MXU at a rate, and those that HBM takes."""
        computed = self.total_macs if self.computed_macs is None else self.computed_macs
        return computed / (rate * chip.macs_per_cycle), self.hbm_bytes / chip.hbm_bytes_per_cycle


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the compiler says of a probe, per kernel in it; vmem_bytes: scratch and blocks in
    flight.
    """

    useful_rate: dict[str, float]
    schedules: dict[str, Schedule]
    vmem_bytes: dict[str, int]


def judge(probe: Probe, topology: str, folder: pathlib.Path) -> Verdict:
    """Compiles a probe after dump_schedules(folder). Raises what the compiler raises, e.g. where
    blocks do not fit VMEM.
    """
    take(folder)
    compile_kernel(probe.function, probe.args, topology)
    schedules, vmem = take(folder)
    if missing := probe.macs.keys() - schedules.keys():
        raise LookupError(
            f"the compiler wrote no schedule of {', '.join(sorted(missing))}, but of"
            f" {', '.join(schedules)}"
        )
    target = chip(topology)
    rates = {name: schedules[name].useful_rate(macs, target) for name, macs in probe.macs.items()}
    return Verdict(
        rates,
        {name: schedules[name] for name in probe.macs},
        {name: vmem[name] for name in probe.macs},
    )


def tpu_devices(topology: str) -> list:
    """Devices of a topology such as v5p:4x4x4. Raises ValueError for one that the compiler does not
    know or where it is missing.
    """
    kind = topology.split(":", maxsplit=1)[0]
    if kind not in KINDS or ":" not in topology:
        raise ValueError(
            f"topology={topology!r}: must be KIND:SHAPE, KIND one of {', '.join(KINDS)}, as in"
            " v5p:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server to ask
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # else a lock file allows one process a machine
    # libtpu ends the process at a flag that it does not know, and it knows none of XLA:CPU's, which
    # has read its own by now.
    jax.devices("cpu")
    os.environ["XLA_FLAGS"] = " ".join(
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_cpu_")
    )
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology={topology!r}: {error}") from error


def one_device(topology: str) -> Mesh:
    """Mesh of the topology's first device, for jax.set_mesh: what is traced under it is for that
    chip.
    """
    return Mesh(np.asarray(tpu_devices(topology)[:1]), ("data",))


def chip(topology: str) -> Chip:
    with jax.set_mesh(one_device(topology)):
        info = pltpu.get_tpu_info()
        kind = target_kind()
    # four units of 128 x 128, or two of 256 x 256 that each take two rows a cycle
    macs = 4 * info.mxu_column_size**2
    cycles_per_second = info.bf16_ops_per_second / 2 / macs
    return Chip(
        kind,
        macs,
        info.mem_bw_bytes_per_second / cycles_per_second,
        info.vmem_capacity_bytes,
        info.mxu_column_size,
    )


def compile_kernel(function, args, topology: str):
    """The function, compiled for one chip of the topology. args: ShapeDtypeStructs. Raises what the
    compiler raises.
    """
    mesh = one_device(topology)
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args)
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).compile()


def dump_schedules(folder: pathlib.Path):
    """From now on the compiler writes its schedules to a folder. To be called before the first call
    of it in this process.
    """
    flags = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        f" --xla_jf_dump_llo_pass_label_regex={PASS}"
    )
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def take(folder: pathlib.Path) -> tuple[dict[str, Schedule], dict[str, int]]:
    """Schedules and bytes of VMEM by operation since the last call; empties the folder. A kernel's
    operation is called by the name of its pallas_call; of several with one name the last is
    returned.
    """
    schedules, vmem = {}, {}
    for path in sorted(folder.iterdir()):
        text = path.read_text()
        if path.name.endswith(SUFFIX) and (schedule := read_schedule(text)) is not None:
            schedules[
                _without_number(re.sub(r"^\d+-(.*)-\d+$", r"\1", path.name.removesuffix(SUFFIX)))
            ] = schedule
        if path.name.endswith(VMEM_SUFFIX):
            report = json.JSONDecoder().raw_decode(text, text.index("{", text.index("const DATA")))[
                0
            ]
            vmem |= {
                _without_number(name): entry["total_size"]
                for name, entry in report["hlo_breakdowns"].items()
            }
        path.unlink()
    return schedules, vmem


def _without_number(operation: str) -> str:
    return re.sub(r"\.\d+$", "", operation)


def read_schedule(text: str) -> Schedule | None:
    """Reads a dump: names of the units, their capacity, then filled slots, one row a cycle. None
    where nothing is multiplied.

    Raises ValueError for a dump without a column of products, as another libtpu may write.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("==")]
    names = [name.strip() for name in lines[0].split(",")]
    product = next((name for name in PRODUCTS if name in names), None)
    if product is None:
        has = (
            f"the schedule has the columns {', '.join(names)}, but neither {' nor '.join(PRODUCTS)}"
        )
        raise ValueError(f"{has}: use libtpu 0.0.42, 0.0.50 or 0.0.52")
    rows = np.array([line.split() for line in lines[1:]], int)
    capacity, used = rows[0], rows[1:]
    hot = np.flatnonzero(used[:, names.index(product)])
    if not len(hot):
        return None
    region = used[hot[0] : hot[-1] + 1]
    return Schedule(
        len(region),
        dict(zip(names, region.sum(0).tolist(), strict=True)),
        dict(zip(names, capacity.tolist(), strict=True)),
    )
