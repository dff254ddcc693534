"""Speculation must change how fast tokens come, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from glm_jax.infer import speculative
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.sampling import (
    MAX_STOP_TOKENS,
    RowParams,
    SamplingParams,
    choose,
    keys,
    sampling_logits,
)
from tests.infer.engine_test import SIZES, assert_all_returned, engine, model, prompts  # noqa: F401

SAMPLES, VOCAB = 100_000, 12


def rows(temperature: float, top_p: float = 1.0, count: int = SAMPLES) -> RowParams:
    full = lambda value, dtype: jnp.full(count, value, dtype)
    stops = jnp.full((count, MAX_STOP_TOKENS), -1, jnp.int32)
    words = jnp.stack([jnp.zeros(count), jnp.arange(count), jnp.zeros(count)], axis=1).astype(
        jnp.uint32
    )
    return RowParams(
        full(temperature, jnp.float32), full(0, jnp.int32), full(top_p, jnp.float32),
        full(0, jnp.float32), words, stops,
        full(1.0, jnp.float32),
    )  # fmt: skip


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_verified_tokens_are_distributed_as_the_trunks(top_p):
    """Chi-square over 100,000 rows at each place that is reached, for drafts from another
    distribution and the same noise; and the share of accepted drafts against its bound, (1 - d) /
    (1 + d) at total variation distance d.
    """
    rng = np.random.default_rng(0)
    params, index = rows(1.3, top_p), jnp.zeros(SAMPLES, jnp.int32)
    logits = jnp.broadcast_to(
        jnp.asarray(rng.normal(size=(3, VOCAB)) * 1.5, jnp.float32), (SAMPLES, 3, VOCAB)
    )
    draft_logits = logits[:, :2] + jnp.asarray(rng.normal(size=(2, VOCAB)), jnp.float32)
    guesses = jnp.stack([choose(draft_logits[:, k], params, index + k) for k in range(2)], axis=1)
    tokens, accepted = jax.jit(speculative.verify)(
        logits, speculative.Drafts(guesses, jnp.full(SAMPLES, 2)), params, index
    )
    tokens, accepted = np.asarray(tokens), np.asarray(accepted)
    distribution = lambda x: np.asarray(
        jax.nn.softmax(sampling_logits(x, jax.tree.map(lambda y: y[:1], params))[0]), np.float64
    )
    for place in range(3):
        reached = accepted >= place
        expected = distribution(logits[:1, place])
        if place < 2:
            distance = np.abs(expected - distribution(draft_logits[:1, place])).sum() / 2
            share = (accepted[reached] > place).mean()
            assert (1 - distance) / (1 + distance) - 0.01 < share < 1 - distance + 0.01
        # Drafts are chosen with the noise of their own place: what was accepted before says nothing
        # about this place.
        counts = np.bincount(tokens[reached, place], minlength=VOCAB)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        assert (
            stats.chisquare(
                counts[possible], expected[possible] / expected.sum() * reached.sum()
            ).pvalue
            > 0.01
        )


def test_streams_of_seeds_samples_and_places_differ_and_use_every_bit():
    seeds = [0, 1, 5, 6, 2**32, 2**32 + 5, -1, -(2**63), 2**63 - 1]
    params = [
        SamplingParams(1, seed=s, sample_index=i) for s in seeds for i in (0, 1, 2, 2**32 - 1)
    ]
    words = jnp.asarray([p.key_words for p in params], jnp.uint32)
    every = dataclasses.replace(rows(1.0, count=len(words)), key_words=words)
    found = [
        jax.random.key_data(keys(every, jnp.full(len(words), i)))[r].tolist()
        for i in (0, 1, 7)
        for r in range(len(words))
    ]
    assert len(set(map(tuple, found))) == 3 * len(params)


def run(ours, asked, params, disturb=None):
    """The tokens of all requests; disturb(engine, requests) is called after every step."""
    requests = [ours.submit(*pair) for pair in zip(asked, params, strict=True)]
    while any(r.status != "finished" for r in requests):
        ours.step()
        if disturb:
            disturb(ours, requests)
    assert_all_returned(ours)
    return [r.tokens for r in requests]


def test_a_seed_fixes_the_tokens_whatever_happens_and_with_any_number_of_drafts(
    model,  # noqa: F811
):
    asked = prompts(8, seed=11, longest=12)
    params = [SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed) for seed in range(8)]
    expected = run(engine(model), asked, params)

    def pause(ours, requests):
        for request in requests:
            if len(request.tokens) > 6 and request.passes % 3 == 0:
                ours.pause(request)
            elif request.status == "paused":
                ours.resume(request)
        if ours.idle:
            for request in requests:
                ours.resume(request)

    def swap(ours, requests):
        if requests[0].tokens and ours.version < 2:
            ours.set_weights(nnx.split(model)[1], recompute=True)

    for drafts in range(4):
        # too few pages for all
        ours, left = engine(model, draft_tokens=drafts, min_rows=8, min_chunk=8, num_pages=16), []
        requeue = ours._requeue
        ours._requeue = lambda request: (left.append(request.id), requeue(request))  # noqa: B023
        for disturb in (None, pause, swap):
            assert run(ours, asked, params, disturb) == expected, (drafts, disturb)
            assert left
            left.clear()


def test_penalties_count_the_drafts_before(model):  # noqa: F811
    asked = prompts(4, seed=12, longest=12)
    params = [
        SamplingParams(
            max_new_tokens=24,
            temperature=0.3 * i,
            seed=i,
            frequency_penalty=1.0,
            presence_penalty=0.5,
            repetition_penalty=1.2,
        )
        for i in range(4)
    ]
    plain = run(engine(model, min_rows=4), asked, params)
    assert run(engine(model, draft_tokens=3, min_rows=4), asked, params) == plain


@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_greedy_output_is_identical_token_for_token(model, draft_tokens):  # noqa: F811
    asked, params = prompts(16), SamplingParams(max_new_tokens=20, temperature=0)
    plain = engine(model).generate(asked, params)
    ours = engine(model, draft_tokens=draft_tokens)
    answers = ours.generate(asked, params)
    assert [r.tokens for r in answers] == [r.tokens for r in plain]
    for request, other in zip(answers, plain, strict=True):
        np.testing.assert_allclose(request.logprobs, other.logprobs, atol=1e-4)
        # one of prefill; a pass gives one more than it accepts
        assert len(request.tokens) <= 1 + request.passes + request.accepted
    assert sum(r.accepted for r in answers) > 0
    assert_all_returned(ours)
    # too few pages for all: some are sent back
    tight = engine(model, draft_tokens=draft_tokens, num_pages=12)
    assert [r.tokens for r in tight.generate(asked, params)] == [r.tokens for r in plain]
    assert_all_returned(tight)


def test_sampled_output_does_not_depend_on_the_company_nor_on_shared_pages(model):  # noqa: F811
    asked = [p for p in prompts(4, seed=1) for _ in range(3)]
    params = [
        SamplingParams(max_new_tokens=5 + i, temperature=0.2 + i / 10, seed=i) for i in range(12)
    ]
    together = engine(model, draft_tokens=2).generate(asked, params)
    apart = [
        engine(model, draft_tokens=2).generate([p], q)[0]
        for p, q in zip(asked, params, strict=True)
    ]
    assert [r.tokens for r in apart] == [r.tokens for r in together]


def test_a_model_without_mtp_and_a_cache_without_room_for_drafts_are_named(model):  # noqa: F811
    with pytest.raises(ValueError, match="hold no request of 66 with its drafts"):
        EngineConfig(**SIZES | {"num_pages": 8, "draft_tokens": 2})
    with pytest.raises(ValueError, match="has no MTP block"):
        EngineConfig(**SIZES | {"draft_tokens": 1}).check(
            dataclasses.replace(model.config, num_mtp_layers=0), None
        )
