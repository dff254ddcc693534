"""Heads on their way from the projection to attention, simulated with races detected and unwritten
memory NaN, against their formula.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glm_jax.model.attention import Attention
from glm_jax.model.layers import rope_angles
from pallas_kernels import compiler, interpret
from pallas_kernels.attention import rotary
from tests.model.oracle import tiny_config

EPS, FACTOR, BATCH, LENGTH, HEADS = 1e-5, 0.3, 2, 256, 3
TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3}


def expected(x, bias, weight, angles):
    """rotary.rotated's values, in float32."""
    x = jnp.asarray(x, jnp.float32) + (0 if bias is None else bias.astype(jnp.float32))
    x = x.reshape(*x.shape[:2], -1, 128)
    if weight is not None:
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * weight.astype(jnp.float32)
    cos, sin = (a[:, :, None].astype(jnp.float32) for a in angles)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], -1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)
    return (turned * FACTOR).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("half", "biased", "normed"),
    [(32, True, True), (64, False, True), (16, True, False), (32, False, False)],
)
def test_values_and_gradients_equal_the_formula(dtype, half, biased, normed):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    x = draw(BATCH, LENGTH, HEADS * 128)
    bias = draw(HEADS * 128)
    weight = draw(128) + 1
    dy = draw(BATCH, LENGTH, HEADS * 128)
    turns = rng.normal(size=(BATCH, LENGTH, half))
    angles = tuple(jnp.asarray(f(turns), dtype) for f in (np.cos, np.sin))
    arguments = x, bias if biased else None, weight if normed else None
    y, pullback = jax.vjp(lambda *a: expected(*a, angles), *arguments)
    wanted = y, *pullback(dy.astype(jnp.float32))

    @jax.jit
    def run(arguments, dy):
        (y, lengths), pullback = jax.vjp(
            lambda *a: rotary.rotated(*a, angles, EPS, FACTOR), *arguments
        )
        return lengths, y, *pullback((dy, jnp.zeros_like(lengths)))

    with interpret.on(detect_races=True, uninitialized_memory="nan"):
        lengths, *found = run(arguments, dy)
        products = jax.jit(rotary.head_products)(x, dy)
    for ours, right in zip(found, wanted, strict=True):
        assert (ours is None) == (right is None)
        if right is not None:
            error = np.linalg.norm(np.asarray(ours, np.float64) - np.asarray(right, np.float64))
            assert error <= TOLERANCE[dtype] * np.linalg.norm(np.asarray(right, np.float64))
    by_head = lambda a: np.asarray(a, np.float64).reshape(BATCH, LENGTH, HEADS, 128)
    # Of what comes out, not of what it was before it was rounded: attention takes them for bounds.
    np.testing.assert_allclose(
        lengths, np.linalg.norm(by_head(found[0]), axis=-1).swapaxes(1, 2), rtol=1e-6
    )
    np.testing.assert_allclose(
        products, np.sum(by_head(x) * by_head(dy), axis=-1).swapaxes(1, 2), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("tokens", [1, 5, 128, 200])
def test_any_number_of_tokens(tokens):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), "bfloat16")
    x, bias, weight = draw(1, tokens, HEADS * 128), draw(HEADS * 128), draw(128) + 1
    turns = rng.normal(size=(1, tokens, 32))
    angles = tuple(jnp.asarray(f(turns), jnp.float32) for f in (np.cos, np.sin))
    with interpret.on(detect_races=True, uninitialized_memory="nan"):
        found = jax.jit(
            lambda x: rotary.rotated_tokens(x, bias, weight, tuple(a[0] for a in angles), EPS)
        )(x[0])
    right = np.asarray(expected(x, bias, weight, angles)[0] / FACTOR, np.float64)
    assert np.linalg.norm(np.asarray(found, np.float64) - right) <= TOLERANCE[
        "bfloat16"
    ] * np.linalg.norm(right)


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_tpu_compiler_takes_96_heads_and_four_of_them_take_few_cycles(topology, schedules):
    """A core of a v5p gets what 128 tokens of four heads read and write in some 370 cycles, 560
    backward.
    """
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    x, angle = array(1, 256, 96 * 128), array(1, 256, 32)

    def run(x, bias, weight, cos, sin, dy):
        (y, lengths), pullback = jax.vjp(
            lambda *a: rotary.rotated(*a, (cos, sin), EPS, FACTOR), x, bias, weight
        )
        return y, lengths, pullback((dy, lengths)), rotary.head_products(x, dy)

    compiler.take(schedules)
    compiler.compile_kernel(run, (x, array(96 * 128), array(128), angle, angle, x), topology)
    found, _ = compiler.take(schedules)
    assert found["rotate_heads"].cycles <= 500 and found["rotate_heads_backward"].cycles <= 500


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_models_attention_is_the_same_with_it(qk_norm):
    """Values and every gradient, two documents and padding in a row."""
    sizes = {
        "hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 128,
        "qk_norm": qk_norm,
        "attention_bias": True,
    }
    ids = jnp.asarray(np.repeat([[1, 2, 0]], (50, 60, 18), axis=1), jnp.int32)
    positions = jnp.arange(128)[None]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 128, 128)), jnp.float32)
    results = []
    for implementation in ("xla", "pallas"):
        config = tiny_config(**sizes, attention=implementation)
        graphdef, state = nnx.split(Attention(config, rngs=nnx.Rngs(0)))
        rng = np.random.default_rng(1)
        state = jax.tree.map(
            lambda w, rng=rng: jnp.asarray(rng.normal(size=w.shape) / 8, jnp.float32), state
        )

        @jax.jit
        def run(state, x):
            def loss(state, x):
                module = nnx.merge(graphdef, state)  # noqa: B023
                y, _ = module(x, ids, rope_angles(config, positions))  # noqa: B023
                return jnp.sum(jnp.sin(y) * (ids > 0)[..., None]), y

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

        with interpret.on(uninitialized_memory="nan"):
            results.append(jax.tree.leaves(run(state, x)))
    for ours, theirs in zip(*results, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs) + 1e-5
