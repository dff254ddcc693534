"""A program of the TPU compiler, read: which operations take its time, how often they run, and
which line of ours made them.

Cycles are the compiler's own estimates, of a cost model that knows no kernels of ours and no
collectives: kernels bring estimates of their own (pallas_kernels/cost.py), collectives are listed
with their bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
NO_WORK = 10**15  # what the compiler writes for an operation that it has no estimate of
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction. bytes: of the largest array that it makes; of a ragged all-to-all no more
    than what it reads holds. cycles: of one execution, 0 where there is no estimate. source: the
    innermost line of this project that made it, as file:line function, and op_name, JAX's name for
    it; both may be empty. group: the first group of devices that a collective is among, by their
    places in the mesh, else none. flops, moved_bytes: of a kernel, by its own estimate. rings:
    through its group that a collective sends around at a time, both ways. pairs: of a permutation,
    each device that sends to another, and that one.
    """

    name: str
    opcode: str
    shape: str
    bytes: int
    cycles: int
    source: str
    op_name: str
    group: tuple[int, ...] = ()
    flops: int = 0
    moved_bytes: int = 0
    rings: float = 1.0
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def kind(self) -> str:
        """kernel, collective, product, copy or other."""
        collective = self.opcode.removesuffix("-start")
        if self.opcode == "custom-call":
            return "kernel"
        if collective in COLLECTIVES:
            return "collective"
        if self.op_name.endswith("dot_general") or self.name.startswith("convolution"):
            return "product"
        copies = (
            "copy",
            "slice",
            "dynamic-slice",
            "transpose",
            "bitcast_dynamic-update-slice",
            "broadcast",
            "pad",
        )
        return "copy" if self.name.startswith(copies) else "other"


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop. trips: None where they are not known before it runs."""

    body: str
    condition: str
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Program:
    """operations, as scheduled, and computations called besides loops' bodies, of each computation;
    loops by the computation that they stand in. meanwhile: by the name of the start of a
    collective, the operations that are scheduled before its end.
    """

    entry: str
    operations: Mapping[str, list[Operation]]
    calls: Mapping[str, list[str]]
    loops: Mapping[str, list[Loop]]
    meanwhile: Mapping[str, list[Operation]]

    def times(self, outer: int) -> dict[str, int]:
        """How often each computation runs. Loops whose trips are not known run `outer` times where
        they are outermost, and else not at all: further rounds of an exchange, which balanced
        routing does not need.
        """
        out = collections.Counter()

        def visit(computation: str, times: int):
            out[computation] += times
            for loop in self.loops.get(computation, ()):
                unknown = outer if computation == self.entry else 0
                visit(loop.body, times * (unknown if loop.trips is None else loop.trips))
            for called in self.calls.get(computation, ()):
                visit(called, times)

        visit(self.entry, 1)
        return dict(out)

    def executed(self, outer: int) -> Iterator[tuple[Operation, int]]:
        """Operations with how often each runs, as `times` says. Of a conditional all branches
        count.
        """
        for computation, times in self.times(outer).items():
            for operation in self.operations[computation]:
                yield operation, times


def read(text: str) -> Program:
    """Reads `jax.stages.Compiled.as_text()` of a program for a TPU."""
    sources = _sources(text)
    entry, computation, conditions = "", "", collections.defaultdict(list)
    operations, calls, found = collections.defaultdict(list), collections.defaultdict(list), []
    started, meanwhile, heads, sizes = {}, {}, {}, {}
    for line in text.splitlines():
        if not line.startswith(" "):
            if head := _HEAD.match(line):
                computation = head[2]
                heads[computation] = line
                entry = computation if head[1] else entry
            continue
        match = _OPERATION.match(line)
        if match is None:
            continue
        name, shape, opcode = match.groups()
        conditions[computation].append(line)
        sizes[name] = largest(shape)
        if opcode == "while":
            condition, body = (
                _found(rf"{role}=%?([\w.\-]+)", line) for role in ("condition", "body")
            )
            found.append((computation, body, condition))
            continue
        if opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            named = (
                branches[1].split(",")
                if branches
                else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
            )
            calls[computation] += [branch.strip().lstrip("%") for branch in named]
        elif opcode in ("call", "async-start"):
            calls[computation] += re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line)[:1]
        if opcode.endswith("-done") and (start := _found(r"-done\(%?([\w.\-]+)", line)) in started:
            meanwhile[start] = operations[computation][started[start] :]
        cycles = _CYCLES.search(line)
        cycles = int(cycles[1]) if cycles and int(cycles[1]) < NO_WORK else 0
        scattered = re.search(r" calls=%?(all-reduce-scatter[\w.\-]*)", line)
        opcode, cycles = ("reduce-scatter", 0) if scattered else (opcode, cycles)
        if cycles or _is_counted(opcode, line):
            size = largest(heads[scattered[1]]) if scattered else sizes[name]
            if opcode.startswith("ragged-all-to-all"):
                size = min(
                    size,
                    *(
                        sizes.get(array, size)
                        for array in re.findall(r"%([\w.\-]+)", line.partition(opcode)[2])[:2]
                    ),
                )
            group = next(
                filter(None, map(_group, conditions[scattered[1]] if scattered else [line])), ()
            )
            frame = re.search(r"stack_frame_id=(\d+)", line)
            op_name = re.search(r'op_name="([^"]*)"', line)
            source = sources.get(int(frame[1]), "") if frame else ""
            operations[computation].append(
                Operation(name, opcode, shape, size, cycles, source, op_name[1] if op_name else "",
                          group, *_cost(line), _rings(line), _pairs(line))
            )  # fmt: skip
            if opcode.endswith("-start"):
                started[name] = len(operations[computation])
    loops = collections.defaultdict(list)
    for where, body, condition in found:
        loops[where].append(Loop(body, condition, _trips(conditions[condition])))
    every = {*operations, *calls, *loops, *conditions}
    return Program(
        entry, {name: operations[name] for name in every}, dict(calls), dict(loops), meanwhile
    )


def _cost(line: str) -> tuple[int, int]:
    """Floating-point operations and bytes moved that a kernel says."""
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', line)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def largest(shape: str) -> int:
    """Bytes of the largest array of an instruction's shape, which may be a tuple."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return max(
        (
            ITEM_BYTES.get(dtype, 0) * math.prod(map(int, filter(None, dims.split(","))))
            for dtype, dims in arrays
        ),
        default=0,
    )


