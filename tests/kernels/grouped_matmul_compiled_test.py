"""The TPU kernels before the real compiler at GLM's shapes, and what their costs are counted
from.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from pallas_kernels import compiler
from pallas_kernels.grouped_matmul import costs, probes, rows, shapes, sweep, weight_gradient
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.tiles import row_tiles
from pallas_kernels.moe_dispatch import kernel as dispatch_kernel
from pallas_kernels.moe_dispatch.api import routed_ffn
from pallas_kernels.moe_dispatch.shapes import LAYERS

V5P, V6E, TPU7X = "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"


@pytest.mark.parametrize(
    ("topology", "name", "pass_", "least"),
    [
        (V5P, "355B gate_up", "forward", 0.99),
        (V5P, "Air down", "input gradient", 0.99),
        (V5P, "Air gate_up", "weight gradient", 0.99),
        (V6E, "355B down", "forward", 0.99),
        (V6E, "Air down", "forward", 0.91),  # 1408 = 5.5 x 256: at most 0.917
        (V6E, "355B down", "input gradient", 0.99),
        (V6E, "355B down", "weight gradient", 0.99),
        (TPU7X, "Air gate_up", "forward", 0.99),
        (TPU7X, "Air down", "input gradient", 0.91),
        (TPU7X, "355B down", "weight gradient", 0.99),
    ],
)
def test_a_full_step_keeps_the_matrix_unit_busy(schedules, topology, name, pass_, least):
    shape = shapes.SHAPES[name]
    with jax.set_mesh(compiler.one_device(topology)):
        blocks = shapes.chosen_blocks(shape, pass_)
    probe = probes.probe(shape, blocks, pass_)
    rate = next(iter(compiler.judge(probe, topology, schedules).useful_rate.values()))
    assert least <= rate <= 1.0
    unit, hbm = probe.cycles(rate, compiler.chip(topology))
    assert hbm < 1.01 * unit, "bound by HBM"  # v6e reaches both walls at once


@pytest.mark.parametrize("topology", [V5P, V6E, TPU7X])
def test_the_differentiable_product_compiles_at_a_width_that_no_one_tuned(topology):
    def gradients(x, w, sizes):
        return jax.grad(
            lambda x, w: jnp.sum(
                grouped_matmul(x, w, sizes, implementation="auto", alignment=128) ** 2
            ),
            (0, 1),
        )(x, w)

    array = jax.ShapeDtypeStruct
    args = (
        array((2048, 640), jnp.bfloat16),
        array((4, 640, 896), jnp.bfloat16),
        array((4,), jnp.int32),
    )
    text = compiler.compile_kernel(gradients, args, topology).as_text()
    assert all(
        probes.NAMES[kernel] in text for kernel in ("matmul", "transposed", "weight_gradient")
    )


def test_a_layer_moves_no_buffer_of_rows_outside_of_its_kernels(monkeypatch):
    # which say nothing here of what they move themselves
    for module in (sweep, weight_gradient, rows, dispatch_kernel):
        monkeypatch.setattr(
            module,
            "cost",
            lambda *_, **__: pl.CostEstimate(flops=0, bytes_accessed=0, transcendentals=0),
        )
    jax.clear_caches()

    def layer(dy, expert, *args):
        x, weights, *matrices = args
        y, pull = jax.vjp(
            lambda x, weights, *m: routed_ffn(x, expert, weights, *m, implementation="pallas"),
            x,
            weights,
            *matrices,
        )
        return y, pull(dy)

    (width, ffn), experts, per_token = LAYERS["Air"], costs.EXPERTS, costs.PER_TOKEN
    tokens = experts * probes.ROWS // per_token
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    token = (tokens, width)
    chosen = array(tokens, per_token, dtype=jnp.int32)
    weights = array(tokens, per_token, dtype=jnp.float32)
    matrices = array(experts, width, ffn), array(experts, width, ffn), array(experts, ffn, width)
    compiled = compiler.compile_kernel(
        layer, (array(*token), chosen, array(*token), weights, *matrices), V5P
    )
    # One buffer, written and read once, would be this much more than what the compiler counts:
    # tokens that it loads into VMEM before a kernel does, and indices.
    assert compiled.cost_analysis()["bytes accessed"] < 2 * 2 * tokens * per_token * width
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("kernel", shapes.KERNELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_rule_has_blocks_for_any_width_that_divide_it(kernel, dtype):
    for kind, capacity in ((None, 2**26), ("v5p", 2**26), ("v6e", 2**27), ("tpu7x", 2**26)):
        for depth, width in (
            (128, 128),
            (5120, 3072),
            (1408, 4096),
            (128 * 13, 128 * 17),
            (8192, 8192),
        ):
            first, *_ = shapes.fitting(kernel, depth, width, dtype, kind, capacity)
            assert width % (first.columns * 128) == 0
            if kernel in shapes.GRADIENTS:
                assert depth % (first.rows * 128) == 0


def test_a_width_that_fits_nowhere_is_named():
    with pytest.raises(ValueError, match=r"K=1280000 .*='ragged_dot'"):
        shapes.blocks_for("matmul", 1_280_000, 128, "float32")


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize("rows", [1024, 300, 3])
@pytest.mark.parametrize("tile", [128, 256, 512])
def test_rows_are_counted_as_the_kernels_count_them(kind, rows, tile):
    sizes = costs.routing(kind, 16, rows)
    sizes[3] = 0
    total = -(-int(sizes.sum()) // tile) * tile
    metadata = dict(
        m=total, tm=tile, start_group=jnp.int32(0), num_nonzero_groups=16, visit_empty_groups=False
    )
    _, tiles = make_group_metadata(group_sizes=jnp.asarray(sizes, jnp.int32), **metadata)
    assert costs.rows_of_megablox(sizes, tile) == int(tiles) * tile
    buffer = shapes.TILE * (total // shapes.TILE + 16)
    assert (
        costs.rows_computed(sizes)
        == int(row_tiles(jnp.asarray(sizes), buffer, shapes.TILE).used[0]) * shapes.TILE
    )


def test_row_efficiency():
    table = {
        (row["rows an expert"], row["routing"], row["of"]): row["ours"]
        for row in costs.work_table()
    }
    for kind in ("uniform", "zipf"):
        assert table[1024, kind, "products"] >= 0.93
        assert table[300, kind, "products"] >= 0.80


def test_bytes_of_a_product_are_those_of_its_operands_where_no_block_comes_twice():
    shape = shapes.SHAPES["355B down"]
    for pass_ in ("forward", "weight gradient"):
        blocks = shapes.fitting(*shape.product(pass_), shape.dtype, "v6e", 2**27)[0]
        probe = probes.probe(shape, blocks, pass_)
        sizes, item = costs.routing("uniform", costs.EXPERTS, probes.ROWS), 2
        operands = costs.rows_computed(sizes) * (1536 + 5120) + costs.EXPERTS * 1536 * 5120
        assert probe.hbm_bytes == item * operands and probe.hbm_bytes_needed < probe.hbm_bytes
        assert np.isclose(probe.hbm_bytes_needed, probe.hbm_bytes, rtol=0.05)
