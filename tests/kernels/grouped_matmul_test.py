import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels.grouped_matmul import batched, mosaic_gpu
from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul

ROWS, WIDTH, OUT, GROUPS = 320, 6, 10, 4


def oracle(x, w, sizes):
    """A loop over rows in float64."""
    y = np.zeros((len(x), w.shape[2]))
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            y[row] = x[row].astype(np.float64) @ w[group].astype(np.float64)
            row += 1
    return y


def oracle_gradients(x, w, sizes, dy):
    dx, dw = np.zeros_like(x, np.float64), np.zeros_like(w, np.float64)
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            dx[row] = w[group].astype(np.float64) @ dy[row]
            dw[group] += np.outer(x[row], dy[row])
            row += 1
    return dx, dw


@pytest.fixture(
    scope="module",
    params=[name for name in IMPLEMENTATIONS if name not in ("auto", "pallas", "mosaic_gpu")],
)
def value_and_gradients(request):
    def run(x, w, sizes, dy):
        y, pullback = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=request.param), x, w
        )
        return y, *pullback(dy)

    return jax.jit(run)


def sizes_strategy():
    """Empty groups, one group that takes all, rows past the last group, and anything between."""
    cuts = st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(sorted)
    return cuts.map(lambda c: np.diff([0, *c]).astype(np.int32)) | st.sampled_from(
        [np.eye(GROUPS, dtype=np.int32)[i] * ROWS for i in range(GROUPS)]
        + [np.zeros(GROUPS, np.int32)]
    )


@settings(max_examples=40, deadline=None)
@given(sizes=sizes_strategy(), seed=st.integers(0, 2**16))
def test_products_and_gradients_equal_a_loop_over_rows_for_any_group_sizes(
    value_and_gradients, sizes, seed
):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    w = rng.normal(size=(GROUPS, WIDTH, OUT)).astype(np.float32)
    dy = rng.normal(size=(ROWS, OUT)).astype(np.float32)
    y, dx, dw = value_and_gradients(x, w, jnp.asarray(sizes), dy)
    np.testing.assert_allclose(y, oracle(x, w, sizes), atol=1e-4)
    expected_dx, expected_dw = oracle_gradients(x, w, sizes, dy)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-4)
    np.testing.assert_allclose(dw, expected_dw, atol=1e-3)


