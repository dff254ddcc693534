"""What a request may ask of sampling, in an engine, against the same by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.infer.sampling import (
    MAX_STOP_TOKENS,
    LogitChanges,
    RowParams,
    SamplingParams,
    sampling_logits,
)
from tests.infer.engine_test import assert_all_returned, engine, model, prompts  # noqa: F401

VOCAB = 64
SIZES = {"min_rows": 4, "num_rows": 4, "min_chunk": 8}
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)


@dataclasses.dataclass(frozen=True)
class Sequences:
    """A constraint: the output is one of some sequences. As the tokenizer of a released model, it
    knows fewer tokens than the model.
    """

    sequences: tuple[tuple[int, ...], ...]
    breaks: bool = False

    def start(self):
        return Following(self)


class Following:
    def __init__(self, constraint):
        self.constraint, self.tokens = constraint, ()

    @property
    def left(self):
        return [
            s[len(self.tokens) :]
            for s in self.constraint.sequences
            if s[: len(self.tokens)] == self.tokens
        ]

    @property
    def finished(self):
        return not any(self.left)

    def mask(self):
        mask = np.zeros(1, np.uint32)
        for sequence in self.left:
            mask[0] |= np.uint32(1 << sequence[0])
        return mask

    def accept(self, token):
        self.tokens += (token,)
        assert self.left, "a token that the mask forbids"
        if self.constraint.breaks and len(self.tokens) == 2:
            raise ValueError("too large")


def model_logits(model, tokens):  # noqa: F811
    return np.asarray(model(jnp.asarray([tokens]))[0], np.float64)


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_features_side_by_side_in_one_batch(model, draft_tokens):  # noqa: F811
    """Each row gets what it asks for, and the rows that ask for nothing what they get alone."""
    ours = engine(model, draft_tokens=draft_tokens, **SIZES)
    prompt = prompts(1, seed=20, longest=20)[0]
    free = SamplingParams(max_new_tokens=8, seed=3)
    expected = ours.generate([prompt], free)[0]
    allowed = ((5, 6, 7, 8, 9, 10), (5, 7, 1), (31, 2))
    asked = [
        free,
        SamplingParams(max_new_tokens=8, seed=1, constraint=Sequences(allowed), top_logprobs=3),
        dataclasses.replace(GREEDY, logit_bias=((11, 1000.0), (12, 1000.5))),
        dataclasses.replace(
            GREEDY, logit_bias=((11, 1000.0), (12, 1000.5)), presence_penalty=100.0
        ),
    ]
    plain, bound, biased, penalised = ours.generate([prompt] * 4, asked)
    assert (plain.tokens, plain.top_logprobs) == (expected.tokens, [])
    assert tuple(bound.tokens) in allowed
    assert bound.finish_reason == "stop"
    assert biased.tokens == [12] * 8
    assert penalised.tokens[:2] == [12, 11]
    for request in (bound, biased):  # log-probabilities are the model's own
        logprobs = jax.nn.log_softmax(model_logits(model, request.sequence))[len(prompt) - 1 :]
        np.testing.assert_allclose(
            request.logprobs, [logprobs[i, t] for i, t in enumerate(request.tokens)], atol=1e-4
        )
    for place, top in enumerate(bound.top_logprobs):
        best = np.argsort(
            -jax.nn.log_softmax(model_logits(model, bound.sequence))[len(prompt) - 1 + place]
        )[:3]
        assert [token for token, _ in top] == best.tolist()
    assert_all_returned(ours)


def test_a_paused_request_goes_on_in_its_constraint(model):  # noqa: F811
    ours, sequence = engine(model, **SIZES), tuple(range(3, 15))
    request = ours.submit(
        [1, 2], SamplingParams(max_new_tokens=40, constraint=Sequences((sequence,)))
    )
    while request.status != "finished":
        ours.step()
        ours.pause(request)
        ours.resume(request)
    assert (tuple(request.tokens), request.finish_reason) == (sequence, "stop")


def test_a_constraint_that_fails_ends_its_request_alone(model):  # noqa: F811
    ours = engine(model, **SIZES)
    broken = SamplingParams(max_new_tokens=8, constraint=Sequences(((1, 2, 3),), breaks=True))
    one, other = ours.generate([[1], [2]], [broken, GREEDY])
    assert (one.tokens, one.finish_reason) == ([1, 2], "abort")
    assert (len(other.tokens), other.finish_reason) == (8, "length")
    assert_all_returned(ours)


def test_log_probabilities_of_the_prompt(model):  # noqa: F811
    ours = engine(model, **SIZES)
    prompt = prompts(1, seed=21)[0][:5] + list(range(20))  # longer than a chunk, with full pages
    asked = SamplingParams(
        max_new_tokens=2,
        temperature=0,
        prompt_logprobs=True,
        top_logprobs=2,
        logprob_temperature=0.5,
    )
    other = ours.generate([prompt], GREEDY)[0]
    first = ours.submit(prompt, asked)
    ours.step()
    ours.pause(first)  # in the middle of its prompt
    assert first.unscored
    ours.resume(first)
    second, single = ours.generate([prompt, [7]], asked)
    expected = np.asarray(jax.nn.log_softmax(model_logits(model, prompt) / 0.5))
    for request in (first, second):
        assert request.prompt_logprobs[0] is request.prompt_top_logprobs[0] is None
        np.testing.assert_allclose(
            request.prompt_logprobs[1:],
            [expected[i, t] for i, t in enumerate(prompt[1:])],
            atol=1e-4,
        )
        for place, top in enumerate(request.prompt_top_logprobs[1:]):
            assert [t for t, _ in top] == np.argsort(-expected[place])[:2].tolist()
            np.testing.assert_allclose(
                [x for _, x in top], -np.sort(-expected[place])[:2], atol=1e-4
            )
        assert request.tokens == other.tokens[:2]
    assert (single.prompt_logprobs, single.prompt_top_logprobs) == ([None], [None])
    assert other.prompt_logprobs == []
    assert_all_returned(ours)


def test_penalties_are_those_of_openai_and_vllm():
    """Bias, then repetition over prompt and output, then frequency and presence over the output."""
    padded = lambda *tokens: jnp.asarray([[*tokens] + [6] * (4 - len(tokens))])
    one = lambda x: jnp.asarray([x], jnp.float32)
    changes = LogitChanges(
        padded(0, 1), padded(2, 2, 3), one(0.25), one(0.5), one(2.0), padded(4, 5),
        jnp.asarray([[1.0, -3.0, 9, 9]]),
        jnp.asarray([[0b101111]], jnp.uint32),
    )  # fmt: skip
    logits = jnp.asarray([[[3.0, -3.0, 4.0, -4.0, 1.0, 1.0]]])
    found = changes.apply(logits, changes.counts(6)[:, None])
    assert found.tolist() == [
        [[1.5, -6.0, 2.0 - 1.0 - 0.25, -8.0 - 0.5 - 0.25, -float("inf"), -2.0]]
    ]


@pytest.mark.parametrize(("changes", "kept"), [
    ({"min_p": 0.2}, [0, 1, 2]), ({"min_p": 0.5}, [0, 1]), ({"min_p": 1.0}, [0]),
    ({"min_p": 0.2, "top_k": 2}, [0, 1]),
    ({"min_p": 0.2, "top_p": 0.5}, [0]), ({"min_p": 0.5, "temperature": 4.0}, [0, 1, 2, 3]),
    ({"min_p": 0.9, "temperature": 0.0}, [0]),
])  # fmt: skip
def test_min_p(changes, kept):
    params = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | changes
    one = {
        name: jnp.asarray([value], jnp.int32 if name == "top_k" else jnp.float32)
        for name, value in params.items()
    }
    rows = RowParams(
        **one,
        key_words=jnp.zeros((1, 3), jnp.uint32),
        stop_tokens=jnp.full((1, MAX_STOP_TOKENS), -1),
        logprob_temperature=jnp.ones(1),
    )
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    assert np.flatnonzero(np.isfinite(sampling_logits(logits, rows)[0])).tolist() == kept


@pytest.mark.parametrize(("changes", "message"), [
    ({"min_p": 1.5}, "min_p=1.5"), ({"presence_penalty": float("nan")}, "presence_penalty=nan"),
    ({"frequency_penalty": float("inf")}, "frequency_penalty=inf"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ({"seed": 2**63}, "seed=9223372036854775808"), ({"sample_index": -1}, "sample_index=-1"),
    ({"top_logprobs": 21}, "top_logprobs=21"),
    ({"logit_bias": ((1, float("nan")),)}, "logit_bias=nan of token 1"),
    ({"logit_bias": ((1, 0.0),) * 301}, "301 tokens in logit_bias"),
    ({"logit_bias": ((64, 1.0),)}, "logit_bias holds token 64, valid are 0..63"),
    ({"constraint": Sequences(((1, 2),), breaks=True), "max_new_tokens": 0}, "max_new_tokens=0"),
])  # fmt: skip
def test_bad_parameters_are_named(model, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        engine(model).submit([1], SamplingParams(**{"max_new_tokens": 4} | changes))
