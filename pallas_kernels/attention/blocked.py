"""Attention for XLA without a kernel: query blocks against the keys up to their own end.

The [L, M] scores are what attention costs outside its products, so they are not kept for the
backward pass, which makes them again from the maxima of rows, and the division by the sums of rows
happens on [L, H].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.reference import allowed_pairs

MIN_QUERY_BLOCK = 128
MAX_QUERY_BLOCKS = 16  # unrolled in the program, so bounded


def attention(q_BLNH, k_BLGH, v_BLGH, segment_ids_BL, scale: float) -> jax.Array:
    """As reference.attention without offsets; n blocks do (n + 1) / 2n of the square's work."""
    batch, length, heads, size = q_BLNH.shape
    groups = k_BLGH.shape[2]
    q = (
        (q_BLNH * scale)
        .reshape(batch, length, groups, heads // groups, size)
        .transpose(0, 2, 1, 3, 4)
    )
    k, v = k_BLGH.transpose(0, 2, 1, 3), v_BLGH.transpose(0, 2, 1, 3)
    block = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    stops = [*range(block, length, block), length]
    out = []
    # Whole parts by split and concatenate: their gradients are each other, where a slice's is a
    # padded sum.
    for start, stop, q_block in zip(
        [0, *stops], stops, jnp.split(q, stops[:-1], axis=2), strict=False
    ):
        mask = allowed_pairs(
            segment_ids_BL[:, start:stop],
            segment_ids_BL[:, :stop],
            jnp.arange(start, stop),
            jnp.arange(stop),
        )
        out.append(_block(q_block, k[:, :, :stop], v[:, :, :stop], mask))
    out = jnp.concatenate(out, axis=2).transpose(0, 2, 1, 3, 4).reshape(batch, length, heads, size)
    return jnp.where(segment_ids_BL[..., None, None] > 0, out, 0)  # padding sees nothing


@jax.custom_vjp
def _block(q_BGLPH, k_BGMH, v_BGMH, mask_BLM):
    return _block_forward(q_BGLPH, k_BGMH, v_BGMH, mask_BLM)[0]


def _scores(q, k, mask):
    scores = jnp.einsum("bglph,bgmh->bglpm", q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, :, None], scores, jnp.finfo(jnp.float32).min)


def _block_forward(q, k, v, mask):
    scores = _scores(q, k, mask)
    most = jnp.max(scores, axis=-1, keepdims=True)
    exps = jnp.exp(scores - most).astype(v.dtype)
    out = jnp.einsum("bglpm,bgmh->bglph", exps, v, preferred_element_type=jnp.float32)
    total = jnp.sum(exps, axis=-1, keepdims=True, dtype=jnp.float32)
    out, most, total = (
        checkpoint_name(x, "attention") for x in ((out / total).astype(v.dtype), most, total)
    )
    return out, (q, k, v, mask, most, total, out)


def _block_backward(residuals, dout):
    q, k, v, mask, most, total, out = residuals
    exps = jnp.exp(_scores(q, k, mask) - most).astype(v.dtype)
    scaled = (dout / total).astype(v.dtype)
    inner = jnp.sum(scaled.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dv = jnp.einsum("bglpm,bglph->bgmh", exps, scaled)
    dexps = jnp.einsum("bglph,bgmh->bglpm", scaled, v, preferred_element_type=jnp.float32)
    dscores = (exps * (dexps - inner)).astype(q.dtype)
    dq = jnp.einsum("bglpm,bgmh->bglph", dscores, k)
    dk = jnp.einsum("bglpm,bglph->bgmh", dscores, q)
    return dq, dk, dv, None


_block.defvjp(_block_forward, _block_backward)
