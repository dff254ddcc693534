"""Runs sections one after another, each in a process of its own, within a time that ends them
all.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from experiments.gpu import results

# Name -> most of the time that it may take; in order of worth.
SECTIONS = {
    "device": 0.1, "correctness": 0.25, "training": 0.35, "grouped": 0.15, "attention": 0.2,
    "decoding": 0.5, "training_alternatives": 0.4
}  # fmt: skip
LEAST = 0.02  # of the time: with less left, a section does not begin


def run_here(name: str, output: pathlib.Path, rehearse: bool):
    """One section in this process; `reference` makes the CPU's numbers for `correctness`."""
    from experiments.gpu import correctness, kernels, speed
    from experiments.gpu.measuring import Section

    functions = {
        "reference": correctness.reference, "device": kernels.device,
        "correctness": correctness.correctness,
        "attention": kernels.attention, "grouped": kernels.grouped, "training": speed.training,
        "decoding": speed.decoding,
        "training_alternatives": speed.training_alternatives,
    }  # fmt: skip
    functions[name](Section(name, output, rehearse))


def start(name: str, output: pathlib.Path, rehearse: bool) -> subprocess.Popen:
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    # Compiled programs serve a second run on the same machine.
    environment.setdefault(
        "JAX_COMPILATION_CACHE_DIR",
        str(pathlib.Path(tempfile.gettempdir()) / "glm_jax_measure_gpu"),
    )
    if rehearse or name == "reference":
        environment["JAX_PLATFORMS"] = "cpu"
        # compiles quicker
        environment["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        )
    command = [
        sys.executable,
        "-m",
        "experiments.measure_gpu",
        f"--output={output}",
        f"--section={name}",
        f"--rehearse={rehearse}",
    ]
    return logged(command, output / f"{name}.log", environment)


def logged(command: list[str], log: pathlib.Path, environment=None) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen, log: pathlib.Path, timeout: float) -> str:
    """Waits, at most so long. Returns `done`, or what went wrong."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"out of time after {timeout:.0f} s"
    if code == 0:
        return "done"
    lines = [
        line.strip()
        for line in log.read_text("utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if "Error" in line.split(":")[0]] or lines or ["no output"]
    return f"failed with code {code}: {errors[-1][:300]}"


def run_all(
    names, output: pathlib.Path, total: float, rehearse: bool, begin=start
) -> dict[str, str]:
    """Section -> `done` or what went wrong; writes measurements.jsonl and gpu.md after each. begin:
    starts one, as `start` does.
    """
    begun, statuses, reference = time.monotonic(), {}, None
    output.mkdir(parents=True, exist_ok=True)
    for old in ("measurements.jsonl", "reference.npz"):
        (output / old).unlink(missing_ok=True)
    if "correctness" in names:
        reference = begin("reference", output, rehearse)  # on the CPU, while `device` runs
    for name in names:
        left = total - (time.monotonic() - begun)
        ends = time.monotonic() + min(left, total if rehearse else SECTIONS[name] * total)
        status = "done" if left > LEAST * total else "not run: out of time"
        if status == "done" and name == "correctness" and reference is not None:
            status = finish(reference, output / "reference.log", ends - time.monotonic())
        if status == "done":
            status = finish(
                begin(name, output, rehearse),
                output / f"{name}.log",
                max(ends - time.monotonic(), 0),
            )
        elif not status.startswith("not run"):
            status = f"no numbers from the CPU: {status}"
        statuses[name], seconds = status, round(time.monotonic() - begun, 1)
        with (output / "measurements.jsonl").open("a") as file:
            file.write(
                json.dumps(
                    {"section": name, "status": status, "ended": f"{seconds} s after the start"}
                )
                + "\n"
            )
        results.write(
            output,
            "python -m experiments.measure_gpu --output=DIR" + " --rehearse" * rehearse,
            names,
        )
        print(f"{seconds:6.1f} s  {name}: {status}", flush=True)
    if reference is not None:
        reference.kill()
    return statuses
