"""The engine against transformers' `generate`, against our own forward pass, and against itself in
other company.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from glm_jax import hf
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.infer.sampling import SamplingParams
from glm_jax.model.transformer import GLM
from tests.model.oracle import Oracle, random_state, tiny_config, to_jax

SIZES = {
    "context": 64, "num_rows": 8, "page_size": 8, "num_pages": 64, "prefill_chunk": 8,
    "decode_steps": 4, "draft_tokens": 0,
    "weights": "compute", "cache_dtype": "compute", "keep_experts": False, "min_rows": 1,
    "min_chunk": 1,
}  # fmt: skip
SAMPLED = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=7)


@pytest.fixture(scope="module")
def model() -> GLM:
    config = tiny_config()
    return nnx.merge(nnx.graphdef(hf.abstract_model(config)), to_jax(random_state(config)))


def engine(model, **changes) -> Engine:
    return Engine(
        model,
        EngineConfig(**SIZES | changes),
        decode_text=lambda ids: "".join(chr(97 + i % 26) for i in ids),
    )


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def assert_all_returned(engine: Engine):
    assert engine.idle
    assert engine.num_free_pages == engine.config.num_pages
    assert not any(holders for pool in engine.pools for holders in pool.holders)


def test_greedy_output_equals_transformers_generate(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    hf.export_checkpoint(folder, model.config, random_state(model.config), dtype="float32")
    oracle = Oracle(folder).main
    asked = prompts(100)
    ours = engine(model)
    answers = ours.generate(asked, SamplingParams(max_new_tokens=16, temperature=0))
    for prompt, answer in zip(asked, answers, strict=True):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            expected = oracle.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=16,
                eos_token_id=None,
            )
        assert answer.tokens == expected[0, len(prompt) :].tolist()
        assert answer.finish_reason == "length"
    assert_all_returned(ours)
    alone = engine(model, num_rows=1)
    assert [
        r.tokens
        for r in alone.generate(asked[:8], SamplingParams(max_new_tokens=16, temperature=0))
    ] == [r.tokens for r in answers[:8]]


def test_logprobs_equal_the_training_forward(model):
    for request in engine(model).generate(prompts(6), SAMPLED):
        tokens = jnp.asarray([request.sequence])
        logprobs = jax.nn.log_softmax(model(tokens)[0], axis=-1)
        expected = [
            float(logprobs[len(request.prompt) - 1 + i, t]) for i, t in enumerate(request.tokens)
        ]
        np.testing.assert_allclose(request.logprobs, expected, atol=1e-4)


def test_output_does_not_depend_on_the_company(model):
    asked = prompts(12, seed=1)
    params = [
        SamplingParams(
            max_new_tokens=5 + i, temperature=0.5 + i / 10, top_k=i, top_p=1 - i / 20, seed=i
        )
        for i in range(12)
    ]
    together = engine(model).generate(asked, params)
    for sizes in (
        {"num_rows": 1},
        {"prefill_chunk": 3, "decode_steps": 1},
        {"min_rows": 4, "min_chunk": 8},
    ):
        other = engine(model, **sizes)
        apart = [other.generate([prompt], p)[0] for prompt, p in zip(asked, params, strict=True)]
        assert [r.tokens for r in apart] == [r.tokens for r in together]


def test_samples_of_one_prompt_compute_it_once(model):
    ours = engine(model)
    computed = []
    store = ours._store
    ours._store = lambda request, count: (
        computed.append((request.id, count)),
        store(request, count),
    )
    prompt = prompts(1, seed=3)[0][:1] + list(range(25))
    answers = ours.generate(
        [prompt] * 4, [SamplingParams(max_new_tokens=3, seed=i) for i in range(4)]
    )
    of = lambda i: sum(count for request, count in computed if request == i)
    assert of(answers[0].id) >= 26
    assert all(of(a.id) <= 26 - 24 + 3 for a in answers[1:]), computed
    alone = [engine(model).generate([prompt], a.params)[0].tokens for a in answers]
    assert alone == [a.tokens for a in answers]
    assert_all_returned(ours)


def test_a_full_cache_sends_the_last_request_back_and_changes_nothing(model):
    asked = prompts(12, seed=4)
    # some end with their prefill
    params = [SamplingParams(max_new_tokens=(24, 24, 1)[i % 3], seed=5) for i in range(12)]
    roomy, tight = engine(model), engine(model, num_pages=9)
    expected = [r.tokens for r in roomy.generate(asked, params)]
    left = []
    requeue = tight._requeue
    tight._requeue = lambda request: (left.append(request.id), requeue(request))
    assert [r.tokens for r in tight.generate(asked, params)] == expected
    assert left
    assert_all_returned(tight)


def test_paused_requests_keep_their_tokens_and_go_on(model):
    asked = prompts(3, seed=6)
    expected = [r.tokens for r in engine(model).generate(asked, SAMPLED)]
    ours = engine(model)
    requests = [ours.submit(p, SAMPLED) for p in asked]
    while len(requests[1].tokens) < 4:
        ours.step()
    ours.pause(requests[1])
    kept = list(requests[1].tokens)
    while not ours.idle:
        ours.step()
    assert requests[1].tokens == kept
    assert requests[1].status == "paused"
    ours.resume(requests[1])
    while not ours.idle:
        ours.step()
    assert [r.tokens for r in requests] == expected
    assert_all_returned(ours)


def test_aborted_requests_free_their_pages_in_every_status(model):
    ours = engine(model, num_rows=2)
    running, paused, waiting = (ours.submit(p, SAMPLED) for p in prompts(3, seed=8, longest=8))
    ours.step()
    ours.pause(paused)
    for request in (running, paused, waiting):
        ours.abort(request)
        assert (request.status, request.finish_reason) == ("finished", "abort")
    assert_all_returned(ours)
    ours.abort(running)  # nothing happens
    assert running.tokens


def test_stop_tokens_and_strings_end_a_request(model):
    prompt = prompts(1, seed=9)[0]
    free = engine(model).generate([prompt], SAMPLED)[0]
    token = free.tokens[3]
    stopped = engine(model).generate(
        [prompt], SamplingParams(**vars(SAMPLED) | {"stop_tokens": (token,)})
    )[0]
    end = free.tokens.index(token)
    assert stopped.tokens == free.tokens[: end + 1]
    assert stopped.text_tokens == free.tokens[:end]
    assert stopped.finish_reason == "stop"
    text = "".join(chr(97 + t % 26) for t in free.tokens)
    stopped = engine(model).generate(
        [prompt], SamplingParams(**vars(SAMPLED) | {"stop_strings": (text[4:6],)})
    )[0]
    assert stopped.tokens == free.tokens[: text.index(text[4:6]) + 2]


@pytest.mark.parametrize("recompute", [True, False])
def test_swapped_weights_stamp_their_version(model, recompute):
    other = to_jax(random_state(model.config, seed=1))
    prompt = prompts(1, seed=10)[0]
    ours = engine(model)
    request = ours.submit(prompt, SAMPLED)
    while len(request.tokens) < 5:
        ours.step()
    before = len(request.tokens)
    ours.set_weights(other, recompute=recompute)
    late = ours.submit(prompt, SAMPLED)
    while not ours.idle:
        ours.step()
    assert request.versions == [0] * before + [1] * (12 - before)
    fresh = engine(nnx.merge(ours.graphdef, other))
    # shares nothing that older weights computed
    assert late.tokens == fresh.generate([prompt], SAMPLED)[0].tokens
    if recompute:
        logprobs = jax.nn.log_softmax(
            nnx.merge(ours.graphdef, other)(jnp.asarray([request.sequence]))[0], axis=-1
        )
        expected = [
            float(logprobs[len(prompt) - 1 + i, request.tokens[i]]) for i in range(before, 12)
        ]
        np.testing.assert_allclose(request.logprobs[before:], expected, atol=1e-4)
    assert_all_returned(ours)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt of 0 tokens: must be 1..63"),
        ([1] * 64, {}, "prompt of 64 tokens"),
        ([64], {}, "token 64, valid are 0..63"),
        ([-1], {}, "token -1"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"top_k": -2}, "top_k=-2"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"stop_strings": ("",)}, "empty string"),
    ],
)
def test_bad_requests_name_what_is_wrong(model, prompt, params, message):
    ours = engine(model)
    with pytest.raises(ValueError, match=message):
        ours.submit(prompt, SamplingParams(**{"max_new_tokens": 4} | params))
    assert ours.idle
