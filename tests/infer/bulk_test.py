"""Scores in bulk against transformers' logits; and that logits of a whole batch never exist."""

import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from glm_jax import hf
from glm_jax.infer import bulk
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from tests.model.oracle import Oracle, random_state, tiny_config, to_jax

CONTEXT = 48  # no power of two, and below the model's max_length


@pytest.fixture(scope="module")
def engine():
    config = tiny_config(vocab_size=97)  # a size that nothing else has
    model = nnx.merge(nnx.graphdef(hf.abstract_model(config)), to_jax(random_state(config)))
    sizes = {
        "num_rows": 1,
        "page_size": 16,
        "num_pages": 8,
        "prefill_chunk": 4,
        "decode_steps": 4,
        "draft_tokens": 0,
        "min_rows": 1,
        "min_chunk": 1,
    }
    return Engine(
        model,
        EngineConfig(
            context=CONTEXT, weights="compute", cache_dtype="compute", keep_experts=False, **sizes
        ),
    )


@pytest.fixture(scope="module")
def oracle(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    hf.export_checkpoint(
        folder, engine.model_config, random_state(engine.model_config), dtype="float32"
    )
    return Oracle(folder)


def expected(oracle, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One row alone, by log-softmax in float64 over all of its logits."""
    row = [*context, *continuation][-(CONTEXT + 1) :]
    logits = oracle.logits([row[:-1]])[0][-len(continuation) :].astype(np.float64)
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return float(logprobs[np.arange(len(continuation)), continuation].sum()), bool(
        (logits.argmax(-1) == continuation).all()
    )


def test_scores_equal_transformers(engine, oracle):
    rng = np.random.default_rng(0)
    tokens = lambda low, high: rng.integers(0, 97, rng.integers(low, high)).tolist()
    pairs = [(tokens(1, 40), tokens(1, 8)) for _ in range(30)] + [
        ([1], [2]),
        (tokens(60, 70), tokens(1, 9)),
        ([1], tokens(48, 49)),
    ]
    for context, _ in pairs[:6]:
        greedy = list(context)
        for _ in range(5):
            greedy.append(int(oracle.logits([greedy])[0, -1].argmax()))
        new = greedy[len(context) :]
        # all but the last token greedy; all
        pairs += [(context, [*new[:-1], (new[-1] + 1) % 97]), (context, new)]
    ours = bulk.score_all(engine, pairs, batch_tokens=128)
    theirs = [expected(oracle, *pair) for pair in pairs]
    np.testing.assert_allclose([s for s, _ in ours], [s for s, _ in theirs], atol=1e-4)
    assert [g for _, g in ours] == [g for _, g in theirs]
    assert [g for _, g in ours[-12:]] == [False, True] * 6


def test_few_programs_serve_all_lengths(engine):
    bulk._target_scores.clear_cache()
    pairs = [([1] * length, [2]) for length in range(1, 90)]
    bulk.score_all(engine, pairs, batch_tokens=10**6)
    assert bulk._target_scores._cache_size() == 2  # rows of 32 and of 48 tokens


def test_logits_exist_for_a_chunk_only(engine, monkeypatch):
    monkeypatch.setattr(bulk, "LOGITS_CHUNK", 24)
    rows = np.zeros((2, CONTEXT), np.int32)
    traced = str(
        jax.make_jaxpr(bulk._target_scores.__wrapped__, static_argnums=0)(
            engine.graphdef, engine.state, rows, rows, rows[:, 0]
        )
    )
    vocab = engine.model_config.vocab_size
    shapes = [
        tuple(map(int, found.split(",")))
        for found in re.findall(rf"f32\[((?:\d+,)*{vocab})\]", traced)
    ]
    held = [math.prod(shape[:-1]) for shape in shapes if shape[-1] == vocab]
    # the head itself has more rows than a chunk
    assert held and max(held) == engine.model_config.hidden_size


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * (CONTEXT + 1))])
def test_what_cannot_be_scored_is_named(engine, pair):
    with pytest.raises(
        ValueError,
        match=r"pair 1: \d+ tokens continued by \d+; valid: at least one, continued by 1..48",
    ):
        bulk.score_all(engine, [([1], [1]), pair], batch_tokens=64)
