"""Our kernels beside the public ones at GLM's shapes, as the real TPU compiler sees them. Needs
libtpu, no TPU.

    python -m pallas_kernels.report \
        --topology=v5p:2x2x1 [--kernel=attention] [--shape=128K] [--json=FILE]

Every figure is compiled or counted, none measured. First table, a line a kernel, shape and pass:
`rate` is the useful multiply-adds of a full tile over what its cycles could do; `HBM MiB` what the
blocks of the call move, beside what it needs (every operand and result once); `wall` what binds the
call, the MXU or HBM; `share` the call's useful multiply-adds over what its time at that
wall could do; then registers filled from and spilled to VMEM in the hot region. Second table: work
visited over work needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pathlib
import sys
import tempfile

import jax

from pallas_kernels import compiler

KERNELS = {
    "attention": "pallas_kernels.attention.shapes",
    "grouped_matmul": "pallas_kernels.grouped_matmul.probes",
    "moe_dispatch": "pallas_kernels.moe_dispatch.shapes",
    "paged_attention": "pallas_kernels.paged_attention.shapes",
    "few_rows": "pallas_kernels.grouped_matmul.few_rows_shapes",
}


@dataclasses.dataclass(frozen=True)
class Line:
    kernel: str
    shape: str
    pass_: str
    implementation: str
    blocks: dict
    rate: float
    share: float
    wall: str
    hbm_bytes: int
    hbm_bytes_needed: int
    flops: int
    vmem_bytes: int
    fills: int
    spills: int
    message: str  # the kernel's or the compiler's, where one of them refuses

    def cells(self) -> tuple[str, ...]:
        names = self.kernel, self.shape, self.pass_, self.implementation
        if self.message:
            return *names, self.message[:60], *[""] * 8
        mib = self.hbm_bytes / 2**20, self.hbm_bytes_needed / 2**20
        rate = f"{self.rate:.3f}", f"{self.share:.3f}", self.wall
        return (
            *names, *rate, *(f"{m:,.1f}" for m in mib), f"{self.flops / 1e9:,.1f}",
            f"{self.vmem_bytes / 2**20:.1f}", str(self.fills),
            str(self.spills),
        )  # fmt: skip


HEADINGS = (
    "kernel", "shape", "pass", "implementation", "rate", "share", "wall", "HBM MiB", "needed",
    "GFLOP", "VMEM MiB", "fills", "spills"
)  # fmt: skip


def judge(
    where: tuple[str, str, str, str],
    blocks: dict,
    probe: compiler.Probe,
    topology: str,
    folder: pathlib.Path,
) -> Line:
    """One line; where the kernel or the compiler refuses, one that says so."""
    counted = probe.hbm_bytes, probe.hbm_bytes_needed, 2 * probe.total_macs
    try:
        verdict = compiler.judge(probe, topology, folder)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return Line(*where, blocks, 0.0, 0.0, "", *counted, 0, 0, 0, str(error).splitlines()[0])
    chip = compiler.chip(topology)
    rate = min(verdict.useful_rate.values())
    unit, hbm = probe.cycles(rate, chip)
    share = probe.total_macs / (max(unit, hbm) * chip.macs_per_cycle)
    schedules = verdict.schedules.values()
    return Line(
        *where, blocks, rate, share, "HBM" if hbm > unit else "unit", *counted,
        max(verdict.vmem_bytes.values()),
        sum(s.fills for s in schedules), sum(s.spills for s in schedules), "",
    )  # fmt: skip


def lines(topology: str, folder: pathlib.Path, kernels, shape_filter: str):
    """Of every kernel, shape and pass: ours with the blocks that it would take, then the public
    ones.
    """
    mesh = compiler.one_device(topology)
    for kernel in kernels:
        module = importlib.import_module(KERNELS[kernel])
        for name, shape in module.SHAPES.items():
            for pass_ in module.PASSES if shape_filter in name else ():
                with jax.set_mesh(mesh):
                    blocks = module.chosen_blocks(shape, pass_)
                yield judge(
                    (kernel, name, pass_, "ours"),
                    dataclasses.asdict(blocks),
                    module.probe(shape, blocks, pass_),
                    topology,
                    folder,
                )
                for public, probe in module.public_probes(shape, pass_).items():
                    yield judge((kernel, name, pass_, public), {}, probe, topology, folder)


def work_tables(topology: str, kernels) -> dict[str, list[dict]]:
    """Work visited over work needed, by kernel; blocks by rule are those of the topology."""
    with jax.set_mesh(compiler.one_device(topology)):
        return {kernel: importlib.import_module(KERNELS[kernel]).work_table() for kernel in kernels}


def table(headings, rows) -> str:
    widths = [max(len(str(row[n])) for row in [headings, *rows]) for n in range(len(headings))]
    return "\n".join(
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [headings, *rows]
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--topology", required=True, help="kind and shape, as in v5p:2x2x1, v6e:2x2, tpu7x:2x2x1"
    )
    parser.add_argument("--kernel", choices=KERNELS, help="this kernel only")
    parser.add_argument("--shape", default="", help="only shapes with this in their names")
    parser.add_argument("--json", type=pathlib.Path, help="file for the same figures")
    args = parser.parse_args()
    # the programs are for the topology, never for what this machine has
    jax.config.update("jax_platforms", "cpu")
    kernels = [args.kernel] if args.kernel else list(KERNELS)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        compiler.dump_schedules(folder)
        try:
            compiler.tpu_devices(args.topology)
        except ValueError as error:
            parser.error(str(error))
        judged = []
        for line in lines(args.topology, folder, kernels, args.shape):
            # the table comes when all are judged
            print("  ".join(cell for cell in line.cells() if cell), file=sys.stderr)
            judged.append(line)
    print(
        f"{args.topology}: compiled and"
        f" counted\n\n{table(HEADINGS, [line.cells() for line in judged])}"
    )
    work = work_tables(args.topology, kernels)
    for kernel, rows in work.items():
        if rows:
            cells = [
                [f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()]
                for row in rows
            ]
            print(f"\n{kernel}: work\n\n{table(list(rows[0]), cells)}")
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "topology": args.topology,
                    "lines": [dataclasses.asdict(x) for x in judged],
                    "work": work,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