@pytest.mark.parametrize(("num_rows", "num_groups"), [(2, 8), (9, 4), (40, 4)])
def test_few_rows_as_in_decoding(value_and_gradients, num_rows, num_groups):
    """Fetched matrices, slabs of a few rows, tiles no larger than a slab; some rows past the last
    group.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, WIDTH)).astype(np.float32)
    w = rng.normal(size=(num_groups, WIDTH, OUT)).astype(np.float32)
    dy = rng.normal(size=(num_rows, OUT)).astype(np.float32)
    for sizes in (
        np.eye(num_groups, dtype=np.int32)[1] * (num_rows - 1),
        np.bincount(rng.integers(0, num_groups, num_rows), minlength=num_groups),
    ):
        y, dx, dw = value_and_gradients(x, w, jnp.asarray(sizes, jnp.int32), dy)
        np.testing.assert_allclose(y, oracle(x, w, sizes), atol=1e-4)
        for ours, expected in zip((dx, dw), oracle_gradients(x, w, sizes, dy), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_group_larger_than_its_slab_goes_through_the_overflow_tiles():
    slab = batched._slab_rows(ROWS, GROUPS)
    assert slab < ROWS - batched.TILE, (
        "the sizes above must reach the overflow loop with more than one tile"
    )


@pytest.mark.parametrize("implementation", ["auto", "reference", "batched", "ragged_dot"])
def test_aligned_groups_equal_groups_without_gaps(implementation):
    """Whatever stands between the groups, in the rows and in the gradient, neither matters nor
    comes out.
    """
    rng, alignment, sizes = np.random.default_rng(0), 8, np.asarray([9, 0, 16, 3], np.int32)
    x = rng.normal(size=(56, WIDTH)).astype(np.float32)
    w = rng.normal(size=(GROUPS, WIDTH, OUT)).astype(np.float32)
    dy = rng.normal(size=(56, OUT)).astype(np.float32)
    starts = np.cumsum(-(-sizes // alignment) * alignment) - -(-sizes // alignment) * alignment
    rows = np.concatenate(
        [start + np.arange(size) for start, size in zip(starts, sizes, strict=True)]
    )
    between = np.setdiff1d(np.arange(56), rows)
    x[between] = dy[between] = np.nan
    product = lambda x, w: grouped_matmul(
        x, w, sizes, implementation=implementation, alignment=alignment
    )
    y, pullback = jax.vjp(product, x, w)
    dx, dw = pullback(dy)
    np.testing.assert_allclose(y[rows], oracle(x[rows], w, sizes), atol=1e-4)
    expected_dx, expected_dw = oracle_gradients(x[rows], w, sizes, dy[rows])
    np.testing.assert_allclose(dx[rows], expected_dx, atol=1e-4)
    np.testing.assert_allclose(dw, expected_dw, atol=1e-3)
    assert not np.any(y[between]) and not np.any(dx[between])


@pytest.mark.parametrize(
    ("message", "rows", "dtype", "widths", "alignment"),
    [
        ("alignment that is a multiple of 64, not 32; batched", 256, jnp.float32, (128, 128), 32),
        ("not F=200; batched", 256, jnp.float32, (128, 200), 128),
        ("not D=64; batched", 256, jnp.float32, (64, 128), 128),
        ("not float16 and float16; batched", 256, jnp.float16, (128, 128), 128),
        (
            "alignment=128 must be positive and divide the 200 rows",
            200,
            jnp.float32,
            (128, 128),
            128,
        ),
        ("runs on TPUs; on this backend batched", 256, jnp.bfloat16, (128, 128), 128),
    ],
)
def test_what_the_tpu_kernels_do_not_take_is_named_before_tracing(
    message, rows, dtype, widths, alignment
):
    x = jnp.ones((rows, widths[0]), dtype)
    w = jnp.ones((2, *widths), dtype)
    sizes = jnp.asarray([100, 20])
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w, sizes, implementation="pallas", alignment=alignment)


def test_unknown_implementation_and_wrong_shapes_are_named():
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.asarray([2, 2])
    with pytest.raises(ValueError, match="'megablox' is not one of auto, reference"):
        grouped_matmul(x, w, sizes, implementation="megablox")
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        grouped_matmul(jnp.ones((4, 4)), w, sizes, implementation="batched")


def test_mosaic_gpu_puts_its_two_kernels_together(monkeypatch):
    """Plain products stand in for the kernels, and leave NaN where those leave whatever memory
    held.
    """

    def product(x, w, sizes, *, transposed):
        y = lax.ragged_dot(x, w.swapaxes(1, 2) if transposed else w, sizes)
        return jnp.where(jnp.arange(len(x))[:, None] < jnp.sum(sizes), y, jnp.nan)

    def weight_gradient(x, dy, sizes):
        assert jnp.all(jnp.isfinite(x)) and jnp.all(jnp.isfinite(dy))
        starts = np.cumsum(sizes) - sizes
        return jnp.stack(
            [x[a : a + n].T @ dy[a : a + n] for a, n in zip(starts, sizes, strict=True)]
        )

    monkeypatch.setattr(mosaic_gpu, "product", product)
    monkeypatch.setattr(mosaic_gpu, "weight_gradient", weight_gradient)
    rng, sizes = np.random.default_rng(0), np.asarray([9, 0, 16, 3], np.int32)
    x = rng.normal(size=(40, WIDTH)).astype(np.float32)
    w = rng.normal(size=(GROUPS, WIDTH, OUT)).astype(np.float32)
    dy = rng.normal(size=(40, OUT)).astype(np.float32)
    x[28:] = dy[28:] = np.nan
    y, pullback = jax.vjp(lambda x, w: mosaic_gpu.grouped_matmul(x, w, jnp.asarray(sizes)), x, w)
    dx, dw = pullback(jnp.asarray(dy))
    expected_dx, expected_dw = oracle_gradients(x[:28], w, sizes, dy[:28])
    np.testing.assert_allclose(y, np.pad(oracle(x[:28], w, sizes), ((0, 12), (0, 0))), atol=1e-4)
    np.testing.assert_allclose(dx, np.pad(expected_dx, ((0, 12), (0, 0))), atol=1e-4)
    np.testing.assert_allclose(dw, expected_dw, atol=1e-3)


@pytest.mark.parametrize(
    ("message", "dtype", "width"),
    [
        ("bfloat16 or float16 for both, not float32", jnp.float32, 128),
        ("multiples of 128, not F=96", jnp.bfloat16, 96),
        ("the program is for cpu, no GPU", jnp.bfloat16, 128),
    ],
)
def test_what_mosaic_gpu_does_not_take_is_named(message, dtype, width):
    x = jnp.ones((64, 128), dtype)
    w = jnp.ones((2, 128, width), dtype)
    sizes = jnp.asarray([40, 20])
    with pytest.raises(ValueError, match=f"{message}.*batched, ragged_dot and reference take it"):
        grouped_matmul(x, w, sizes, implementation="mosaic_gpu")
