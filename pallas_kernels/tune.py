"""Searches block sizes with the real TPU compiler and writes each kernel's tuning.json. Needs
libtpu, no TPU.

    python -m pallas_kernels.tune --topology=v5p:2x2x1 [--kernel=attention]

A candidate's score is the time of the call at the wall that it meets: cycles of the MXU by
its schedule, or HBM bytes by the chip's bandwidth. What does not compile is left out; of candidates
within half a percent the one with the fewest spills wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pathlib
import tempfile

import jax

from pallas_kernels import compiler, tuning
from pallas_kernels.report import KERNELS

CLOSE = 1.005


def cycles(probe: compiler.Probe, verdict: compiler.Verdict, chip: compiler.Chip) -> float:
    """Estimated time of a call."""
    return max(probe.cycles(min(verdict.useful_rate.values()), chip))


def best(module, shape, pass_: str, topology: str, folder: pathlib.Path):
    """The best blocks of a shape and pass, and their cycles. Raises ValueError where no candidate
    compiles.
    """
    chip, found = compiler.chip(topology), []
    for blocks in module.candidates(shape, pass_, chip):
        probe = module.probe(shape, blocks, pass_)
        try:
            verdict = compiler.judge(probe, topology, folder)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "vmem" not in str(error):
                raise
            continue
        spills = sum(s.fills + s.spills for s in verdict.schedules.values())
        found.append((cycles(probe, verdict, chip), spills, blocks))
    if not found:
        raise ValueError(f"no candidate of {shape}, {pass_}, compiles for {topology}")
    fastest = min(found, key=lambda f: f[0])[0]
    return min((f for f in found if f[0] <= CLOSE * fastest), key=lambda f: f[1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topology", required=True, help="kind and shape, as in v5p:2x2x1, v6e:2x2, tpu7x:2x2x1"
    )
    parser.add_argument("--kernel", choices=KERNELS, help="this kernel only")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        compiler.dump_schedules(folder)
        try:
            kind = compiler.chip(args.topology).kind
        except ValueError as error:
            parser.error(str(error))
        for kernel in [args.kernel] if args.kernel else KERNELS:
            module = importlib.import_module(KERNELS[kernel])
            if not module.PASSES:
                continue  # has no blocks to choose
            table = tuning.table(module.FOLDER)
            for shape_name, shape in module.SHAPES.items():
                for pass_ in module.PASSES:
                    time, _, blocks = best(module, shape, pass_, args.topology, folder)
                    table.setdefault(kind, {})[f"{pass_} {shape.key}"] = dataclasses.asdict(blocks)
                    print(
                        f"{kernel}, {shape_name}, {pass_}: {blocks}, {time:,.0f} cycles", flush=True
                    )
            text = json.dumps(table, indent=1, sort_keys=True) + "\n"
            (module.FOLDER / "tuning.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
