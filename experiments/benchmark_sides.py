"""The two sides of experiments.benchmark: one training step of ours, one of transformers + torch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.hf_config import config_to_hf
from glm_jax.sharding import make_mesh
from glm_jax.train.state import Trainee
from glm_jax.train.step import Knobs, compile_step

LEARNING_RATE = 1e-3


def batch_tokens(run):
    """The same random tokens for both sides, [B, L + 1]."""
    shape = (run.data.batch_size, run.data.sequence_length + 1)
    return np.random.default_rng(0).integers(0, run.model.vocab_size, shape).astype(np.int32)


def ours(run, optimizer: str):
    """A function that runs one step of our training step and returns its loss."""
    trainee = Trainee.create(run.model, dataclasses.replace(run.optimizer, name=optimizer, max_grad_norm=0.0))
    mesh = make_mesh(run.mesh)
    tokens = batch_tokens(run)[None]
    positions = jnp.broadcast_to(jnp.arange(run.data.sequence_length), tokens[..., 1:].shape)
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "positions": positions}
    batch |= {"segment_ids": jnp.ones_like(positions), "loss_weights": jnp.ones(positions.shape, jnp.float32)}
    knobs = Knobs(jnp.int32(1), jnp.float32(LEARNING_RATE), jnp.float32(0), jnp.float32(run.schedule.bias_rate))
    step = compile_step(trainee, run.schedule.balance_weight, mesh)
    state = trainee.create_state(mesh, run.loop.seed)

    def one():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch, knobs)
        jax.block_until_ready(state)
        return float(metrics["cross_entropy"])

    return one


def theirs(run):
    """The same for transformers' Glm4MoeForCausalLM, SDPA attention, torch's fused AdamW."""
    import torch
    import transformers

    torch.manual_seed(run.loop.seed)
    config = transformers.Glm4MoeConfig(**config_to_hf(run.model, "float32"))
    config._attn_implementation = "sdpa"
    model = transformers.Glm4MoeForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(run.optimizer.adam_b1, run.optimizer.adam_b2), eps=run.optimizer.adam_eps,
        weight_decay=run.optimizer.weight_decay, fused=True,
    )  # fmt: skip
    tokens = torch.from_numpy(batch_tokens(run)).long()

    def one():
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return one
