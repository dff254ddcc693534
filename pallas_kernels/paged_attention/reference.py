"""Paged attention in plain jnp: the meaning that every implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.reference import softmax_attention


def paged_attention(
    q_SLNH, k_pages, v_pages, layer, tables_SP, starts_S, counts_S, scale
) -> jax.Array:
    """Gathers each row's pages in order, then attends to the positions that are not after the
    query.
    """
    del counts_S  # what is not real is not stored, and stands after every real query
    k_SMGH, v_SMGH = (
        _rows(pages, layer, tables_SP).astype(q_SLNH.dtype)
        for pages in (k_pages.swapaxes(3, 4), v_pages)
    )
    q_position_SL = starts_S[:, None] + jnp.arange(q_SLNH.shape[1])
    mask_SLM = jnp.arange(k_SMGH.shape[1]) <= q_position_SL[..., None]
    return softmax_attention(q_SLNH, k_SMGH, v_SMGH, mask_SLM, scale)[0]


def _rows(pages, layer, tables_SP):
    """[S, M, G, H], M = pages a row x page size. One gather: slicing the layer first would copy all
    its pages.
    """
    blocks = pages[layer, tables_SP].swapaxes(2, 3)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def store(new_SL, pages, layer, tables_SP, starts_S, counts_S, position_axis: int) -> jax.Array:
    """One layer's pages with the first counts_S of new_SL, [S, L, G, H] or [S, L, K], at their
    positions, along an axis of a page.
    """
    num_pages, page_size = pages.shape[1], pages.shape[position_axis]
    step = jnp.arange(new_SL.shape[1])
    position_SL = starts_S[:, None] + step
    page_SL = jnp.take_along_axis(
        tables_SP, position_SL // page_size, axis=1, mode="fill", fill_value=num_pages
    )
    page_SL = jnp.where(step < counts_S[:, None], page_SL, num_pages)  # no such page: dropped
    at = [layer, page_SL, *(slice(None),) * (pages.ndim - 2)]
    at[position_axis] = position_SL % page_size
    return pages.at[tuple(at)].set(saturated(new_SL, pages.dtype), mode="drop")


def saturated(x, dtype) -> jax.Array:
    """x in a cache's type; float8 has no infinity: what is too large would become NaN."""
    if dtype == jnp.float8_e4m3fn:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)
