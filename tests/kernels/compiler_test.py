"""What is read of the TPU compiler's schedules, and kernels judged by it."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import compiler

DUMP = """== CAPACTIY:
MATMUL, VALU, VLOAD:FILL, VSTORE:SPILL
  2  4  3  1
== UTILIZATION:
0 4 0 0
1 2 1 0
0 3 0 1
2 0 2 0
0 1 0 0
"""


def test_the_hot_region_ends_with_its_products_and_counts_idle_cycles_between():
    schedule = compiler.read_schedule(DUMP)
    assert schedule.cycles == 3 and schedule.capacity["VALU"] == 4
    assert schedule.slots == {"MATMUL": 3, "VALU": 5, "VLOAD:FILL": 3, "VSTORE:SPILL": 1}
    assert (schedule.fills, schedule.spills) == (3, 1)
    chip = compiler.Chip(
        "v5p", macs_per_cycle=100, hbm_bytes_per_cycle=1.0, vmem_bytes=1, unit_size=128
    )
    assert schedule.useful_rate(150, chip) == 0.5


def test_the_columns_are_read_by_their_names():
    """libtpu 0.0.50.1 writes MXU; the same kernels have the same first and last cycle and the same
    slots there as MATMUL in 0.0.52.
    """
    assert compiler.read_schedule(DUMP.replace("MATMUL", "MXU")).cycles == 3
    with pytest.raises(
        ValueError,
        match=(
            "columns UNIT, VALU, VLOAD:FILL, VSTORE:SPILL, but neither MATMUL nor MXU: use libtpu"
        ),
    ):
        compiler.read_schedule(DUMP.replace("MATMUL", "UNIT"))


def test_what_multiplies_nothing_has_no_hot_region():
    assert (
        compiler.read_schedule(DUMP.replace("1 2 1 0", "0 2 1 0").replace("2 0 2 0", "0 0 2 0"))
        is None
    )


@pytest.mark.parametrize(
    ("topology", "macs", "unit"),
    [("v5p:2x2x1", 65_536, 128), ("v6e:2x2", 262_144, 256), ("tpu7x:2x2x1", 262_144, 256)],
)
def test_peaks_of_the_chips(topology, macs, unit):
    chip = compiler.chip(topology)
    assert (chip.kind, chip.macs_per_cycle, chip.unit_size) == (topology.split(":")[0], macs, unit)
    assert chip.hbm_bytes_per_cycle > 500 and chip.vmem_bytes >= 2**26


def test_a_plain_product_is_judged_at_nearly_the_peak(schedules):
    rows, inner, columns = 512, 1024, 512

    def product(x_ref, w_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)

    call = pl.pallas_call(
        product, out_shape=jax.ShapeDtypeStruct((rows, columns), jnp.float32), name="plain"
    )
    args = (
        jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16),
        jax.ShapeDtypeStruct((inner, columns), jnp.bfloat16),
    )
    moved = 2 * inner * (rows + columns) + 4 * rows * columns
    probe = compiler.Probe(
        call,
        args,
        {"plain": rows * inner * columns},
        hbm_bytes=moved,
        hbm_bytes_needed=moved,
        total_macs=rows * inner * columns,
    )
    verdict = compiler.judge(probe, "v5p:2x2x1", schedules)
    assert 0.9 < verdict.useful_rate["plain"] <= 1.0
    assert verdict.vmem_bytes["plain"] >= moved


@pytest.mark.parametrize("topology", ["v5p", "h100:8", "v5e:3x5", ""])
def test_an_unknown_topology_is_named(topology):
    with pytest.raises(ValueError, match=f"topology='{topology}'"):
        compiler.tpu_devices(topology)
