"""The grouped product of decoding, simulated, against float64; and through the real TPU
compiler.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.infer.quantize import quantize
from glm_jax.model.layers import InStack
from pallas_kernels import compiler, interpret
from pallas_kernels.grouped_matmul import few_rows_shapes
from pallas_kernels.grouped_matmul.few_rows import (
    Blocks,
    few_rows_matmul,
    few_rows_swiglu,
    operands,
    steps_of,
)

STRICT = {"detect_races": True, "uninitialized_memory": "nan"}
LIMIT = {"float32": 1e-5, "bfloat16": 1e-2}
CAST, WIDE, BITS, WIDE_BITS = (
    Blocks(128, depth, bits) for bits in (False, True) for depth in (128, 256)
)


def races_found() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def starts_of(sizes, alignment):
    padded = -(-np.asarray(sizes) // alignment) * alignment
    return np.cumsum(padded) - padded, int(padded.sum())


def inputs(sizes, depth, width, dtype, alignment, *, spare=0, seed=0):
    """x, NaN where no group's tile is; two stacks of matrices, in float32."""
    rng = np.random.default_rng(seed)
    starts, rows = starts_of(sizes, alignment)
    x = np.full((rows + spare, depth), np.nan, np.float32)
    x[:rows] = rng.normal(size=(rows, depth))
    gate, up = (
        rng.normal(size=(len(sizes), depth, width)).astype(np.float32)
        * 10.0 ** rng.integers(-3, 1, (len(sizes), 1, 1))
        for _ in "ab"
    )
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(gate, jnp.float32),
        jnp.asarray(up, jnp.float32),
        starts,
    )


def check(found, sizes, starts, expected_rows, limit):
    assert not races_found()
    found = np.asarray(found.astype(jnp.float32), np.float64)
    for group, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size:
            expected = expected_rows(group, start, size)
            error = np.linalg.norm(found[start : start + size] - expected) / np.linalg.norm(
                expected
            )
            assert error < limit, (group, error)
    assert not found[starts_of(sizes, starts.alignment)[1] :].any()


class Starts(np.ndarray):
    alignment: int


def aligned(starts, alignment):
    out = np.asarray(starts).view(Starts)
    out.alignment = alignment
    return out


def product(
    sizes, dtype, *, fp8=False, blocks=CAST, alignment=16, depth=384, width=256, seed=0, limit=None
):
    x, w, _, starts = inputs(sizes, depth, width, dtype, alignment, spare=alignment, seed=seed)
    matrices, scale = (quantize(w, "fp8"), None) if fp8 else (w.astype(dtype), None)
    values = matrices
    if fp8:
        values, scale, matrices = matrices.values, matrices.scale, matrices.astype(jnp.float32)
    with interpret.on(**STRICT):
        y = few_rows_matmul(
            x,
            values,
            steps_of(jnp.asarray(sizes, jnp.int32), alignment),
            scale=scale,
            alignment=alignment,
            blocks=blocks,
        )
    x64, w64 = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, matrices))
    check(
        y,
        sizes,
        aligned(starts, alignment),
        lambda g, start, size: x64[start : start + size] @ w64[g],
        limit or LIMIT[dtype],
    )


@pytest.mark.parametrize(
    "sizes", [[3, 0, 20, 0, 1], [0, 0, 40], [1], [0, 0], [16, 16, 0, 0, 0, 0, 16]]
)
@pytest.mark.parametrize("fp8", [False, True])
def test_product_of_bfloat16_rows(sizes, fp8):
    product(sizes, "bfloat16", fp8=fp8)


@pytest.mark.parametrize("blocks", [CAST, WIDE, BITS, WIDE_BITS])
def test_fp8_matrices_by_cast_and_by_bits(blocks):
    product([3, 0, 20], "bfloat16", fp8=True, blocks=blocks, depth=384)


@pytest.mark.parametrize("blocks", [CAST, WIDE_BITS])
def test_sums_are_float32(blocks):
    """What is left of the error is the result's own rounding, 2^-9 at most."""
    product([16], "bfloat16", fp8=True, blocks=blocks, depth=1024, limit=2**-9)


