"""Attention in plain jnp: the meaning that every implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def allowed_pairs(q_segment_ids_BL, kv_segment_ids_BM, q_index_L, kv_index_M) -> jax.Array:
    """bool [B, L, M]: the key is of the query's own segment and not behind it in the row."""
    same = q_segment_ids_BL[:, :, None] == kv_segment_ids_BM[:, None, :]
    return same & (kv_index_M[None, None, :] <= q_index_L[None, :, None])


def softmax_attention(q_BLNH, k_BMGH, v_BMGH, mask_BLM, scale) -> jax.Array:
    """softmax(scale q k^T) v with float32 scores; G key-value heads serve N / G query heads each. Returns [B, L, N, H]."""
    batch, length, heads, size = q_BLNH.shape
    groups = k_BMGH.shape[2]
    q = q_BLNH.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.einsum("blgph,bmgh->bgplm", q, k_BMGH, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask_BLM[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BMGH.dtype)
    return jnp.einsum("bgplm,bmgh->blgph", probs, v_BMGH).reshape(batch, length, heads, size)


def attention(q_BLNH, k_BLGH, v_BLGH, segment_ids_BL, scale) -> jax.Array:
    index = jnp.arange(q_BLNH.shape[1])
    return softmax_attention(q_BLNH, k_BLGH, v_BLGH, allowed_pairs(segment_ids_BL, segment_ids_BL, index, index), scale)
