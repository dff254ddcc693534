"""Losses: of tokens, chunk by chunk; the MTP shift; and the loss-free bias rule."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from glm_jax.sharding import by_device, gathered, summed


def chunked_cross_entropy(h_BLD, head_DV, targets_BL, weights_BL, chunk: int) -> jax.Array:
    """sum of weights * -log softmax(h head)[target], a float32 scalar; arguments as for
    chunked_token_loss.
    """
    return chunked_token_loss(_weighted, h_BLD, head_DV, targets_BL, weights_BL, chunk, False)[0]


def _weighted(logprobs, weights):
    return -weights * logprobs


# No functools.partial: through it a type checker loses the result's type with jax 0.10.
@lambda function: jax.custom_vjp(function, nondiff_argnums=(0, 5, 6))
def chunked_token_loss(token_loss, h_BLD, head_DV, targets_BL, inputs, chunk: int, observe: bool):
    """sum over positions of token_loss(log softmax(h head)[target], inputs), holding logits of
    `chunk` positions at a time.

    The gradient of a scalar needs nothing from later layers but a factor, so the forward pass
    already computes it chunk by chunk (as Liger Kernel, arXiv 2410.10989, does): three products in
    all and no logits are kept or computed twice.

    Args:
      token_loss: elementwise, (log-probabilities, inputs) -> losses; differentiated by JAX in its
        first argument.
      h_BLD: states in compute precision. head_DV: float32 head. targets_BL: int32. inputs: tree of
        arrays [B, L], no gradient.
      chunk: positions a row at a time; the last chunk is padded with zeros where it does not divide
        L, and must cost 0 there.
      observe: return the targets' log-probabilities and the entropies in nats, both float32 [B, L],
        no gradient; else None.
    Returns (loss, observations).
    """
    loss, observed, _, _ = _token_loss(
        token_loss, h_BLD, head_DV, targets_BL, inputs, chunk, observe, with_gradient=False
    )
    return loss, observed


def _token_loss(token_loss, h_BLD, head_DV, targets_BL, inputs, chunk, observe, *, with_gradient):
    """Loss, observations, gradients of h and head. By device: the head is gathered once, and its
    gradient is summed over all chunks before it moves, once.
    """
    rows, head = ("batch", "length"), ("embed", "vocab")
    run = functools.partial(
        _token_loss_of_device, token_loss, chunk=chunk, observe=observe, with_gradient=with_gradient
    )
    each = jax.tree.map(lambda x: (*rows, *[None] * (x.ndim - 2)), inputs)
    given = (*rows, None), head, rows, each
    found = (
        (),
        (rows, rows) if observe else None,
        (*rows, None) if with_gradient else None,
        head if with_gradient else (),
    )
    return by_device(run, given, found)(h_BLD, head_DV, targets_BL, inputs)


def _token_loss_of_device(
    token_loss, h_BLD, head_DV, targets_BL, inputs, *, chunk, observe, with_gradient
):
    batch, length, _ = h_BLD.shape
    chunk = min(chunk, length)
    pad = -length % chunk
    head = gathered(head_DV.astype(h_BLD.dtype), "embed", 0)

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    def whole(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]

    def body(carry, scanned):
        loss, dhead = carry
        h, targets, given = scanned
        logits = jnp.einsum("bcd,dv->bcv", h, head, preferred_element_type=jnp.float32)
        top = jnp.max(logits, axis=-1, keepdims=True)
        exps = jnp.exp(logits - top)
        total = jnp.sum(exps, axis=-1, keepdims=True)
        hit = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        logprobs = (hit - top - jnp.log(total))[..., 0]
        losses, pull = jax.vjp(lambda logprobs: token_loss(logprobs, given), logprobs)
        loss += jnp.sum(losses)
        observed = None
        if observe:
            entropy = (jnp.log(total) + top)[..., 0] - jnp.sum(exps * logits, axis=-1) / total[
                ..., 0
            ]
            observed = logprobs, entropy
        if not with_gradient:
            return (loss, dhead), (observed, None)
        slope = pull(jnp.ones_like(losses))[0][..., None]  # of the loss in the log-probability
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        dlogits = (jnp.where(is_target, slope, 0) - exps * (slope / total)).astype(h.dtype)
        dh = jnp.einsum("bcv,dv->bcd", dlogits, head)
        dhead += jnp.einsum("bcd,bcv->dv", h, dlogits, preferred_element_type=jnp.float32)
        return (loss, dhead), (observed, dh)

    dhead = jnp.zeros(head.shape if with_gradient else (), jnp.float32)
    scanned = chunks(h_BLD), chunks(targets_BL), jax.tree.map(chunks, inputs)
    (loss, dhead), outputs = jax.lax.scan(body, (jnp.zeros((), jnp.float32), dhead), scanned)
    observed, dh = jax.tree.map(whole, outputs)
    return (
        summed(loss, "batch"),
        observed,
        dh,
        summed(dhead, "batch", "embed", 0) if with_gradient else dhead,
    )


def _token_loss_forward(token_loss, h_BLD, head_DV, targets_BL, inputs, chunk, observe):
    loss, observed, dh, dhead = _token_loss(
        token_loss, h_BLD, head_DV, targets_BL, inputs, chunk, observe, with_gradient=True
    )
    return (loss, observed), (dh, dhead)


def _token_loss_backward(token_loss, chunk, observe, residuals, cotangents):
    dh, dhead = residuals
    dloss = cotangents[0]
    return dh * dloss.astype(dh.dtype), dhead * dloss, None, None


chunked_token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def mtp_targets(batch) -> tuple[jax.Array, jax.Array]:
    """Targets t_{i+2} and their weights, both [B, L]: zero weight where the next position is
    another document's or padding.
    """
    shift = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    same = shift(batch["segment_ids"]) == batch["segment_ids"]
    return shift(batch["targets"]), shift(batch["loss_weights"]) * same


LOSS_CHUNK = 128  # positions a row whose logits exist at a time


@dataclasses.dataclass
class Auxiliary:
    """What a model loses beside its own tokens, sums over a microbatch; None where the model has no
    such part. expert_counts: int32 [routers, E], the MTP router last.
    """

    mtp: jax.Array | None
    balance: jax.Array | None
    expert_counts: jax.Array | None


def auxiliary(model, out, h_BLD, batch) -> Auxiliary:
    """The losses that every training step adds to that of the tokens.

    out: of model.trunk. h_BLD: hidden states that the MTP block goes on from; None: it is left out.
    batch: `targets`, `segment_ids`, `positions` and `loss_weights`, [B, L].
    """
    mtp, routers = None, [] if out.routers is None else [out.routers]
    if model.mtp is not None and h_BLD is not None:
        x_BLD, observation, _ = model.mtp_hidden(
            h_BLD, batch["targets"], batch["segment_ids"], batch["positions"]
        )
        targets, weights = mtp_targets(batch)
        mtp = chunked_cross_entropy(x_BLD, model.mtp_head.weight[...], targets, weights, LOSS_CHUNK)
        routers.append(jax.tree.map(lambda leaf: leaf[None], observation))
    if not routers:
        return Auxiliary(mtp, None, None)
    routers = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routers)
    return Auxiliary(mtp, jnp.sum(routers.balance_loss), routers.expert_counts)


def update_router_bias(bias_RE, expert_counts_RE, rate) -> jax.Array:
    """Loss-free balancing (arXiv 2408.15664): b_e += rate * sign(mean(c) - c_e), one row a router,
    from global counts.
    """
    counts = expert_counts_RE.astype(jnp.float32)
    return bias_RE + rate * jnp.sign(jnp.mean(counts, axis=-1, keepdims=True) - counts)
