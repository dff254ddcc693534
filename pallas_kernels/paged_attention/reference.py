"""Paged attention in plain jnp: the meaning that every implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.reference import softmax_attention


def paged_attention(q_SLNH, k_pages, v_pages, layer, tables_SP, starts_S, counts_S, scale) -> jax.Array:
    """Gathers each row's pages in order, then attends to the positions that are not behind the query."""
    del counts_S  # what is not real is not stored, and stands behind every real query
    k_SMGH, v_SMGH = (_rows(pages, layer, tables_SP).astype(q_SLNH.dtype) for pages in (k_pages.swapaxes(3, 4), v_pages))
    q_position_SL = starts_S[:, None] + jnp.arange(q_SLNH.shape[1])
    mask_SLM = jnp.arange(k_SMGH.shape[1]) <= q_position_SL[..., None]
    return softmax_attention(q_SLNH, k_SMGH, v_SMGH, mask_SLM, scale)[0]


def _rows(pages, layer, tables_SP):
    """[S, M, G, H], M = pages a row x page size. One gather: slicing the layer first would copy all its pages."""
    blocks = pages[layer, tables_SP].swapaxes(2, 3)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])
