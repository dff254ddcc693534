"""Quantised weights and caches against float64 arithmetic and qwix; what the engine then draws;
router replay.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
from flax import nnx

from glm_jax.infer import quantize, swap
from glm_jax.infer.agreement import agreement, training_forward
from glm_jax.infer.sampling import SamplingParams
from glm_jax.model.layers import MLP
from glm_jax.model.transformer import GLM
from tests.infer.engine_test import assert_all_returned, engine, model  # noqa: F401
from tests.model.oracle import tiny_config

SAMPLED = SamplingParams(max_new_tokens=12, seed=3)
# one program to prefill four prompts, one to decode
ONE_SHAPE = {"context": 32, "num_rows": 4, "num_pages": 16, "prefill_chunk": 16}


def prompts(count: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, 64, (count, 16)).tolist()


@pytest.mark.parametrize("shape", [(128, 256), (3, 200, 130), (2, 2, 5, 7)])
def test_fp8_blocks_are_rounded_to_their_own_scale(shape):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32) * np.logspace(
        -3, 3, shape[-1], dtype=np.float32
    )
    q = quantize.quantize(jnp.asarray(w), "fp8")
    rows, columns = -(-shape[-2] // 128), -(-shape[-1] // 128)
    assert q.scale.shape == (*shape[:-2], rows, columns)
    for row in range(rows):
        for column in range(columns):
            at = (..., slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            block = w[at].astype(np.float64)
            scale = np.abs(block).max(axis=(-2, -1), keepdims=True) / 448
            rounded = (block / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
            ours = np.asarray(q.astype(jnp.float32), np.float64)[at]
            # A value that lies between two float8 numbers up to the last float32 bit may go to
            # either.
            assert (np.abs(ours - rounded) > 1e-6 * np.abs(block).max()).mean() < 1e-3
            assert (
                np.abs(ours - block) <= np.maximum(np.abs(block) / 16, scale * 2.0**-10) * 1.001
            ).all()


def test_formats_equal_qwix_and_float64():
    w = jax.random.normal(jax.random.key(0), (256, 384))
    ours = quantize.quantize(w, "fp8").astype(jnp.float32)
    theirs = qwix.dequantize(qwix.quantize(w, jnp.float8_e4m3fn, tiled_axes={0: 128, 1: 128}))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    # qwix divides by 127.5 for int8, which leaves the largest value off by half a step.
    ours, exact = quantize.quantize(w, "int8").astype(jnp.float32), np.asarray(w, np.float64)
    scale = np.abs(exact).max(axis=0) / 127
    assert (np.abs(ours - np.round(exact / scale) * scale) > 1e-5).mean() < 1e-3
    np.testing.assert_allclose(np.abs(ours).max(axis=0), np.abs(exact).max(axis=0), rtol=1e-6)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_zeros_that_fill_blocks_change_no_product(format):
    """A dense layer of width 200, as Air's 10,944 is no multiple of 128 either."""
    mlp = MLP(tiny_config(), 200, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(mlp)
    prepared = swap.prepare(state, format, "float32", None)
    x = jax.random.normal(jax.random.key(1), (2, 3, tiny_config().hidden_size))
    ours = nnx.merge(graphdef, prepared)
    assert (
        ours.gate_proj.weight.get_value().shape[1]
        == ours.down_proj.weight.get_value().shape[0]
        == 256
    )
    for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        projection.weight.set_value(
            quantize.quantize(projection.weight.get_value(), format).astype(jnp.float32)
        )
    np.testing.assert_allclose(ours(x), mlp(x), rtol=1e-5, atol=1e-7)


def test_zeros_and_huge_values_survive():
    w = jnp.zeros((128, 128)).at[0, 0].set(3e38)
    for format in ("fp8", "int8"):
        assert not np.isnan(quantize.quantize(w, format).astype(jnp.float32)).any()
        assert (quantize.quantize(jnp.zeros((4, 4)), format).astype(jnp.float32) == 0).all()


def test_what_is_quantised_is_what_the_format_says(model):  # noqa: F811
    prepared = nnx.to_flat_state(swap.prepare(nnx.state(model), "fp8", "bfloat16", None))
    quantised = set()
    for path, variable in prepared:
        value = variable.get_value()
        if isinstance(value, quantize.Quantized):
            assert value.values.dtype == jnp.float8_e4m3fn and value.scale.dtype == jnp.float32
            quantised.add(path[-2] if path[-1] == "weight" else path[-1])
        else:
            assert value.dtype == (jnp.float32 if "gate" in path else jnp.bfloat16), path
    assert quantised == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_the_engine_draws_from_the_quantised_model(model, format):  # noqa: F811
    """The oracle is the training forward of a model whose float32 weights are the rounded ones."""
    prepared = nnx.to_flat_state(swap.prepare(nnx.state(model), format, "float32", None))
    rounded = [(path, v.replace(v.get_value().astype(jnp.float32))) for path, v in prepared]
    rounded = nnx.merge(nnx.graphdef(model), nnx.from_flat_state(rounded))
    quantised = engine(model, **ONE_SHAPE, weights=format)
    answers = quantised.generate(prompts(4), SAMPLED)
    assert agreement(rounded, answers, replay=False)["logprob_difference_max"] < 1e-4
    apart = agreement(model, answers, replay=False)
    assert 1e-4 < apart["logprob_difference_max"] < 1
    quantised.set_weights(nnx.state(model), recompute=True)  # on line, at a swap
    assert [r.tokens for r in quantised.generate(prompts(4), SAMPLED)] == [
        r.tokens for r in answers
    ]
    assert_all_returned(quantised)


def test_an_fp8_cache_stays_close(model):  # noqa: F811
    answers = engine(model, **ONE_SHAPE, cache_dtype="float8_e4m3fn").generate(prompts(4), SAMPLED)
    assert 1e-6 < agreement(model, answers, replay=False)["logprob_difference_mean"] < 0.1


def test_kept_experts_are_those_of_the_training_forward(model):  # noqa: F811
    # few pages: some are shared, some requests sent back
    ours = engine(model, **ONE_SHAPE | {"num_pages": 10}, keep_experts=True)
    asked = [[*range(8), *prompt[:8]] for prompt in prompts(6)]
    answers = ours.generate(asked, SAMPLED)
    for request in answers:
        assert request.experts.shape == (
            len(request.sequence) - 1,
            model.config.num_moe_layers,
            model.config.num_experts_per_token,
        )
    metrics = agreement(model, answers, replay=False)
    assert metrics["experts_differ"] == 0
    assert metrics["logprob_difference_max"] < 1e-4
    drafted = engine(model, **ONE_SHAPE | {"num_pages": 20}, keep_experts=True, draft_tokens=2)
    again = drafted.generate(asked[:4], dataclasses.replace(SAMPLED, temperature=0))
    assert again[0].experts.shape[1] == model.config.num_moe_layers + 1
    assert agreement(model, again, replay=False)["experts_differ"] == 0


def test_replay_routes_the_training_forward(model):  # noqa: F811
    """With other weights the choice differs; replayed, it is the engine's, and weights are the
    scores of those experts.
    """
    shaken = jax.tree.map(
        lambda x: x + 0.02 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)),
        nnx.state(model),
    )
    other = nnx.merge(nnx.graphdef(model), shaken)
    answers = engine(model, **ONE_SHAPE, keep_experts=True).generate(prompts(4), SAMPLED)
    assert agreement(other, answers, replay=False)["experts_differ"] > 0.05
    assert "experts_differ" not in agreement(other, answers, replay=True)
    tokens = jnp.asarray([answers[0].sequence])
    wish = jnp.asarray(answers[0].experts.swapaxes(0, 1)[:, None], jnp.int32)
    wish = jnp.concatenate([wish, jnp.full_like(wish[:, :, :1], -1)], axis=2)
    graphdef, state = nnx.split(other)
    _, experts = training_forward(graphdef, state, tokens, jnp.ones_like(tokens), wish)
    np.testing.assert_array_equal(experts[:, :, :-1], wish[:, :, :-1])
    own = training_forward(graphdef, state, tokens, jnp.ones_like(tokens))
    same = training_forward(graphdef, state, tokens, jnp.ones_like(tokens), own[1])
    np.testing.assert_allclose(own[0], same[0], atol=1e-6)
    with pytest.raises(ValueError, match="keep_experts"):
        agreement(model, engine(model, **ONE_SHAPE).generate(prompts(4), SAMPLED), replay=True)


@pytest.mark.parametrize("weights", ["compute", "fp8"])
def test_written_out_layers_draw_what_scanned_ones_draw(model, weights):  # noqa: F811
    written_out = nnx.merge(
        nnx.graphdef(GLM(dataclasses.replace(model.config, scan_layers=False), rngs=nnx.Rngs(1))),
        nnx.state(model),
    )
    scanned, ours = (engine(m, weights=weights, **ONE_SHAPE) for m in (model, written_out))
    assert not ours.model_config.scan_layers
    ours.set_weights(nnx.state(model), recompute=True)
    expected, answers = (e.generate(prompts(4), SAMPLED) for e in (scanned, ours))
    assert [r.tokens for r in answers] == [r.tokens for r in expected]
