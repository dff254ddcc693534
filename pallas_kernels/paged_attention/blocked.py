"""Paged attention for XLA without a kernel. Its cost follows what the rows have stored, not how
long their page tables are.

A few new tokens a row (decode): a loop over chunks of the used pages of all rows, every page a
product of its own, as the cache holds it; an online softmax joins the pages of a row. Many
(prefill): a row's pages are put in order once, which their one large product repays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 2048  # positions
FEW_TOKENS = 8  # of a row, below which pages are not put in order
MASKED = float(jnp.finfo(jnp.float32).min)


def paged_attention(
    q_SLNH, k_pages, v_pages, layer, tables_SP, starts_S, counts_S, scale
) -> jax.Array:
    """As reference.paged_attention."""
    rows, length, heads, size = q_SLNH.shape
    groups = k_pages.shape[2]
    q = (
        (q_SLNH * scale)
        .reshape(rows, length, groups, heads // groups, size)
        .transpose(0, 2, 1, 3, 4)
    )
    q_SGQH = q.reshape(rows, groups, -1, size)  # Q: all queries of a group of heads
    query_SQ = jnp.repeat(starts_S[:, None] + jnp.arange(length), heads // groups, axis=1)
    if length < FEW_TOKENS:
        out = _by_page(
            q_SGQH,
            query_SQ,
            k_pages,
            v_pages,
            layer,
            tables_SP,
            jnp.where(counts_S > 0, starts_S + counts_S, 0),
        )
    else:
        out = _in_order(q_SGQH, query_SQ, k_pages, v_pages, layer, tables_SP)
    out = out.astype(q_SLNH.dtype).reshape(rows, groups, length, heads // groups, size)
    return out.transpose(0, 2, 1, 3, 4).reshape(q_SLNH.shape)


def _in_order(q_SGQH, query_SQ, k_pages, v_pages, layer, tables_SP):
    rows, groups, _, size = q_SGQH.shape

    k_SPGHM, v_SPGMH = (
        pages[layer, tables_SP].astype(q_SGQH.dtype) for pages in (k_pages, v_pages)
    )
    k_SGHM = k_SPGHM.transpose(0, 2, 3, 1, 4).reshape(rows, groups, size, -1)
    v_SGMH = v_SPGMH.swapaxes(1, 2).reshape(rows, groups, -1, size)
    scores = jnp.einsum("sgqh,sghm->sgqm", q_SGQH, k_SGHM, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.arange(k_SGHM.shape[-1]) <= query_SQ[:, None, :, None], scores, MASKED)
    exps = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    out = jnp.einsum(
        "sgqm,sgmh->sgqh", exps.astype(q_SGQH.dtype), v_SGMH, preferred_element_type=jnp.float32
    )
    return out / jnp.sum(exps, axis=-1, keepdims=True)


def _by_page(q_SGQH, query_SQ, k_pages, v_pages, layer, tables_SP, ends_S):
    """ends_S: tokens that a row has stored; rows without any get zeros."""
    rows, num_blocks = tables_SP.shape
    page_size = k_pages.shape[4]
    # the used pages of all rows in one list, row after row; where each row's end
    last_W = jnp.cumsum(-(-ends_S // page_size))
    chunk = max(1, min(CHUNK // page_size, rows * num_blocks))

    def attend(number, carry):
        best_SGQ, total_SGQ, sum_SGQH = carry
        place_W = number * chunk + jnp.arange(chunk)
        row_W = jnp.sum(place_W[:, None] >= last_W, axis=1)  # S after the list's end
        own = row_W.clip(max=rows - 1)
        block_W = place_W - jnp.where(own > 0, last_W[own - 1], 0)
        page_W = tables_SP[own, block_W.clip(max=num_blocks - 1)]
        k_WGHM, v_WGMH = (pages[layer, page_W].astype(q_SGQH.dtype) for pages in (k_pages, v_pages))
        scores = jnp.einsum(
            "wgqh,wghm->wgqm", q_SGQH[own], k_WGHM, preferred_element_type=jnp.float32
        )
        key_WM = block_W[:, None] * page_size + jnp.arange(page_size)
        scores = jnp.where(key_WM[:, None, None] <= query_SQ[own, None, :, None], scores, MASKED)
        join = {"mode": "drop", "indices_are_sorted": True}
        new_best_SGQ = best_SGQ.at[row_W].max(jnp.max(scores, axis=-1), **join)
        exps = jnp.exp(scores - new_best_SGQ[own, ..., None])
        parts = jnp.einsum(
            "wgqm,wgmh->wgqh", exps.astype(q_SGQH.dtype), v_WGMH, preferred_element_type=jnp.float32
        )
        kept_SGQ = jnp.exp(best_SGQ - new_best_SGQ)
        total_SGQ = (total_SGQ * kept_SGQ).at[row_W].add(jnp.sum(exps, axis=-1), **join)
        sum_SGQH = (sum_SGQH * kept_SGQ[..., None]).at[row_W].add(parts, **join)
        return new_best_SGQ, total_SGQ, sum_SGQH

    shape = q_SGQH.shape
    start = jnp.full(shape[:3], MASKED), jnp.zeros(shape[:3]), jnp.zeros(shape, jnp.float32)
    _, total_SGQ, sum_SGQH = lax.fori_loop(0, -(-last_W[-1] // chunk), attend, start)
    return sum_SGQH / jnp.maximum(total_SGQ, jnp.finfo(jnp.float32).tiny)[..., None]
