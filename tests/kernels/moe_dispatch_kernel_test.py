"""The TPU kernels of the dispatch: simulated with races detected and unwritten memory NaN against
float64, and taken by the TPU compiler at GLM's shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from glm_jax.infer.quantize import quantize
from pallas_kernels import compiler, interpret
from pallas_kernels.grouped_matmul import rows
from pallas_kernels.moe_dispatch import api, kernel, routed, shapes
from tests.kernels.routed_oracle import draw, errors, oracle

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
TOPOLOGIES = ("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
simulated = functools.partial(interpret.on, detect_races=True, uninitialized_memory="nan")


@pytest.mark.parametrize(
    ("dtype", "width"), [(jnp.bfloat16, 512), (jnp.bfloat16, 384), (jnp.float32, 128)]
)
def test_packed_rows_are_whole_rows_and_come_back(dtype, width):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(150, width)), dtype)
    words = rows.to_rows(x)
    assert (
        words.shape == rows.row_shape(150, width, dtype).shape
        and words.dtype == rows.row_shape(150, width, dtype).dtype
    )
    np.testing.assert_array_equal(rows.from_rows(words, dtype), x)
    with simulated():
        np.testing.assert_array_equal(jax.jit(rows.pack)(x), words)
        ahead = jax.jit(functools.partial(rows.pack, zeros=150))(x)
    np.testing.assert_array_equal(ahead[:150], words)
    assert ahead.shape[0] == 300 and not np.any(ahead[150:])


@pytest.mark.parametrize("count", [1, 64, 300])
def test_copied_rows_stand_where_they_are_sent_from(count):
    """300: two cores of three steps each, the last one empty."""
    rng = np.random.default_rng(count)
    words = rows.to_rows(jnp.asarray(rng.normal(size=(60, 256)), jnp.bfloat16))
    source = rng.integers(-1, 60, count).astype(np.int32)
    with simulated():
        ours = jax.jit(kernel.copy_rows)(words, source)
    assert ours.shape == (count, 1, 128)
    np.testing.assert_array_equal(ours[source >= 0], words[source[source >= 0]])


@functools.cache
def combined(dtype, width, weighted):
    def run(words, slot, weights):
        blocks = shapes.Blocks(tokens=8, vmem_bytes=2**24)
        return kernel.combine(
            words, slot, weights if weighted else None, width=width, dtype=dtype, blocks=blocks
        )

    return jax.jit(run)


# a simulated run takes too long to look for a smaller one
@settings(max_examples=5, deadline=None, phases=(Phase.generate,))
@given(seed=st.integers(0, 2**16), missing=st.sampled_from((0.0, 0.3, 1.0)))
@pytest.mark.parametrize(
    ("dtype", "width", "weighted"),
    [(jnp.bfloat16, 512, True), (jnp.bfloat16, 256, False), (jnp.float32, 128, True)],
)
def test_combine_equals_float64_and_never_adds_what_no_pair_owns(
    dtype, width, weighted, seed, missing
):
    """37 tokens: two cores of three blocks each, the last ones partly and wholly empty."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(60, width)), dtype)
    slot = np.where(rng.random((37, 3)) < missing, -1, rng.integers(0, 60, (37, 3))).astype(
        np.int32
    )
    weights = rng.random((37, 3)).astype(np.float32)
    unowned = np.setdiff1d(np.arange(60), slot)
    with simulated():
        ours = combined(dtype, width, weighted)(
            rows.to_rows(x.at[unowned].set(jnp.nan)), slot, weights
        )
    values = np.where(slot[..., None] >= 0, np.asarray(x, np.float64)[slot], 0)
    expected = np.einsum(
        "tk,tkd->td", weights.astype(np.float64) if weighted else np.ones(slot.shape), values
    )
    assert np.linalg.norm(np.asarray(ours, np.float64) - expected) <= TOLERANCE[
        dtype
    ] * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("dtype", "weighted"), [(jnp.float32, True), (jnp.bfloat16, True), (jnp.float32, False)]
)
def test_routed_feed_forward_and_its_gradients_equal_float64(dtype, weighted):
    """Three experts: one takes 140 rows of 150, more than a tile; one has none; some pairs choose
    none of them.
    """
    rng = np.random.default_rng(0)
    experts = np.where(rng.random((75, 2)) < 0.94, 2, rng.choice([-1, 0, 3], (75, 2)))
    width = 256 if dtype == jnp.bfloat16 else 128
    case = draw(
        rng,
        tokens=75,
        per_token=2,
        experts=3,
        width=width,
        ffn=128,
        dtype=dtype,
        weighted=weighted,
        expert_TK=experts,
    )

    def run(arguments, dy):
        call = lambda *a: api.routed_ffn(a[0], case.expert_TK, *a[1:], implementation="pallas")
        y, pullback = jax.vjp(call, *arguments)
        return y, *pullback(dy)

    with simulated():
        ours = jax.jit(run)(case.arguments, case.dy_TD)
    assert [g.dtype for g in ours if g is not None] == [
        dtype,
        dtype,
        *[jnp.float32] * weighted,
        *[dtype] * 3,
    ]
    for name, error in errors(ours, oracle(case)).items():
        assert error <= TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize("format", ["compute", "fp8", "int8"])
def test_few_rows_without_a_gradient_take_quantised_matrices_as_they_are(format, monkeypatch):
    case = draw(
        np.random.default_rng(0),
        tokens=5,
        per_token=2,
        experts=4,
        width=256,
        ffn=128,
        dtype=jnp.bfloat16,
    )
    x, weights, *matrices = case.arguments
    stored = matrices if format == "compute" else [quantize(w, format) for w in matrices]
    seen = []
    kernels = routed.few_rows.few_rows_swiglu
    monkeypatch.setattr(
        routed.few_rows,
        "few_rows_swiglu",
        lambda *args, **kw: seen.append(args[1].dtype) or kernels(*args, **kw),
    )
    run = lambda x, stored: api.routed_ffn(
        x, case.expert_TK, weights, *stored, implementation="pallas"
    )
    with simulated():
        ours = jax.jit(run)(x, stored)
    assert seen == [{"compute": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}[format]]
    case.arguments = (x, weights, *(w.astype(jnp.bfloat16) for w in stored))
    assert errors([ours], oracle(case)[:1])["y"] <= 1e-2
    if format != "compute":
        with simulated(), pytest.raises(ValueError, match="have no gradient: dequantise them"):
            jax.eval_shape(jax.grad(lambda x: run(x, stored).sum().astype(jnp.float32)), x)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("width", "num_tokens"), [(5120, 4096), (4096, 16384)])
def test_the_tpu_compiler_takes_the_way_back_at_glms_shapes(topology, width, num_tokens):
    pairs = 8 * num_tokens
    y = jax.ShapeDtypeStruct((pairs + 160 * 127, width), jnp.bfloat16)
    slot, weights = (jax.ShapeDtypeStruct((num_tokens, 8), t) for t in (jnp.int32, jnp.float32))

    def way_back(y, slot, weights):
        blocks = shapes.blocks_for(8, width, jnp.bfloat16)
        return kernel.combine(
            rows.pack(y), slot, weights, width=width, dtype=jnp.bfloat16, blocks=blocks
        )

    compiled = compiler.compile_kernel(way_back, (y, slot, weights), topology)
    # Beside the packed rows nothing of their size: no [T, K, D].
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * y.size * 2
