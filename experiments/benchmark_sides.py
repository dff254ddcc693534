"""The two sides of the benchmarks, ours and transformers' + torch's: one training step, and
generation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax.hf.config import config_to_hf
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.infer.sampling import SamplingParams
from glm_jax.model.transformer import GLM
from glm_jax.sharding import make_mesh
from glm_jax.train.state import TrainSpec
from glm_jax.train.step import StepScalars, compile_step

LEARNING_RATE = 1e-3


def batch_tokens(run):
    """The same random tokens for both sides, [B, L + 1]."""
    shape = (run.data.batch_size, run.data.sequence_length + 1)
    return np.random.default_rng(0).integers(0, run.model.vocab_size, shape).astype(np.int32)


def ours(run, optimizer: str):
    """A function that runs one step of our training step and returns its loss."""
    spec = TrainSpec.create(
        run.model, dataclasses.replace(run.optimizer, name=optimizer, max_grad_norm=0.0)
    )
    mesh = make_mesh(run.mesh)
    tokens = batch_tokens(run)[None]
    positions = jnp.broadcast_to(jnp.arange(run.data.sequence_length), tokens[..., 1:].shape)
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "positions": positions}
    batch |= {
        "segment_ids": jnp.ones_like(positions),
        "loss_weights": jnp.ones(positions.shape, jnp.float32),
    }
    scalars = StepScalars(
        jnp.int32(1),
        jnp.float32(LEARNING_RATE),
        jnp.float32(0),
        jnp.float32(run.schedule.bias_rate),
    )
    step = compile_step(spec, run.schedule.balance_weight, mesh)
    state = spec.create_state(mesh, run.loop.seed)

    def one():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch, scalars)
        jax.block_until_ready(state)
        return float(metrics["cross_entropy"])

    return one


def their_model(run):
    """transformers' Glm4MoeForCausalLM of the same shape, float32, SDPA attention."""
    import torch
    import transformers

    torch.manual_seed(run.loop.seed)
    config = transformers.Glm4MoeConfig(**config_to_hf(run.model, "float32"))
    config._attn_implementation = "sdpa"
    return transformers.Glm4MoeForCausalLM(config).float()


def theirs(run):
    """The same for transformers' Glm4MoeForCausalLM, SDPA attention, torch's fused AdamW."""
    import torch

    model = their_model(run).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(run.optimizer.adam_b1, run.optimizer.adam_b2),
        eps=run.optimizer.adam_eps,
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


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts and how many tokens to sample after each."""

    prompts: list[list[int]]
    new_tokens: list[int]


def our_generation(run, work: Workload, *, rows: int, drafts: int = 0, continuous: bool = True):
    """A function that answers the whole workload with an engine of `rows` rows."""
    page_size = 16
    context = max(len(p) + n for p, n in zip(work.prompts, work.new_tokens, strict=True)) + 1
    config = EngineConfig(
        context=context, num_rows=rows, page_size=page_size,
        num_pages=rows * -(-(context + drafts) // page_size),
        prefill_chunk=128, min_rows=1, min_chunk=1,
        decode_steps=16, draft_tokens=drafts, weights="compute", cache_dtype="compute",
        keep_experts=False,
    )  # fmt: skip
    engine = Engine(GLM(run.model, rngs=nnx.Rngs(run.loop.seed)), config)
    params = [SamplingParams(max_new_tokens=n, temperature=0) for n in work.new_tokens]
    size = len(params) if continuous else rows

    def answer():
        for pool in engine.pools:
            pool.forget_all()  # else the second round finds its prompts computed
        for start in range(0, len(params), size):
            engine.generate(work.prompts[start : start + size], params[start : start + size])

    return answer


def their_generation(run, work: Workload, size: int):
    """The same in batches of `size`, requests of similar length together, padded on the left; each
    as long as its longest.
    """
    import torch

    model = their_model(run).eval()
    order = sorted(range(len(work.prompts)), key=lambda i: work.new_tokens[i])
    batches = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        longest = max(len(work.prompts[i]) for i in chosen)
        padded = [[0] * (longest - len(work.prompts[i])) + work.prompts[i] for i in chosen]
        mask = [[0] * (longest - len(work.prompts[i])) + [1] * len(work.prompts[i]) for i in chosen]
        batches.append(
            (torch.tensor(padded), torch.tensor(mask), max(work.new_tokens[i] for i in chosen))
        )

    def answer():
        with torch.no_grad():
            for tokens, mask, new_tokens in batches:
                model.generate(  # pyright: ignore[reportAttributeAccessIssue]  # its own protocol
                    tokens,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=new_tokens,
                    eos_token_id=None,
                    pad_token_id=0,
                )

    return answer
