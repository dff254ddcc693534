"""Correctness, kernels, training and decoding on one GPU, in at most 8 minutes; --rehearse runs it all on a CPU at toy size.

    python -m experiments.measure_gpu --output=DIR

Each section runs in a process of its own, in order of worth, so one that fails or hangs ends none of the others. DIR gets every
measurement at once (measurements.jsonl), the tables (gpu.md) and each section's log. Exit code 1 where a section failed.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from experiments.gpu import results

OUTPUT = flags.DEFINE_string("output", None, "Folder for the results.")
SECONDS = flags.DEFINE_float("seconds", 480, "Time for everything; what has not begun or ended by then is recorded as such.", lower_bound=0)
REHEARSE = flags.DEFINE_bool("rehearse", False, "Toy sizes on the CPU.")
# Name -> most of the time that it may take.
SECTIONS = {
    "device": 0.1, "correctness": 0.25, "training": 0.35, "grouped": 0.15, "attention": 0.2, "decoding": 0.5, "training_alternatives": 0.4
}  # fmt: skip
ONLY = flags.DEFINE_list("sections", list(SECTIONS), "Sections to run.")
SECTION = flags.DEFINE_enum("section", None, [*SECTIONS, "reference"], "Run this section in this process; used by the command itself.")
LEAST = 0.02  # of the time: with less left, a section does not begin


def run_section(name: str):
    """In a process of its own: the section, then it is done."""
    from experiments.gpu import correctness, kernels, speed
    from experiments.gpu.measuring import Section

    functions = {
        "reference": correctness.reference, "device": kernels.device, "correctness": correctness.correctness,
        "attention": kernels.attention, "grouped": kernels.grouped, "training": speed.training, "decoding": speed.decoding,
        "training_alternatives": speed.training_alternatives,
    }  # fmt: skip
    functions[name](Section(name, pathlib.Path(OUTPUT.value), REHEARSE.value))


def start(name: str, output: pathlib.Path) -> subprocess.Popen:
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "JAX_COMPILATION_CACHE_DIR": cache_folder()}
    if REHEARSE.value or name == "reference":
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"  # compiles quicker
    command = [sys.executable, "-m", "experiments.measure_gpu", f"--output={output}", f"--section={name}", f"--rehearse={REHEARSE.value}"]
    with (output / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def cache_folder() -> str:
    """Compiled programs, for a second run on the same machine."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "glm_jax_measure_gpu"))


def finish(process: subprocess.Popen, name: str, output: pathlib.Path, timeout: float) -> str:
    """Waits, at most so long. Returns `done`, or what went wrong."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"ended after {timeout:.0f} s: out of time"
    if code == 0:
        return "done"
    lines = [line.strip() for line in (output / f"{name}.log").read_text("utf-8", errors="replace").splitlines()]
    errors = [line for line in lines if "Error" in line.split(":")[0]] or [line for line in lines if line] or ["no output"]
    return f"failed with code {code}: {errors[-1][:300]}"


def main(argv: list[str]):
    del argv
    if SECTION.value:
        run_section(SECTION.value)
        return
    output, begun = pathlib.Path(OUTPUT.value), time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    for old in ("measurements.jsonl", "reference.npz"):
        (output / old).unlink(missing_ok=True)
    chosen = [name for name in SECTIONS if name in ONLY.value]
    reference = start("reference", output) if "correctness" in chosen else None
    statuses = []
    for name in chosen:
        left = SECONDS.value - (time.monotonic() - begun)
        if left < LEAST * SECONDS.value:
            status = "not run: out of time"
        else:
            limit = min(left, SECTIONS[name] * SECONDS.value)
            found = finish(reference, "reference", output, limit) if name == "correctness" else "done"
            limit = min(limit, SECONDS.value - (time.monotonic() - begun))
            status = finish(start(name, output), name, output, limit) if found == "done" else f"failed: the CPU's numbers: {found}"
        statuses.append(status)
        seconds = round(time.monotonic() - begun, 1)
        with (output / "measurements.jsonl").open("a") as file:
            file.write(json.dumps({"section": name, "status": status, "ended": f"{seconds} s after the start"}) + "\n")
        command = "python -m experiments.measure_gpu --output=DIR" + " --rehearse" * REHEARSE.value
        results.write(output, command, chosen)
        print(f"{seconds:6.1f} s  {name}: {status}", flush=True)
    if reference is not None:
        reference.kill()
    if any(status.startswith("failed") for status in statuses):
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["output"])
    app.run(main)
