"""Causal attention within segments: checks its inputs and runs the named implementation."""

from __future__ import annotations

import jax

from pallas_kernels.attention import blocked, reference

IMPLEMENTATIONS = ("reference", "xla")


def attention(q_BLNH, k_BMGH, v_BMGH, *, q_segment_ids, kv_segment_ids, q_offset, scale: float, implementation: str) -> jax.Array:
    """softmax(scale q k^T) v over the keys of a query's own segment that are not behind it in the row.

    Args:
      q_BLNH: queries [B, L, N, H].
      k_BMGH, v_BMGH: keys and values [B, M, G, H]; G divides N.
      q_segment_ids, kv_segment_ids: int32 [B, L] and [B, M]. Equal ids see each other; padding (0) sees padding.
      q_offset: row index of the first query among the keys; an int, or an int32 scalar where keys come from a cache.
      scale: factor on the scores.
      implementation: one of IMPLEMENTATIONS. `xla` skips the key blocks that causality forbids where q_offset is the int 0.

    Returns:
      [B, L, N, H] in the type of v. Scores and softmax are float32.

    Raises:
      ValueError: for an unknown implementation or shapes that do not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if q_BLNH.shape[2] % k_BMGH.shape[2] or k_BMGH.shape != v_BMGH.shape or q_BLNH.shape[-1] != k_BMGH.shape[-1]:
        raise ValueError(f"shapes of q {q_BLNH.shape}, k {k_BMGH.shape}, v {v_BMGH.shape} do not fit")
    if implementation == "reference" or not isinstance(q_offset, int) or q_offset != 0:
        return reference.attention(q_BLNH, k_BMGH, v_BMGH, q_segment_ids, kv_segment_ids, q_offset, scale)
    return blocked.attention(q_BLNH, k_BMGH, v_BMGH, q_segment_ids, kv_segment_ids, scale)