def test_fp8_by_bits_is_exact_for_all_normal_values():
    """Every finite float8 number in a product with the identity; subnormal ones may count as
    zero.
    """
    every = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.float8_e4m3fn)
    every = jnp.where(jnp.isnan(every.astype(jnp.float32)), 0, every.astype(jnp.float32)).astype(
        jnp.float8_e4m3fn
    )
    w = jnp.stack([jnp.roll(every, 5 * n) for n in range(128)], axis=1)[None]  # [1, 256, 128]
    x = jnp.asarray(np.eye(256), jnp.bfloat16)
    scale = jnp.asarray([[[0.5], [4.0]]], jnp.float32)
    with interpret.on(**STRICT):
        y = few_rows_matmul(
            x,
            w,
            steps_of(jnp.asarray([256], jnp.int32), 16),
            scale=scale,
            alignment=16,
            blocks=BITS,
        )
    expected = np.asarray(w[0].astype(jnp.float32)) * np.repeat([0.5, 4.0], 128)[:, None]
    normal = np.abs(np.asarray(w[0].astype(jnp.float32))) >= 2**-6
    np.testing.assert_array_equal(np.asarray(y.astype(jnp.float32))[normal], expected[normal])
    np.testing.assert_allclose(np.asarray(y.astype(jnp.float32)), expected, atol=4 * 2**-6)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.just(0), st.integers(1, 30)), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_product_of_random_sizes_in_float32(sizes, fp8, seed):
    product(sizes, "float32", fp8=fp8, alignment=8, depth=256, width=128, seed=seed)


@pytest.mark.parametrize(
    ("dtype", "fp8", "blocks"),
    [("float32", False, CAST), ("float32", True, WIDE), ("bfloat16", True, WIDE_BITS)],
)
def test_swiglu(dtype, fp8, blocks):
    sizes, alignment = [2, 0, 17, 5], 16
    x, gate, up, starts = inputs(sizes, 256, 256, dtype, alignment, spare=16)
    pair = [quantize(w, "fp8") if fp8 else w.astype(dtype) for w in (gate, up)]
    scales = [w.scale for w in pair] if fp8 else [None, None]
    values = [w.values for w in pair] if fp8 else pair
    with interpret.on(**STRICT):
        h = few_rows_swiglu(
            x, *values, steps_of(jnp.asarray(sizes, jnp.int32), alignment), gate_scale=scales[0],
            up_scale=scales[1],
            alignment=alignment, blocks=blocks,
        )  # fmt: skip
    x64 = np.asarray(x.astype(jnp.float32), np.float64)
    gate64, up64 = (np.asarray(w.astype(jnp.float32), np.float64) for w in pair)

    def expected(group, start, size):
        rows = x64[start : start + size]
        a = rows @ gate64[group]
        return a / (1 + np.exp(-a)) * (rows @ up64[group])

    check(h, sizes, aligned(starts, alignment), expected, LIMIT[dtype])


@pytest.mark.parametrize("format", ["compute", "fp8", "int8"])
@pytest.mark.parametrize(("dtype", "blocks"), [("float32", CAST), ("bfloat16", WIDE_BITS)])
def test_a_layers_matrix_is_read_where_it_lies(format, dtype, blocks, monkeypatch):
    """Five rows, the fourth of five layers; every other layer is NaN. Experts: the second and third
    of three, of the fourth layer.
    """
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(5, 3, 256, 384)), dtype)
    x = jnp.asarray(rng.normal(size=(5, 256)), dtype)
    stack = w if format == "compute" else quantize(w, format)
    others = jnp.arange(5) != 3
    if format == "compute":
        hidden = jnp.where(others[:, None, None, None], jnp.nan, stack)
    else:
        hidden = dataclasses.replace(
            stack, scale=jnp.where(others[:, None, None, None], jnp.nan, stack.scale)
        )
    exact = np.asarray(stack.astype(jnp.float32)[3], np.float64)
    monkeypatch.setattr(few_rows_shapes, "blocks_for", lambda *args: blocks)
    one = jax.tree.map(lambda a: a[:, 1], hidden)
    with interpret.on(**STRICT):
        y = few_rows_shapes.dense(x, InStack(one, jnp.int32(3)))
        values, scale, first = operands(InStack(hidden, jnp.int32(3)), x.dtype)
        rows = jnp.concatenate(
            [jnp.pad(x[part], ((0, 16 - len(x[part])), (0, 0))) for part in (slice(2), slice(2, 5))]
        )
        sizes = jnp.asarray([0, 2, 3], jnp.int32)
        grouped = few_rows_matmul(
            rows, values, steps_of(sizes, 16), scale=scale, first=first, alignment=16, blocks=blocks
        )
    x64 = np.asarray(x.astype(jnp.float32), np.float64)
    check(y, [5], aligned([0], 8), lambda *_: x64 @ exact[1], LIMIT[dtype])
    given = {1: x64[:2], 2: x64[2:]}
    check(
        grouped,
        [0, 2, 3],
        aligned([0, 0, 16], 16),
        lambda group, *_: given[group] @ exact[group],
        LIMIT[dtype],
    )


