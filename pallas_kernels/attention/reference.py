"""Attention in plain jnp: the meaning that every implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NO_KEY = -1e30  # log-sum-exp, and running maximum, of a query that sees no key


def allowed_pairs(q_segment_ids_BL, kv_segment_ids_BM, q_index_L, kv_index_M) -> jax.Array:
    """bool [B, L, M]: the key is of the query's own segment, which is no padding, and not after it
    in the row.
    """
    same = (q_segment_ids_BL[:, :, None] == kv_segment_ids_BM[:, None, :]) & (
        q_segment_ids_BL[:, :, None] > 0
    )
    return same & (kv_index_M[None, None, :] <= q_index_L[None, :, None])


def softmax_attention(q_BLNH, k_BMGH, v_BMGH, mask_BLM, scale) -> tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T) v with float32 scores; G key-value heads serve N / G query heads each.

    Returns out [B, L, N, H] and log-sum-exp of the scores, float32 [B, L, N]; zeros and NO_KEY
    where the mask leaves nothing.
    """
    batch, length, heads, size = q_BLNH.shape
    groups = k_BMGH.shape[2]
    q = q_BLNH.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.einsum("blgph,bmgh->bgplm", q, k_BMGH, preferred_element_type=jnp.float32) * scale
    mask = mask_BLM[:, None, None]
    scores = jnp.where(mask, scores, NO_KEY)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    probs = jnp.where(mask, jnp.exp(scores - lse), 0).astype(v_BMGH.dtype)
    out = jnp.einsum("bgplm,bmgh->blgph", probs, v_BMGH).reshape(batch, length, heads, size)
    lse = jnp.where(mask.any(-1, keepdims=True), lse, NO_KEY)
    return out, lse[..., 0].transpose(0, 3, 1, 2).reshape(batch, length, heads)


def attention(
    q_BLNH, k_BMGH, v_BMGH, q_ids_BL, kv_ids_BM, scale, q_offset, kv_offset
) -> tuple[jax.Array, jax.Array]:
    q_index = q_offset + jnp.arange(q_BLNH.shape[1])
    kv_index = kv_offset + jnp.arange(k_BMGH.shape[1])
    return softmax_attention(
        q_BLNH, k_BMGH, v_BMGH, allowed_pairs(q_ids_BL, kv_ids_BM, q_index, kv_index), scale
    )
