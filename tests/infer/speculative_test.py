"""Speculation must change how fast tokens come, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from glm_jax.infer import speculative
from glm_jax.infer.engine import EngineConfig, SamplingParams
from glm_jax.infer.sampling import MAX_STOP_TOKENS, RowParams, drawing_logits
from tests.infer.engine_test import SIZES, assert_all_returned, engine, model, prompts  # noqa: F401

SAMPLES, VOCAB = 100_000, 12


def rows(temperature: float, top_p: float = 1.0) -> RowParams:
    full = lambda value, dtype: jnp.full(SAMPLES, value, dtype)  # noqa: E731
    stops = jnp.full((SAMPLES, MAX_STOP_TOKENS), -1, jnp.int32)
    return RowParams(
        full(temperature, jnp.float32), full(0, jnp.int32), full(top_p, jnp.float32), jnp.arange(SAMPLES, dtype=jnp.uint32), stops,
        full(1.0, jnp.float32),
    )  # fmt: skip


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_verified_tokens_are_distributed_as_the_trunks(top_p):
    """Chi-square over 100,000 rows, at each place that is reached, for drafts from another distribution."""
    rng = np.random.default_rng(0)
    params = rows(1.3, top_p)
    logits = jnp.broadcast_to(jnp.asarray(rng.normal(size=(3, VOCAB)) * 1.5, jnp.float32), (SAMPLES, 3, VOCAB))
    draft_logits = logits[:, :2] + jnp.asarray(rng.normal(size=(2, VOCAB)), jnp.float32)
    drawn = jax.random.categorical(jax.random.key(5), draft_logits)
    drafts = speculative.Drafts(drawn.astype(jnp.int32), draft_logits, jnp.full(SAMPLES, 2))
    tokens, accepted = jax.jit(speculative.verify)(logits, drafts, params, jnp.zeros(SAMPLES, jnp.int32))
    tokens, accepted = np.asarray(tokens), np.asarray(accepted)
    assert 0.2 < (accepted == 2).mean() < 0.9
    for place in range(3):
        reached = tokens[accepted >= place, place]
        expected = np.asarray(jax.nn.softmax(drawing_logits(logits[:1, place], jax.tree.map(lambda x: x[:1], params))[0]), np.float64)
        counts = np.bincount(reached, minlength=VOCAB)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        assert stats.chisquare(counts[possible], expected[possible] / expected.sum() * len(reached)).pvalue > 0.01


@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_greedy_output_is_identical_token_for_token(model, draft_tokens):  # noqa: F811
    asked, params = prompts(16), SamplingParams(max_new_tokens=20, temperature=0)
    plain = engine(model).generate(asked, params)
    ours = engine(model, draft_tokens=draft_tokens)
    answers = ours.generate(asked, params)
    assert [r.tokens for r in answers] == [r.tokens for r in plain]
    for request, other in zip(answers, plain, strict=True):
        np.testing.assert_allclose(request.logprobs, other.logprobs, atol=1e-4)
        assert len(request.tokens) <= 1 + request.passes + request.accepted  # one of prefill; a pass gives one more than it accepts
    assert sum(r.accepted for r in answers) > 0
    assert_all_returned(ours)
    tight = engine(model, draft_tokens=draft_tokens, num_pages=12)  # too few pages for all: some are sent back
    assert [r.tokens for r in tight.generate(asked, params)] == [r.tokens for r in plain]
    assert_all_returned(tight)


def test_sampled_output_does_not_depend_on_the_company_nor_on_shared_pages(model):  # noqa: F811
    asked = [p for p in prompts(4, seed=1) for _ in range(3)]
    params = [SamplingParams(max_new_tokens=5 + i, temperature=0.2 + i / 10, seed=i) for i in range(12)]
    together = engine(model, draft_tokens=2).generate(asked, params)
    apart = [engine(model, draft_tokens=2).generate([p], q)[0] for p, q in zip(asked, params, strict=True)]
    assert [r.tokens for r in apart] == [r.tokens for r in together]


def test_a_model_without_mtp_and_a_cache_without_room_for_drafts_are_named(model):  # noqa: F811
    with pytest.raises(ValueError, match="hold no request of 66 with its drafts"):
        EngineConfig(**SIZES | {"num_pages": 8, "draft_tokens": 2})
    with pytest.raises(ValueError, match="has no MTP block"):
        EngineConfig(**SIZES | {"draft_tokens": 1}).check(dataclasses.replace(model.config, num_mtp_layers=0), None)