def _is_counted(opcode: str, line: str) -> bool:
    return (opcode == "custom-call" and '"tpu_custom_call"' in line) or opcode.removesuffix(
        "-start"
    ) in COLLECTIVES


def _group(line: str) -> tuple[int, ...]:
    """The first replica group, in each of the ways in which XLA writes them."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        among = re.findall(r"'(\w+)'", mesh[2])
        whole = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        return tuple(
            whole[tuple(slice(None) if axis in among else 0 for axis in sizes)].reshape(-1).tolist()
        )
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sizes = [int(size) for size in iota[2].split(",")]
        order = [int(axis) for axis in iota[3].split(",")] if iota[3] else list(range(len(sizes)))
        return tuple(
            np.arange(math.prod(sizes))
            .reshape(sizes)
            .transpose(order)
            .reshape(-1)[: int(iota[1])]
            .tolist()
        )
    first = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return tuple(int(device) for device in first[1].split(",")) if first else ()


def _pairs(line: str) -> tuple[tuple[int, int], ...]:
    """Of a permutation, those that send to another device."""
    found = re.search(r"source_target_pairs=\{([\d,{} ]*)\}", line)
    pairs = re.findall(r"\{(\d+), ?(\d+)\}", found[1]) if found else ()
    return tuple((int(a), int(b)) for a, b in pairs if a != b)


def _rings(line: str) -> float:
    """XLA's colors are rings both ways around, or one way where it says so."""
    found = re.search(r'"strategy":"(\w+)".*?\{colors:(\d+)', line)
    return int(found[2]) / (2 if found[1].startswith("UniDirection") else 1) if found else 1.0


def _trips(condition: list[str]) -> int | None:
    """Of a loop that counts up to a constant, by the lines of its condition."""
    lines = {match[1]: line for line in condition if (match := _OPERATION.match(line))}
    root = next((line for line in condition if line.lstrip().startswith("ROOT")), "")
    compared = re.search(r" compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", root)
    constant = compared and re.search(r" constant\((\d+)\)", lines.get(compared[1], ""))
    return int(constant[1]) if constant else None


def _found(pattern: str, text: str) -> str:
    """The first group of the first match. Raises ValueError where there is none."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's text is not as expected: no {pattern!r} in {text[:200]}")
    return match[1]


def _sources(text: str) -> dict[int, str]:
    """The innermost line of this project of each stack frame of the program's tables."""
    tables = collections.defaultdict(dict)
    table = None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
        elif table and (entry := re.match(r"(\d+) (.*)$", line)):
            tables[table][int(entry[1])] = entry[2]
        elif table and line.startswith(("%", "ENTRY")):
            break
    location = {}
    for number, fields in tables["FileLocations"].items():
        file, function, line = (
            int(_found(rf"{name}=(\d+)", fields))
            for name in ("file_name_id", "function_name_id", "line")
        )
        path = tables["FileNames"][file].strip('"')
        ours = re.search(r"((?:glm_jax|pallas_kernels)/[\w/]+\.py)$", path)
        location[number] = (
            f"{ours[1]}:{line} {tables['FunctionNames'][function].strip(chr(34))}" if ours else ""
        )
    out = {}
    for number in tables["StackFrames"]:
        frame = number
        while frame in tables["StackFrames"]:
            here, parent = map(int, re.findall(r"_id=(\d+)", tables["StackFrames"][frame]))
            if location[here]:
                out[number] = location[here]
                break
            frame = parent - 1  # numbered from 1 here and from 0 there
    return out
