"""One GRPO update: a pure function of (state, batch of rollouts, scalars)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glm_jax import losses
from glm_jax.config import ModelConfig
from glm_jax.losses import LOSS_CHUNK
from glm_jax.rl.batch import PolicyBatch, TokenInputs
from glm_jax.rl.config import GrpoConfig
from glm_jax.sharding import constrain
from glm_jax.train.state import TrainSpec, TrainState, build_model
from glm_jax.train.step import accumulate, jit_step, update

# Log-ratios beyond it are taken as it: exp of 89 is infinite in float32, and infinity times 0 in a
# gradient is not a number.
MAX_LOG_RATIO = 20.0
# of tokens, weighted as the loss is
SUMS = ("entropy", "clip_share", "importance", "importance_capped", "difference")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PolicyScalars:
    """Scalars of one update, traced: changing them compiles nothing."""

    microbatches: jax.Array
    learning_rate: jax.Array
    temperature: jax.Array  # that the rollouts were sampled with


def token_loss(grpo: GrpoConfig, logprobs, inputs: TokenInputs):
    """-w c min(r A, clip(r, 1 - low, 1 + high) A) of each token: r = pi / pi_old, c = min(pi_old /
    pi_engine, cap), w its weight.

    Where inputs have no old_logprobs, and the engine's are not taken, the weights are those of the
    step's beginning: r = 1, and only its gradient counts.
    """
    ratio, correction = ratios(grpo, logprobs, inputs)
    clipped = jnp.clip(ratio, 1 - grpo.clip_low, 1 + grpo.clip_high)
    gain = jnp.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    return -inputs.loss_weights * correction * gain


def ratios(grpo: GrpoConfig, logprobs, inputs: TokenInputs):
    """pi / pi_old, and the truncated importance weight of pi_old over the engine's distribution (1
    where it is off); no gradient flows through the second. Both 1 where the loss mask is 0. Their
    logarithms are clamped to +-MAX_LOG_RATIO.
    """
    trained = inputs.loss_weights > 0
    exp = lambda x: jnp.exp(jnp.clip(jnp.where(trained, x, 0.0), -MAX_LOG_RATIO, MAX_LOG_RATIO))
    old = jax.lax.stop_gradient(logprobs) if inputs.old_logprobs is None else inputs.old_logprobs
    if grpo.old_logprobs == "engine":
        old = inputs.engine_logprobs
    ratio = exp(logprobs - old)
    if grpo.importance_cap == 0:
        return ratio, jnp.ones_like(ratio)
    weight = exp(old - inputs.engine_logprobs)
    return ratio, jax.lax.stop_gradient(jnp.minimum(weight, grpo.importance_cap))


def loss_function(
    spec: TrainSpec, grpo: GrpoConfig, params, router, batch: PolicyBatch, tokens, temperature
):
    """Loss of one microbatch [B, L], a part of the whole update's, and what it observed: `policy`,
    `balance`, `mtp` (before weights), `expert_counts`, the sums of SUMS and `difference_max`.
    tokens: real ones of the whole update.
    """
    model = build_model(spec.config, params, router)
    out = model.trunk(batch.tokens, batch.segment_ids, batch.positions, replay=batch.experts)
    # The head is linear: states over the temperature give logits over the temperature.
    h = out.h / temperature.astype(out.h.dtype)
    policy, (logprobs, entropy) = losses.chunked_token_loss(
        functools.partial(token_loss, grpo), h, model.lm_head.weight[...], batch.targets,
        batch.inputs, LOSS_CHUNK, True,
    )  # fmt: skip
    aux, loss = {"policy": policy}, policy
    mtp_h = jax.lax.stop_gradient(out.h) if grpo.mtp_weight > 0 else None
    more = losses.auxiliary(model, out, mtp_h, batch.rows)
    if more.mtp is not None:
        aux["mtp"] = more.mtp
        loss += grpo.mtp_weight * aux["mtp"]
    if more.balance is not None and more.expert_counts is not None:
        aux["balance"] = more.balance / tokens
        loss += grpo.balance_weight * aux["balance"]
        # An MTP block that is left out chose no experts, and its biases stay.
        missing = spec.config.num_routers - len(more.expert_counts)
        aux["expert_counts"] = jnp.pad(more.expert_counts, ((0, missing), (0, 0)))
    return loss, aux | observe(grpo, logprobs, entropy, batch.inputs)


def observe(grpo: GrpoConfig, logprobs, entropy, inputs: TokenInputs) -> dict[str, jax.Array]:
    """The sums of SUMS, and the largest difference to the engine's log-probabilities."""
    weights, advantages = inputs.loss_weights, inputs.advantages
    ratio, correction = ratios(grpo, logprobs, inputs)
    clipped = jnp.where(advantages > 0, ratio > 1 + grpo.clip_high, ratio < 1 - grpo.clip_low) & (
        advantages != 0
    )
    # of the weights at the step's beginning, in its first update
    before = logprobs if inputs.old_logprobs is None else inputs.old_logprobs
    difference = jnp.where(weights > 0, jnp.abs(before - inputs.engine_logprobs), 0.0)
    capped = (correction >= grpo.importance_cap) if grpo.importance_cap else jnp.zeros_like(clipped)
    sums = zip(SUMS, (entropy, clipped, correction, capped, difference), strict=True)
    return {name: jnp.sum(weights * x) for name, x in sums} | {
        "difference_max": jnp.max(difference)
    }


