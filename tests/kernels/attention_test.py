"""Attention's interface and the implementations that run anywhere; the TPU kernel's tests are in
attention_kernel_test.py.
"""

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import api
from pallas_kernels.attention.api import attention

BATCH, LENGTH, HEADS, GROUPS, SIZE = 2, 300, 4, 2, 8
SCALE = 0.3


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        rng.normal(size=(BATCH, LENGTH, n, SIZE)).astype(np.float32) * s
        for n, s in ((HEADS, 3), (GROUPS, 3), (GROUPS, 1), (HEADS, 1))
    )
    segments = np.sort(rng.integers(1, 6, (BATCH, LENGTH)), axis=1).astype(np.int32)
    segments[1, 250:] = 0  # padding at the end
    return q, k, v, segments, dout


def run(implementation, q, k, v, segments, dout):
    call = lambda q, k, v: attention(q, k, v, segments, scale=SCALE, implementation=implementation)
    out, pullback = jax.vjp(call, q, k, v)
    return out, *pullback(dout)


@pytest.mark.parametrize("implementation", ["reference", "xla", "auto"])
def test_values_and_gradients_equal_a_loop_over_queries(implementation, inputs):
    found = jax.jit(run, static_argnums=0)(implementation, *inputs)
    q, k, v, segments, dout = (
        np.asarray(x, np.float64) if x.dtype != np.int32 else x for x in inputs
    )
    expected = [oracle.attention(q, k, v, segments, segments, SCALE)[0]]
    expected += oracle.gradients(q, k, v, segments, segments, SCALE, dout, np.zeros(dout.shape[:3]))
    for mine, theirs in zip(found, expected, strict=True):
        assert oracle.relative(mine, theirs) < 1e-5


@pytest.mark.parametrize("packed", [True, False])
def test_cudnn_is_given_the_segments(packed, inputs, monkeypatch):
    """JAX's own XLA path stands in for cuDNN, with the same arguments. Every query has a key:
    cuDNN's gradient of one without is NaN.
    """
    theirs = jax.nn.dot_product_attention

    def stand_in(*args, mask=None, **more):
        assert mask is None or mask.any(-1).all()
        return theirs(*args, mask=mask, **(more | {"implementation": "xla"}))

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(api, "target_platform", lambda: "gpu")
    q, k, v, segments, dout = inputs
    found = run("cudnn", q, k, v, segments if packed else None, dout)
    expected = run("reference", q, k, v, segments if packed else None, dout)
    for mine, plain in zip(found, expected, strict=True):
        assert oracle.relative(np.asarray(mine), np.asarray(plain)) < 1e-5


def test_padding_sees_nothing_and_is_not_seen(inputs):
    q, k, v, segments, _ = inputs
    for implementation in ("reference", "xla"):
        out = attention(q, k, v, segments, scale=SCALE, implementation=implementation)
        np.testing.assert_array_equal(out[1, 250:], 0)


def test_very_large_scores_do_not_overflow():
    q = jnp.full((1, 4, 1, 8), 100.0)
    ones = jnp.ones((1, 4), jnp.int32)
    out = attention(q, q, q, ones, scale=1.0, implementation="xla")
    np.testing.assert_allclose(out, q)


def test_without_ids_a_row_is_one_segment(inputs):
    q, k, v, _, _ = inputs
    ones = np.ones(q.shape[:2], np.int32)
    mine, theirs = (
        attention(q, k, v, ids, scale=SCALE, implementation="xla") for ids in (None, ones)
    )
    np.testing.assert_array_equal(mine, theirs)


def test_unknown_implementation_is_named(inputs):
    with pytest.raises(
        ValueError, match="'splash' is not one of auto, reference, xla, pallas, cudnn"
    ):
        run("splash", *inputs)


def test_what_an_implementation_does_not_take_is_named_with_one_that_does(inputs):
    q, k, v, segments, _ = inputs
    call = lambda implementation, q=q, k=k, v=v, segments=segments, **more: attention(
        q, k, v, segments, scale=SCALE, implementation=implementation, **more
    )
    with pytest.raises(ValueError, match="head size 8: takes 64 and 128; 'xla' takes it"):
        call("pallas")
    wide = np.zeros((BATCH, LENGTH, 2, 64), np.float32)
    with pytest.raises(
        ValueError, match=r"lengths 300 of queries and 300 of keys: takes multiples of 128; 'xla'"
    ):
        call("pallas", wide, wide, wide)
    long = np.zeros((BATCH, 128, 2, 64), np.float32)
    with pytest.raises(
        ValueError,
        match=r"types float16, float32, float32 of q, k, v: takes one of bfloat16, float32",
    ):
        call("pallas", long.astype(np.float16), long, long, np.ones((BATCH, 128), np.int32))
    with pytest.raises(
        ValueError, match="no TPU, and pallas_kernels.interpret is not on; 'xla' takes it"
    ):
        call("pallas", long, long, long, np.ones((BATCH, 128), np.int32))
    with pytest.raises(
        ValueError, match="'xla' takes neither offsets.*'pallas' and 'reference' do"
    ):
        call("xla", q_offset=4)
    with pytest.raises(
        ValueError, match="'cudnn' takes neither offsets.*'pallas' and 'reference' do"
    ):
        call("cudnn", q_offset=4)
    with pytest.raises(ValueError, match="'cudnn': the program is for cpu, no GPU; 'xla' takes it"):
        call("cudnn")
    with pytest.raises(ValueError, match=r"segment ids \(2, 7\) of queries \(2, 300, 4, 8\)"):
        call("xla", segments=segments[:, :7])
