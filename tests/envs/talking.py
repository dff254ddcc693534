"""A model of random weights that mostly writes plain text, and often ends a turn."""

import numpy as np
from flax import nnx

from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from glm_jax import hf
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
