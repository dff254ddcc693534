"""A model of random weights that mostly writes plain text, and often ends a turn; and the proof
that what was recorded of its rollouts is right.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from glm_jax import hf
from glm_jax.envs.worker import RolloutWorker
from glm_jax.infer.agreement import training_forward
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from tests.model.oracle import random_state, tiny_config, to_jax


def talking_model(tokenizer: Tokenizer):
    """A constant in the embeddings and the head is a bias of the logits."""
    config = tiny_config(vocab_size=320, max_length=256)
    state = random_state(config)
    bias = np.zeros(320)
    bias[[tokenizer.special(name) for name in SPECIAL_TOKENS]] = -14.0
    bias[tokenizer.special("<|user|>")] = 10.0
    for path, variable in nnx.to_flat_state(state):
        if path == ("embed_tokens", "weight"):
            variable.set_value(variable.get_value() + 2.0)
        if path == ("lm_head", "weight"):
            width = variable.get_value().shape[0]
            variable.set_value(variable.get_value() + bias / width)
    return nnx.merge(nnx.graphdef(hf.abstract_model(config)), to_jax(state))


def talking_worker(model, tokenizer: Tokenizer) -> RolloutWorker:
    config = EngineConfig(
        context=192, num_rows=8, page_size=8, num_pages=192, prefill_chunk=16, decode_steps=4,
        draft_tokens=0, weights="compute", cache_dtype="compute", keep_experts=True, min_rows=8,
        min_chunk=16,
    )  # fmt: skip
    return RolloutWorker(Engine(model, config, tokenizer.decode), tokenizer)


def assert_equal_to_a_replay(rollouts, model):
    """Log-probabilities and experts equal those of the training forward over the whole rollout."""
    graphdef, state = nnx.split(model)
    for rollout in (r for r in rollouts if r.num_sampled):
        tokens = rollout.tokens[None]
        logprobs, experts = training_forward(graphdef, state, tokens, jnp.ones_like(tokens))
        sampled = rollout.mask[1:]
        np.testing.assert_allclose(
            rollout.logprobs[1:][sampled], np.asarray(logprobs)[0][sampled], atol=2e-4
        )
        assert not rollout.logprobs[1:][~sampled].any()
        theirs = np.sort(np.asarray(experts)[:, 0].swapaxes(0, 1)[:-1], axis=-1)
        np.testing.assert_array_equal(np.sort(rollout.experts, axis=-1), theirs)
