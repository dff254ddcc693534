"""One training step: a pure function of (state, batch, scalars of the schedule)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from glm_jax import losses
from glm_jax.losses import LOSS_CHUNK
from glm_jax.optim.optimizer import group_rms
from glm_jax.optim.schedules import ScheduleValues
from glm_jax.sharding import constrain
from glm_jax.train.state import TrainSpec, TrainState, build_model


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StepScalars:
    """Scalars of one step, traced: changing them compiles nothing."""

    microbatches: jax.Array
    learning_rate: jax.Array
    mtp_weight: jax.Array
    bias_rate: jax.Array

    @classmethod
    def of(cls, point: ScheduleValues) -> StepScalars:
        floats = (jnp.float32(v) for v in (point.learning_rate, point.mtp_weight, point.bias_rate))
        return cls(jnp.int32(point.microbatches), *floats)


def loss_function(
    spec: TrainSpec, params, router, batch, totals, scalars: StepScalars, balance_weight: float
):
    """Loss of one microbatch [B, L], already divided by the totals of the whole step, and what it
    observed.

    Returns (loss, aux): aux holds `cross_entropy`, `mtp`, `balance` (each divided likewise, before
    weights) and `expert_counts` int32 [routers, E], the MTP router last.
    """
    model = build_model(spec.config, params, router)
    out = model.trunk(batch["tokens"], batch["segment_ids"], batch["positions"])
    total_cross_entropy = losses.chunked_cross_entropy(
        out.h, model.lm_head.weight[...], batch["targets"], batch["loss_weights"], LOSS_CHUNK
    )
    aux = {"cross_entropy": total_cross_entropy / totals["targets"]}
    loss, more = aux["cross_entropy"], losses.auxiliary(model, out, out.h, batch)
    if more.mtp is not None:
        aux["mtp"] = more.mtp / totals["mtp_targets"]
        loss += scalars.mtp_weight * aux["mtp"]
    if more.balance is not None:
        aux["balance"] = more.balance / totals["tokens"]
        aux["expert_counts"] = more.expert_counts
        loss += balance_weight * aux["balance"]
    return loss, aux


def step_totals(batch, microbatches) -> dict[str, jax.Array]:
    """Tokens, weighted targets and MTP targets of the step's first `microbatches` microbatches;
    batch arrays [A, B, L].
    """
    live = jnp.arange(batch["tokens"].shape[0])[:, None, None] < microbatches
    count = lambda x: jnp.maximum(jnp.sum(jnp.where(live, x, 0).astype(jnp.float32)), 1.0)
    return {
        "tokens": count(batch["segment_ids"] > 0),
        "targets": count(batch["loss_weights"]),
        "mtp_targets": count(jax.vmap(losses.mtp_targets)(batch)[1]),
    }


def gradients(
    spec: TrainSpec, state: TrainState, batch, scalars: StepScalars, balance_weight: float
):
    """((loss, aux), gradients) summed over the microbatches of a step; batch arrays [A, B, L], the
    first `microbatches` count.
    """
    batch = {name: constrain(x, None, "batch", "length") for name, x in batch.items()}
    totals = step_totals(batch, scalars.microbatches)
    loss = lambda params, part: loss_function(
        spec, params, state.router, part, totals, scalars, balance_weight
    )
    return accumulate(loss, state.params, batch, scalars.microbatches)


def accumulate(loss, params, batch, microbatches):
    """((loss, aux), gradients) of loss(params, microbatch) -> (loss, aux), summed over the first
    `microbatches` of the arrays [A, ...].
    """
    grad_function = jax.value_and_grad(loss, has_aux=True)

    def one(index):
        return grad_function(params, jax.tree.map(lambda x: x[index], batch))

    if len(jax.tree.leaves(batch)[0]) == 1:
        return one(0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
    return jax.lax.fori_loop(
        0, microbatches, lambda i, total: jax.tree.map(jnp.add, total, one(i)), zeros
    )


def train_step(
    spec: TrainSpec, balance_weight: float, state: TrainState, batch, scalars: StepScalars
) -> tuple[TrainState, dict]:
    """Gradients, clipping, optimizer, router biases from global counts.

    Returns the new state and metrics: `loss`, `cross_entropy`, `mtp`, `balance`, `expert_counts`
    [routers, E] and those of `update`.
    """
    (loss, aux), grads = gradients(spec, state, batch, scalars, balance_weight)
    state, metrics = update(
        spec, state, grads, aux.get("expert_counts"), scalars.learning_rate, scalars.bias_rate
    )
    return state, {"loss": loss, **aux, **metrics}


def update(
    spec: TrainSpec, state: TrainState, grads, expert_counts_RE, learning_rate, bias_rate
) -> tuple[TrainState, dict]:
    """Clips and applies gradients, and moves the router biases (expert counts of None: a dense
    model).

    Returns the new state and metrics: `grad_norm`, `grad_rms/<group>`, `update_rms/<group>`
    (learning rate included), and `param_norm` of the new parameters and router biases. Where one of
    them is not finite, the new state must not be used.
    """
    metrics = {"grad_norm": optax.tree.norm(grads)}
    metrics |= {f"grad_rms/{group}": rms for group, rms in group_rms(grads, spec.groups).items()}
    if spec.max_grad_norm > 0:
        factor = jnp.minimum(1.0, spec.max_grad_norm / (metrics["grad_norm"] + 1e-12))
        grads = jax.tree.map(lambda g: g * factor, grads)
    updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: -learning_rate * u, updates)
    metrics |= {
        f"update_rms/{group}": rms for group, rms in group_rms(updates, spec.groups).items()
    }
    router = state.router
    if expert_counts_RE is not None:
        router = map_routers(
            lambda bias_RE: losses.update_router_bias(bias_RE, expert_counts_RE, bias_rate), router
        )
    params = optax.apply_updates(state.params, updates)
    metrics["param_norm"] = optax.tree.norm((params, router))
    return TrainState(state.step + 1, params, router, opt_state), metrics


def map_routers(function, router):
    """Applies a function of all biases [routers, E] (the registry: trunk layers in order, then MTP)
    to the tree of biases.
    """
    leaves, treedef = jax.tree.flatten(router)  # keys in order: moe_layers, mtp
    rows = [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves]
    table = function(jnp.concatenate(rows))
    sizes = [len(r) for r in rows]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [
        table[start : start + size].reshape(leaf.shape)
        for start, size, leaf in zip(starts, sizes, leaves, strict=True)
    ]
    return treedef.unflatten(parts)


def compile_step(spec: TrainSpec, balance_weight: float, mesh: Mesh):
    """The jitted step; donates the state, and returns it placed as it came. Call it under
    jax.set_mesh.
    """
    return jit_step(functools.partial(train_step, spec, balance_weight), spec, mesh)


def jit_step(step, spec: TrainSpec, mesh: Mesh):
    """A function (state, ...) -> (state, metrics), compiled as compile_step says."""
    placed = jax.tree.map(lambda x: x.sharding, spec.abstract_state(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
