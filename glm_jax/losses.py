"""Losses: chunked cross-entropy, the MTP shift, the combination, and the loss-free bias rule."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from glm_jax.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(h_BLD, head_DV, targets_BL, weights_BL, chunk: int) -> jax.Array:
    """sum of weights * -log softmax(h head)[target], a float32 scalar, holding logits of `chunk` positions at a time.

    The gradient of a scalar needs nothing from behind it but a factor, so the forward pass already computes it chunk by
    chunk (as Liger Kernel, arXiv 2410.10989, does): three products in all and no logits are kept or computed twice.

    Args:
      h_BLD: states in compute precision. head_DV: float32 head. targets_BL: int32. weights_BL: float32.
      chunk: positions a row at a time; the last chunk is padded where it does not divide L.
    """
    return _cross_entropy(h_BLD, head_DV, targets_BL, weights_BL, chunk, with_gradient=False)[0]


def _cross_entropy(h_BLD, head_DV, targets_BL, weights_BL, chunk, *, with_gradient):
    batch, length, width = h_BLD.shape
    chunk = min(chunk, length)
    pad = -length % chunk
    head = constrain(head_DV.astype(h_BLD.dtype), "act_embed", "act_vocab")  # gathered once, not once a chunk

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    def body(carry, inputs):
        loss, dhead = carry
        h, targets, weights = inputs
        logits = jnp.einsum("bcd,dv->bcv", h, head, preferred_element_type=jnp.float32)
        top = jnp.max(logits, axis=-1, keepdims=True)
        exps = jnp.exp(logits - top)
        total = jnp.sum(exps, axis=-1, keepdims=True)
        hit = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        loss += jnp.sum(weights * (jnp.log(total) + top - hit)[..., 0])
        if not with_gradient:
            return (loss, dhead), None
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        dlogits = (exps * (weights[..., None] / total) - jnp.where(is_target, weights[..., None], 0)).astype(h.dtype)
        dh = jnp.einsum("bcv,dv->bcd", dlogits, head)
        dhead += jnp.einsum("bcd,bcv->dv", h, dlogits, preferred_element_type=jnp.float32)
        return (loss, dhead), dh

    dhead = jnp.zeros(head_DV.shape if with_gradient else (), jnp.float32)
    inputs = chunks(h_BLD), chunks(targets_BL), chunks(weights_BL)
    (loss, dhead), dh = jax.lax.scan(body, (jnp.zeros((), jnp.float32), dhead), inputs)
    if with_gradient:
        dh = jnp.moveaxis(dh, 0, 1).reshape(batch, -1, width)[:, :length]
    return loss, dh, dhead


def _cross_entropy_forward(h_BLD, head_DV, targets_BL, weights_BL, chunk):
    loss, dh, dhead = _cross_entropy(h_BLD, head_DV, targets_BL, weights_BL, chunk, with_gradient=True)
    return loss, (dh, dhead)


def _cross_entropy_backward(chunk, residuals, dloss):
    dh, dhead = residuals
    return dh * dloss.astype(dh.dtype), dhead * dloss, None, None


chunked_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def mtp_targets(batch) -> tuple[jax.Array, jax.Array]:
    """Targets t_{i+2} and their weights, both [B, L]: zero weight where the next position is another document's or padding."""
    shift = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    same = shift(batch["segment_ids"]) == batch["segment_ids"]
    return shift(batch["targets"]), shift(batch["loss_weights"]) * same


def update_router_bias(bias_RE, expert_counts_RE, rate) -> jax.Array:
    """Loss-free balancing (arXiv 2408.15664): b_e += rate * sign(mean(c) - c_e), one row a router, from global counts."""
    counts = expert_counts_RE.astype(jnp.float32)
    return bias_RE + rate * jnp.sign(jnp.mean(counts, axis=-1, keepdims=True) - counts)