def policy_step(
    spec: TrainSpec, grpo: GrpoConfig, state: TrainState, batch: PolicyBatch, scalars: PolicyScalars
) -> tuple[TrainState, dict]:
    """Gradients, clipping, optimizer, router biases. Returns the new state and metrics: those of
    loss_function and `update`, `loss`.
    """
    batch = place(batch)
    live = jnp.arange(len(batch.tokens))[:, None, None] < scalars.microbatches
    tokens = jnp.maximum(jnp.sum(live & (batch.segment_ids > 0)), 1)
    loss = lambda params, part: loss_function(
        spec, grpo, params, state.router, part, tokens, scalars.temperature
    )
    (total, aux), grads = accumulate(loss, state.params, batch, scalars.microbatches)
    state, metrics = update(
        spec,
        state,
        grads,
        aux.get("expert_counts"),
        scalars.learning_rate,
        jnp.float32(grpo.bias_rate),
    )
    return state, {"loss": total, **aux, **metrics}


def place(batch: PolicyBatch) -> PolicyBatch:
    """The batch's arrays where the mesh wants their rows."""
    rows = lambda x: constrain(x, None, "batch", "length")
    of_experts = lambda x: constrain(x, None, None, "batch", "length", None)
    placed = jax.tree.map(rows, dataclasses.replace(batch, experts=None))
    return dataclasses.replace(placed, experts=jax.tree.map(of_experts, batch.experts))


def compile_policy_step(spec: TrainSpec, grpo: GrpoConfig, mesh: Mesh):
    """The jitted policy_step(state, batch, scalars); donates the state. Call it under
    jax.set_mesh.
    """
    return jit_step(functools.partial(policy_step, spec, grpo), spec, mesh)


@functools.partial(jax.jit, static_argnums=0)
def trainer_logprobs(
    config: ModelConfig, params, router, batch, microbatches, temperature
) -> jax.Array:
    """Log-probabilities of the targets under the trainer's weights, float32 [A, B, L], 0 after the
    first `microbatches`: what several updates a step start from.
    """
    batch = place(batch)

    def one(part):
        model = build_model(config, params, router)
        out = model.trunk(part.tokens, part.segment_ids, part.positions, replay=part.experts)
        zero = lambda logprobs, _: jnp.zeros_like(logprobs)
        h = out.h / temperature.astype(out.h.dtype)
        return losses.chunked_token_loss(
            zero, h, model.lm_head.weight[...], part.targets, (), LOSS_CHUNK, True
        )[1][0]

    def fill(i, filled):
        return filled.at[i].set(one(jax.tree.map(lambda x: x[i], batch)))

    return jax.lax.fori_loop(0, microbatches, fill, jnp.zeros(batch.targets.shape, jnp.float32))
