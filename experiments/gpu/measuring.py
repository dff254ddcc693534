"""How the sections of measure_gpu compile, time and record."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import time
import traceback

import jax

GIB = 2**30
# What a program that does not fit, or that this device or version cannot compile, raises. Anything
# else ends the section.
EXPECTED = (
    jax.errors.JaxRuntimeError,
    NotImplementedError,
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    ImportError,
)


@dataclasses.dataclass(frozen=True)
class Section:
    """A running section: where its records go, and whether it runs at toy size."""

    name: str
    output: pathlib.Path
    rehearse: bool

    def record(self, **fields):
        """Appends one measurement to measurements.jsonl at once, so that it outlives whatever ends
        the process.
        """
        line = json.dumps({"section": self.name, **fields})
        with (self.output / "measurements.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def attempt(self, measure, **fields):
        """Records fields and what measure() returns, or its error; the traceback goes to the
        section's log. Returns whether it worked.
        """
        try:
            self.record(**fields, **measure())
        except EXPECTED as error:
            traceback.print_exc()
            self.record(**fields, error=first_line(f"{type(error).__name__}: {error}"))
            return False
        return True


def first_line(text: str, width: int = 160) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= width else line[: width - 3] + "..."


def compiled(function, *args):
    """The compiled function, and {"compile_s", "program_gib"}: seconds, and memory of arguments,
    results and temporaries.

    Raises MemoryError-like ValueError before anything runs where the device is too small for it.
    """
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    facts = {"compile_s": round(time.perf_counter() - start, 1)}
    memory = program.memory_analysis()
    if memory is not None:
        needed = (
            memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
        facts["program_gib"] = round(needed / GIB, 2)
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit is not None and needed > limit:
            raise ValueError(
                f"the program needs {needed / GIB:.1f} GiB, the device gives {limit / GIB:.1f}"
            )
    return program, facts


def seconds(program, *args, repeats: int = 5, calls: int = 1) -> float:
    """Median seconds of a call, after one that warms up; each repeat queues `calls` of them and
    waits for the last.
    """
    jax.block_until_ready(program(*args))
    times = []
    for _ in range(repeats):
        start, out = time.perf_counter(), None
        for _ in range(calls):
            out = program(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
        del out
    return statistics.median(times)


def peak_gib() -> float | None:
    """Most memory that this process has had in use on the device; None where the backend does not
    count.
    """
    stats = jax.devices()[0].memory_stats()
    return round(stats["peak_bytes_in_use"] / GIB, 2) if stats else None


def needs_gpu(section: Section, what: str) -> bool:
    """Records that `what` needs a GPU, where there is none. Returns whether it may run."""
    if jax.default_backend() == "gpu":
        return True
    section.record(what=what, error=f"needs a GPU, this is a {jax.default_backend()}")
    return False