def test_logits_are_float32_sums_of_bfloat16_rows():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), "bfloat16") for shape in ((3, 384), (384, 256)))
    with interpret.on(**STRICT):
        found = few_rows_shapes.dense(x, w, jnp.float32)
    exact = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(
        w.astype(jnp.float32), np.float64
    )
    assert found.dtype == jnp.float32 and np.abs(found - exact).max() < 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("name", sorted(few_rows_shapes.SHAPES))
def test_bytes_moved_are_at_most_a_tenth_over_those_needed(name):
    shape = few_rows_shapes.SHAPES[name]
    probe = few_rows_shapes.probe(shape, few_rows_shapes.chosen_blocks(shape, "forward"), "forward")
    assert probe.hbm_bytes <= 1.1 * probe.hbm_bytes_needed


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    "name",
    [
        "355B gate_up, 512 rows fp8",
        "355B down, 64 rows fp8",
        "Air gate_up, 512 rows fp8",
        "355B gate_up, 64 rows",
    ],
)
def test_hbm_binds_it_on_every_chip(name, topology, schedules):
    """*Compiled*: cycles of a step against the time that HBM takes for its matrices."""
    shape = few_rows_shapes.SHAPES[name]
    with jax.set_mesh(compiler.one_device(topology)):
        blocks = few_rows_shapes.chosen_blocks(shape, "forward")
    cycles, hbm_cycles = few_rows_shapes.step_cycles(shape, blocks, topology, schedules)
    assert cycles < hbm_cycles


def test_what_it_does_not_take_is_named():
    x, w, _, _ = inputs([3, 20], 256, 256, "bfloat16", 16)
    steps, w = steps_of(jnp.asarray([3, 20], jnp.int32), 16), w.astype(jnp.bfloat16)
    fp8 = quantize(w, "fp8")
    run = lambda x, w, alignment=16, blocks=CAST, **more: few_rows_matmul(
        x, w, steps, alignment=alignment, blocks=blocks, **more
    )
    for message, call in (
        ("no TPU, and pallas_kernels.interpret is not on; grouped_matmul='batched' takes it",
         lambda: run(x, w)),
        ("rows of type float16: takes bfloat16 and float32", lambda: run(x.astype(jnp.float16), w)),
        ("matrices of 200 x 256: takes multiples of 128; grouped_matmul='ragged_dot' takes others",
         lambda: run(x[:, :200], w[:, :200])),
        ("matrices of type int8: takes bfloat16 like the rows, or float8_e4m3fn or int8 with a "
         "scale", lambda: run(x, w.astype(jnp.int8))),
        ("matrices of type float8_e4m3fn: takes bfloat16", lambda: run(x, fp8.values)),
        (r"scale float32\(2, 1, 2\) of float8_e4m3fn: takes float32\(2, 2, 2\)",
         lambda: run(x, fp8.values, scale=fp8.scale[:, :1])),
        ("alignment=8 of 48 rows: takes multiples of 16 that divide the rows",
         lambda: run(x, w, alignment=8)),
        ("columns=192: takes multiples of 128 that divide 256",
         lambda: run(x, w, blocks=Blocks(192, 128, False))),
        ("depth=64: takes 128 or 256", lambda: run(x, w, blocks=Blocks(128, 64, False))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
