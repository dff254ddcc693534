"""The report and the tuner on one small product each, with the real compiler."""

import dataclasses
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compiler, report, tune, tuning

TOPOLOGY = "v5p:2x2x1"
ROWS, INNER, COLUMNS = 512, 1024, 1024


@dataclasses.dataclass(frozen=True)
class Blocks:
    rows: int


def probe(shape, blocks, pass_):
    """A plain product, a block of rows at a time; one of 65,536 rows does not fit VMEM."""
    del pass_
    rows = max(shape, blocks.rows)

    def body(x_ref, w_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32).astype(
            o_ref.dtype
        )

    call = pl.pallas_call(
        body, grid=(rows // blocks.rows,), name="plain",
        out_shape=jax.ShapeDtypeStruct((rows, COLUMNS), jnp.bfloat16),
        in_specs=[pl.BlockSpec((blocks.rows, INNER), lambda i: (i, 0)),
                  pl.BlockSpec((INNER, COLUMNS), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((blocks.rows, COLUMNS), lambda i: (i, 0)),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2**25),
    )  # fmt: skip
    args = (
        jax.ShapeDtypeStruct((rows, INNER), jnp.bfloat16),
        jax.ShapeDtypeStruct((INNER, COLUMNS), jnp.bfloat16),
    )
    moved = 2 * (rows * (INNER + COLUMNS) + INNER * COLUMNS)
    macs = INNER * COLUMNS
    return compiler.Probe(
        call, args, {"plain": blocks.rows * macs}, moved, moved, total_macs=rows * macs
    )


MODULE = types.SimpleNamespace(
    candidates=lambda *_: [Blocks(65_536), Blocks(8), Blocks(256)], probe=probe
)


def test_a_line_names_the_wall_and_what_the_call_reaches_at_it(schedules):
    line = report.judge(
        ("kernel", "shape", "forward", "ours"),
        {"rows": 256},
        probe(ROWS, Blocks(256), ""),
        TOPOLOGY,
        schedules,
    )
    assert line.wall == "unit" and 0.9 < line.share == line.rate <= 1.0
    assert line.flops == 2 * ROWS * INNER * COLUMNS and not line.message
    starved = dataclasses.replace(probe(ROWS, Blocks(256), ""), hbm_bytes=2**30)
    line = report.judge(("kernel", "shape", "forward", "ours"), {}, starved, TOPOLOGY, schedules)
    chip = compiler.chip(TOPOLOGY)
    assert line.wall == "HBM" and line.share == pytest.approx(
        ROWS * INNER * COLUMNS / (2**30 / chip.hbm_bytes_per_cycle * chip.macs_per_cycle)
    )


def test_what_the_compiler_refuses_is_a_line_that_says_so(schedules):
    line = report.judge(
        ("kernel", "shape", "forward", "ours"),
        {},
        probe(ROWS, Blocks(65_536), ""),
        TOPOLOGY,
        schedules,
    )
    assert "vmem" in line.message.lower() or "RESOURCE_EXHAUSTED" in line.message
    assert len(line.cells()) == len(report.HEADINGS)


def test_the_tuner_takes_the_faster_candidate_and_leaves_out_what_does_not_compile(schedules):
    assert tune.best(MODULE, ROWS, "forward", TOPOLOGY, schedules)[2] == Blocks(256)


def shapes_and_passes():
    """What report and tune go through, of each kernel the first shape: public kernels' probes of
    long rows take minutes.
    """
    for kernel, name in report.KERNELS.items():
        module = importlib.import_module(name)
        for shape in list(module.SHAPES.values())[:1]:  # none where nothing is multiplied
            for pass_ in module.PASSES:
                yield pytest.param(module, shape, pass_, id=f"{kernel} {pass_}")


@pytest.mark.parametrize(("module", "shape", "pass_"), [*shapes_and_passes()])
def test_what_the_report_judges_counts_its_work(module, shape, pass_):
    """Of the blocks that the kernel would take, and of the public kernels, without compiling
    them.
    """
    with jax.set_mesh(compiler.one_device(TOPOLOGY)):
        chosen = module.chosen_blocks(shape, pass_)
    probes = {"ours": module.probe(shape, chosen, pass_), **module.public_probes(shape, pass_)}
    for name, probe in probes.items():
        assert probe.hbm_bytes >= probe.hbm_bytes_needed > 0, name
        assert probe.total_macs > 0 and all(macs > 0 for macs in probe.macs.values()), name
        assert callable(probe.function), name


@pytest.mark.parametrize(("module", "shape", "pass_"), [*shapes_and_passes()])
def test_what_the_tuner_writes_is_what_a_kernel_takes(module, shape, pass_, monkeypatch):
    """On the kind of chip that it was tuned for; others go by rule."""
    with jax.set_mesh(compiler.one_device(TOPOLOGY)):
        by_rule = module.chosen_blocks(shape, pass_)
        candidates = module.candidates(shape, pass_, compiler.chip(TOPOLOGY))
        assert by_rule in candidates and len(candidates) > 1
        tuned = next(blocks for blocks in candidates if blocks != by_rule)
        entry = {f"{pass_} {shape.key}": dataclasses.asdict(tuned)}
        for kind, expected in ((compiler.chip(TOPOLOGY).kind, tuned), ("TPU v9", by_rule)):
            monkeypatch.setattr(tuning, "table", lambda folder, kind=kind: {kind: entry})
            assert module.chosen_blocks(shape, pass_) == expected


def test_blocks_come_from_a_table_where_the_tuner_has_written_one(tmp_path):
    written, none = tmp_path / "written", tmp_path / "none"
    written.mkdir()
    (written / "tuning.json").write_text('{"TPU v5": {"forward 8": {"q": 128}}}')
    assert tuning.lookup(written, "TPU v5", "forward 8") == {"q": 128}
    assert tuning.lookup(written, "TPU v6 lite", "forward 8") is None
    assert tuning.lookup(none, "TPU v5", "forward 8") is None


def test_work_is_counted_with_the_blocks_of_a_chip_that_is_not_here(monkeypatch):
    from pallas_kernels.attention import shapes

    monkeypatch.setattr(
        shapes, "document_rows", lambda length, kind: np.repeat([[1, 2]], 512, axis=1)
    )
    work = report.work_tables("v6e:2x2", report.KERNELS)
    assert list(work) == list(report.KERNELS)
    assert all(row["visited / with an allowed pair"] == 1.0 for row in work["attention"])
    assert all(row["share"] < 0.6 for row in work["moe_dispatch"] if row["rows an expert"] == 1024)
