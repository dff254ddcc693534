"""What a trained model does on a batch, layer by layer: attention entropy and expert load. For
looking, not for training.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.model.layers import rope_angles
from glm_jax.model.transformer import GLM, Layer
from pallas_kernels.attention.reference import allowed_pairs


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Inspection:
    """Means and counts over the tokens of a batch, padding left out. The MTP block, where there is
    one, is the last row.

    attention_entropy: nats, float32 [layers, N]; 0 where a head looks at one token only.
    uniform_entropy: nats, float32 scalar; the entropy of a head that spreads evenly over all that
    it may see.
    expert_counts: tokens of each expert, int32 [routers, E].
    """

    attention_entropy: jax.Array
    uniform_entropy: jax.Array
    expert_counts: jax.Array


def inspect_model(model: GLM, batch) -> Inspection:
    """batch: `tokens`, `targets` (which MTP embeds), `segment_ids`, `positions`, each int32 [B, L].
    Holds [B, N, L, L] once.
    """
    rows = {
        name: jnp.asarray(batch[name]) for name in ("tokens", "targets", "segment_ids", "positions")
    }
    return _inspect(*nnx.split(model), rows)


@functools.partial(jax.jit, static_argnums=0)
def _inspect(graphdef, state, rows) -> Inspection:
    model = nnx.merge(graphdef, state)
    segment_ids_BL, angles = rows["segment_ids"], rope_angles(model.config, rows["positions"])
    x_BLD = model.embed(model.embed_tokens, rows["tokens"])
    entropies, counts = [], []
    for layers in (model.dense_layers, model.moe_layers):
        if layers is not None:
            x_BLD, (entropy, observed) = _walk(layers, x_BLD, segment_ids_BL, angles)
            entropies.append(entropy)
            counts.append(observed)
    if model.mtp is not None:
        mtp = model.mtp
        embedding = model.embed(mtp.embed_tokens or model.embed_tokens, rows["targets"])
        x_BLD = mtp.eh_proj(
            jnp.concatenate([mtp.enorm(embedding), mtp.hnorm(model.norm(x_BLD))], axis=-1)
        )
        entropy, observed = _look(mtp.block, x_BLD, segment_ids_BL, angles)[1]
        entropies.append(entropy[None])
        counts.append(None if observed is None else observed[None])
    counts = [c for c in counts if c is not None] or [
        jnp.zeros((0, model.config.num_experts), jnp.int32)
    ]
    mask_BLM = _mask(segment_ids_BL)
    return Inspection(
        attention_entropy=jnp.concatenate(entropies),
        uniform_entropy=_mean_over_tokens(
            jnp.log(jnp.sum(mask_BLM, axis=-1))[:, None], segment_ids_BL
        )[0],
        expert_counts=jnp.concatenate(counts),
    )


def _walk(layers: Layer, x_BLD, segment_ids_BL, angles):
    """Through a stack of layers. Returns x and, stacked, what `_look` saw."""
    graphdef, state = nnx.split(layers)
    return jax.lax.scan(
        lambda x, layer: _look(nnx.merge(graphdef, layer), x, segment_ids_BL, angles), x_BLD, state
    )


def _look(layer: Layer, x_BLD, segment_ids_BL, angles):
    """One layer: its output, and (entropy of each head [N], tokens of each expert [E] or None)."""
    q_BLNH, k_BMGH, _ = layer.self_attn.queries_keys_values(layer.input_layernorm(x_BLD), angles)
    entropy_N = _mean_over_tokens(
        attention_entropy(q_BLNH, k_BMGH, _mask(segment_ids_BL)), segment_ids_BL
    )
    x_BLD, observation, _ = layer(x_BLD, segment_ids_BL, angles)
    return x_BLD, (entropy_N, None if observation is None else observation.expert_counts)


def attention_entropy(q_BLNH: jax.Array, k_BMGH: jax.Array, mask_BLM: jax.Array) -> jax.Array:
    """Entropy in nats of every query's attention, float32 [B, N, L]; scores are scaled by the
    square root of the head size.
    """
    batch, length, heads, size = q_BLNH.shape
    groups = k_BMGH.shape[2]
    q = q_BLNH.reshape(batch, length, groups, heads // groups, size).astype(jnp.float32)
    scores = jnp.einsum("blgph,bmgh->bgplm", q, k_BMGH.astype(jnp.float32)) * size**-0.5
    log_probs = jax.nn.log_softmax(scores, axis=-1, where=mask_BLM[:, None, None])
    terms = jnp.where(mask_BLM[:, None, None], jnp.exp(log_probs) * log_probs, 0)
    return -jnp.sum(terms, axis=-1).reshape(batch, heads, length)


def _mask(segment_ids_BL: jax.Array) -> jax.Array:
    index = jnp.arange(segment_ids_BL.shape[1])
    return allowed_pairs(segment_ids_BL, segment_ids_BL, index, index)


def _mean_over_tokens(values_BNL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    real = (segment_ids_BL > 0)[:, None]
    return jnp.sum(values_BNL * real, axis=(0, 2)) / jnp.maximum(jnp.sum(real), 1)
