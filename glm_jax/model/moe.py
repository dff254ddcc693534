"""Mixture of experts: sigmoid router with a loss-free correction bias, routed and shared experts
(docs/glm45.md, "Router").
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.config import ModelConfig
from glm_jax.model.layers import MLP, InStack, Matrix, normal, param
from glm_jax.sharding import by_device, split_over
from pallas_kernels.moe_dispatch.api import routed_ffn
from pallas_kernels.moe_dispatch.exchange import Exchange, routed_exchange


class RouterBias(nnx.Variable):
    """e_score_correction_bias: state of the balancing rule, not a parameter; float32 [E], no
    gradient, no weight decay.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RouterObservation:
    """What a router saw and chose.

    expert_counts: tokens of each expert, int32 [E]; balance_loss: summed over tokens; both without
    padding.
    experts: the choice itself, int32 [B, L, K].
    """

    expert_counts: jax.Array
    balance_loss: jax.Array
    experts: jax.Array


class Router(nnx.Module):
    """Scores in float32; the bias changes which experts are chosen, never their weights."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.weight = param(
            rngs, (config.hidden_size, config.num_experts), ("embed", "router"), normal(config)
        )
        self.e_score_correction_bias = RouterBias(
            jnp.zeros(config.num_experts, jnp.float32), axes=("router",)
        )

    def __call__(
        self, x_BLD: jax.Array, replay_BLK: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scores [B, L, E], chosen experts [B, L, K] and their weights [B, L, K], float32.

        replay_BLK: experts to take instead of the best ones, with the weights that the scores give
        them; -1: no such wish.
        """
        logits = jnp.einsum(
            "bld,de->ble",
            x_BLD.astype(jnp.float32),
            self.weight[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        scores_BLE = jax.nn.sigmoid(logits)
        biased = jax.lax.stop_gradient(scores_BLE + self.e_score_correction_bias[...])
        expert_BLK = jax.lax.top_k(self.within_groups(biased), self.config.num_experts_per_token)[1]
        if replay_BLK is not None:
            expert_BLK = jnp.where(replay_BLK < 0, expert_BLK, replay_BLK)
        weights = jnp.take_along_axis(scores_BLE, expert_BLK, axis=-1)
        if self.config.norm_topk_prob:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return scores_BLE, expert_BLK, weights * self.config.routed_scaling_factor

    def within_groups(self, biased_BLE: jax.Array) -> jax.Array:
        """-inf outside the chosen groups; a group's score is the sum of its two best biased
        scores.
        """
        groups, chosen = self.config.num_expert_groups, self.config.num_groups_per_token
        if chosen == groups:
            return biased_BLE
        grouped = biased_BLE.reshape(*biased_BLE.shape[:-1], groups, -1)
        group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        kept = jax.nn.one_hot(jax.lax.top_k(group_scores, chosen)[1], groups, dtype=bool).any(
            axis=-2
        )
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(biased_BLE.shape)


def observe(
    scores_BLE: jax.Array, expert_BLK: jax.Array, segment_ids_BL: jax.Array
) -> RouterObservation:
    """Expert counts and the sequence balance loss of DeepSeek-V3 (eq. 17-20), every document a
    sequence of its own.

    The loss of a document is sum_e f_e P_e with f_e = E / (K L) * tokens that chose e and P_e =
    mean over its L tokens of s_e / sum s. Documents are weighted by their tokens, so what is
    returned is sum over tokens t and experts e of f_{doc(t), e} * p_{t, e}; divided by the number
    of tokens it is DeepSeek's mean where all sequences are equally long.
    """
    num_experts, per_token = scores_BLE.shape[-1], expert_BLK.shape[-1]
    real_BL = segment_ids_BL > 0
    chosen_BLE = (
        jnp.sum(jax.nn.one_hot(expert_BLK, num_experts, dtype=jnp.float32), axis=-2)
        * real_BL[..., None]
    )
    # By device: of the scatter of the global batch every device would hold the whole result.
    wide, narrow = ("batch", None, None), ("batch", None)
    counts_BLE = by_device(_document_counts, (wide, narrow), wide)(chosen_BLE, segment_ids_BL)
    tokens_BL = jnp.maximum(jnp.sum(counts_BLE, axis=-1) / per_token, 1)
    fraction_BLE = jax.lax.stop_gradient(
        counts_BLE * num_experts / (per_token * tokens_BL[..., None])
    )
    prob_BLE = scores_BLE / jnp.sum(scores_BLE, axis=-1, keepdims=True)
    return RouterObservation(
        expert_counts=jnp.sum(chosen_BLE, axis=(0, 1)).astype(jnp.int32),
        balance_loss=jnp.sum(fraction_BLE * prob_BLE * real_BL[..., None]),
        experts=expert_BLK,
    )


def _document_counts(chosen_BLE, segment_ids_BL):
    """For each token, tokens of its document that chose each expert, [B, L, E]."""
    batch, length, num_experts = chosen_BLE.shape
    row = jnp.arange(batch)[:, None]
    counts = (
        jnp.zeros((batch, length + 1, num_experts), jnp.float32)
        .at[row, segment_ids_BL]
        .add(chosen_BLE)
    )
    return counts[row, segment_ids_BL]


class Experts(nnx.Module):
    """The routed experts' SwiGLU feed-forwards, stacked: [E, D, F] and [E, F, D]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        experts, width, ffn = config.num_experts, config.hidden_size, config.expert_ffn_size
        self.gate_proj = param(
            rngs, (experts, width, ffn), ("experts", "embed", "mlp"), normal(config), Matrix
        )
        self.up_proj = param(
            rngs, (experts, width, ffn), ("experts", "embed", "mlp"), normal(config), Matrix
        )
        self.down_proj = param(
            rngs, (experts, ffn, width), ("experts", "mlp", "embed"), normal(config), Matrix
        )

    def __call__(
        self, x_BLD: jax.Array, expert_BLK: jax.Array, weights_BLK: jax.Array
    ) -> jax.Array:
        """Weighted sum of each token's experts, [B, L, D]. An expert index of E means: none
        (padding).
        """
        matrices = [w.get_value() for w in (self.gate_proj, self.up_proj, self.down_proj)]
        # quantised ones stay as they are
        matrices = [w.astype(x_BLD.dtype) if isinstance(w, jax.Array) else w for w in matrices]
        over, rows = split_over("experts"), ("batch",)
        if len(over) > 1:
            raise ValueError(f"rules: experts over {over}; they are exchanged over one mesh axis")
        run = functools.partial(self.local, axis=over[0] if over else None)
        run = by_device(run, (rows, rows, rows, *map(_placed, matrices)), rows)
        return run(x_BLD, expert_BLK, weights_BLK, *matrices)

    def local(
        self, x_bLD, expert_bLK, weights_bLK, gate_eDF, up_eDF, down_eFD, *, axis: str | None
    ) -> jax.Array:
        """One device's part. Over an expert axis rows travel to their experts and back
        (moe_dispatch.exchange), or, by all_gather, every token comes to every device, which applies
        the experts that live there, and the partial results are summed and scattered back. Dropless
        whatever the routing.
        """
        config, matrices = self.config, (gate_eDF, up_eDF, down_eFD)
        gather = axis is not None and config.expert_exchange == "all_gather"
        if gather:
            x_bLD, expert_bLK, weights_bLK = (
                jax.lax.all_gather(a, axis, axis=0, tiled=True)
                for a in (x_bLD, expert_bLK, weights_bLK)
            )
            expert_bLK = expert_bLK - jax.lax.axis_index(axis) * down_eFD.shape[0]
        x_TD, expert_TK, weights_TK = (
            a.reshape(-1, a.shape[-1]) for a in (x_bLD, expert_bLK, weights_bLK)
        )
        if axis is None or gather:
            y_TD = routed_ffn(
                x_TD, expert_TK, weights_TK, *matrices, implementation=config.grouped_matmul
            )
        else:
            exchange = Exchange(
                axis, config.expert_exchange, config.expert_buffer, config.grouped_matmul
            )
            y_TD = routed_exchange(x_TD, expert_TK, weights_TK, *matrices, exchange)
        y_bLD = y_TD.reshape(x_bLD.shape)
        return (
            jax.lax.psum_scatter(y_bLD, axis, scatter_dimension=0, tiled=True) if gather else y_bLD
        )


def _placed(w):
    """Logical axes of matrices [E, ...] in `local`, maybe quantised, or in a stack: a device has
    its experts whole.
    """
    if isinstance(w, InStack):
        axes = jax.tree.map(lambda _: ("layers", "experts"), w.stack)
        return dataclasses.replace(w, stack=axes, layer=())
    return ("experts",)


class MoE(nnx.Module):
    """y = sum of the chosen routed experts + the shared expert, both on the same normed input."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        shared = config.num_shared_experts * config.expert_ffn_size
        self.shared_experts = MLP(config, shared, rngs=rngs) if shared else None

    def __call__(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, replay_BLK=None
    ) -> tuple[jax.Array, RouterObservation]:
        scores_BLE, expert_BLK, weights_BLK = self.gate(x_BLD, replay_BLK)
        observation = observe(scores_BLE, expert_BLK, segment_ids_BL)
        expert_BLK = jnp.where(segment_ids_BL[..., None] > 0, expert_BLK, scores_BLE.shape[-1])
        y_BLD = self.experts(x_BLD, expert_BLK, weights_BLK)
        if self.shared_experts is not None:
            y_BLD = y_BLD + self.shared_experts(x_BLD)
        return y_BLD, observation
