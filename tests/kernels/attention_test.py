import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.api import IMPLEMENTATIONS, attention

BATCH, LENGTH, HEADS, GROUPS, SIZE = 2, 300, 4, 2, 8
SCALE = 0.3


def oracle(q, k, v, segments):
    """A loop over queries in float64."""
    out = np.zeros(q.shape)
    for b in range(BATCH):
        for i in range(LENGTH):
            keys = [j for j in range(i + 1) if segments[b, j] == segments[b, i]]
            for n in range(HEADS):
                g = n // (HEADS // GROUPS)
                scores = SCALE * (k[b, keys, g].astype(np.float64) @ q[b, i, n])
                probs = np.exp(scores - scores.max())
                out[b, i, n] = probs / probs.sum() @ v[b, keys, g]
    return out


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        rng.normal(size=(BATCH, LENGTH, n, SIZE)).astype(np.float32) * s for n, s in ((HEADS, 3), (GROUPS, 3), (GROUPS, 1), (HEADS, 1))
    )
    segments = np.sort(rng.integers(1, 6, (BATCH, LENGTH)), axis=1).astype(np.int32)
    segments[1, 250:] = 0  # padding at the end
    return q, k, v, segments, dout


def run(implementation, q, k, v, segments, dout):
    call = lambda q, k, v: attention(  # noqa: E731
        q, k, v, segments, scale=SCALE, implementation=implementation
    )
    out, pullback = jax.vjp(call, q, k, v)
    return out, *pullback(dout)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_equal_a_loop_over_queries(implementation, inputs):
    out = jax.jit(run, static_argnums=0)(implementation, *inputs)[0]
    np.testing.assert_allclose(out, oracle(*inputs[:4]), atol=2e-5)


def test_gradients_of_the_blocked_form_equal_those_of_autodiff_through_the_reference(inputs):
    mine, theirs = (jax.jit(run, static_argnums=0)(name, *inputs) for name in ("xla", "reference"))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_very_large_scores_do_not_overflow():
    q = jnp.full((1, 4, 1, 8), 100.0)
    ones = jnp.ones((1, 4), jnp.int32)
    out = attention(q, q, q, ones, scale=1.0, implementation="xla")
    np.testing.assert_allclose(out, q)


def test_unknown_implementation_is_named(inputs):
    with pytest.raises(ValueError, match="'splash' is not one of reference, xla"):
        run("splash", *inputs)
