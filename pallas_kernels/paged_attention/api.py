"""Attention of new tokens over a paged key-value cache: checks its inputs and runs the named implementation."""

from __future__ import annotations

import jax

from pallas_kernels.paged_attention import blocked, reference

IMPLEMENTATIONS = ("reference", "xla")


def paged_attention(q_SLNH, k_pages, v_pages, layer, tables_SP, starts_S, counts_S, *, scale: float, implementation: str) -> jax.Array:
    """softmax(scale q k^T) v of each row's new tokens over everything that the row has stored up to them.

    Args:
      q_SLNH: queries [S, L, N, H] of rows' tokens at positions starts_S + 0..L-1, already written to the cache.
      k_pages, v_pages: the cache of all layers, [layers, pages, G, H, page size] and [layers, pages, G, page size, H], each as its
        product reads it; G divides N.
      layer: which layer's pages, int32 scalar.
      tables_SP: int32 page of each block of positions of a row; blocks past a row's end may hold any valid page.
      starts_S: int32, tokens stored before the new ones.
      counts_S: int32, how many of the L new tokens are real; what the others get means nothing.
      scale: factor on the scores.
      implementation: one of IMPLEMENTATIONS; `auto`: xla.

    Returns:
      [S, L, N, H] in the type of q. Scores and softmax are float32.

    Raises:
      ValueError: for an unknown implementation or shapes that do not fit.
    """
    if implementation == "auto":
        implementation = "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)} for pages")
    *heads, page_size, size = v_pages.shape
    if q_SLNH.shape[2] % heads[-1] or k_pages.shape != (*heads, size, page_size) or q_SLNH.shape[-1] != size:
        raise ValueError(f"shapes of q {q_SLNH.shape}, k {k_pages.shape}, v {v_pages.shape} do not fit")
    if not tables_SP.shape[:1] == starts_S.shape == counts_S.shape == q_SLNH.shape[:1]:
        found = f"tables {tables_SP.shape}, starts {starts_S.shape} and counts {counts_S.shape}"
        raise ValueError(f"{found} are not those of {q_SLNH.shape[0]} rows")
    run = reference.paged_attention if implementation == "reference" else blocked.paged_attention
    return run(q_SLNH, k_pages, v_pages, layer, tables_SP, starts_S, counts_S, scale)
