"""A paged key-value cache: storing new tokens, and their attention over it. Checks inputs and runs
the named implementation.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels import interpret
from pallas_kernels.attention.api import chosen
from pallas_kernels.paged_attention import (
    blocked,
    kernel,
    reference,
    shapes,
    store_kernel,
    work,
)

IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas")
SIZES = (64, 128)
PAGE_STEP = 128
DTYPES = ("bfloat16", "float32")
CACHE_DTYPES = (*DTYPES, "float8_e4m3fn")
TABLE_ENTRIES = 2**17  # half of a chip's scalar memory


class Lists(NamedTuple):
    """What the kernels walk over, for reading and for storing."""

    read: work.Read
    written: work.Written


def lists(
    length: int, per_group: int, k_pages, tables_SP, starts_S, counts_S, *, implementation: str
) -> Lists | None:
    """What paged_attention and store take as `lists` in each of several layers, so that it is made
    once; None: nothing.

    length: new tokens of a row. per_group: query heads of a key-value head. Others as for
    paged_attention.
    """
    if _implementation(implementation) != "pallas":
        return None
    cores = shapes.num_cores()
    blocks = shapes.blocks_for(
        (len(starts_S), length, per_group * k_pages.shape[2], k_pages.shape[3]), k_pages
    )
    found = Lists(
        work.read(length, k_pages, starts_S, counts_S, blocks, cores),
        work.written(length, k_pages, tables_SP, starts_S, counts_S, cores),
    )
    return jax.lax.optimization_barrier(found)  # XLA would repeat in each layer what looks cheap


def paged_attention(
    q_SLNH,
    k_pages,
    v_pages,
    layer,
    tables_SP,
    starts_S,
    counts_S,
    lists: Lists | None = None,
    *,
    scale: float,
    implementation: str,
) -> jax.Array:
    """softmax(scale q k^T) v of each row's new tokens over everything that the row has stored up to
    them.

    Args:
      q_SLNH: queries [S, L, N, H] of rows' tokens at positions starts_S + 0..L-1, already written
        to the cache.
      k_pages, v_pages: the cache of all layers, [layers, pages, G, H, page size] and [layers,
        pages, G, page size, H], each as its product reads it; G divides N. What a row's last page
        holds after its end is finite.
      layer: which layer's pages, int32 scalar.
      tables_SP: int32 page of each block of positions of a row; blocks past a row's end may hold
        any valid page.
      starts_S: int32, tokens stored before the new ones.
      counts_S: int32, how many of the L new tokens are real; what the others get means nothing.
      lists: as `lists` gives them for these rows; None: made here.
      scale: factor on the scores.
      implementation: one of IMPLEMENTATIONS. `pallas`, the TPU kernel, reads each row's own pages
        and gives zeros where no token is real; `xla`: blocked.py; `auto`: pallas where the trace is
        for a TPU, else xla.

    Returns:
      [S, L, N, H] in the type of q. Scores and softmax are float32.

    Raises:
      ValueError: for an unknown implementation, shapes that do not fit, or what the named
        implementation does not take.
    """
    name = _implementation(implementation)
    _check_shapes(q_SLNH, k_pages, v_pages, tables_SP, starts_S, counts_S)
    args = q_SLNH, k_pages, v_pages, layer, tables_SP, starts_S, counts_S
    if name == "pallas":
        _check_pallas(q_SLNH, k_pages, v_pages, tables_SP)
        blocks = shapes.blocks_for(q_SLNH.shape, k_pages)
        if lists is None:
            length, cores = q_SLNH.shape[1], shapes.num_cores()
            works = work.read(length, k_pages, starts_S, counts_S, blocks, cores)
        else:
            works = lists.read
        return kernel.paged_attention(*args, works, scale, blocks)
    return (reference if name == "reference" else blocked).paged_attention(*args, scale)


def store(
    k_SLGH,
    v_SLGH,
    k_pages,
    v_pages,
    layer,
    tables_SP,
    starts_S,
    counts_S,
    lists: Lists | None = None,
    *,
    implementation: str,
):
    """The pages with one layer's keys and values of rows' new tokens, the first counts_S at
    positions from starts_S on.

    Arguments as for paged_attention; `pallas`, the TPU kernel, changes the pages in place where
    their old value is not used any more, `xla` and `reference` are one scatter. No two rows store
    in one page. Raises ValueError as paged_attention.
    """
    name = _implementation(implementation)
    _check_shapes(k_SLGH, k_pages, v_pages, tables_SP, starts_S, counts_S)
    if name == "pallas":
        _check_pallas(k_SLGH, k_pages, v_pages, tables_SP)
        if lists is None:
            length, cores = k_SLGH.shape[1], shapes.num_cores()
            works = work.written(length, k_pages, tables_SP, starts_S, counts_S, cores)
        else:
            works = lists.written
        new = k_SLGH, v_SLGH
        return store_kernel.store(*new, k_pages, v_pages, layer, starts_S, counts_S, works)
    at = layer, tables_SP, starts_S, counts_S
    return reference.store(k_SLGH, k_pages, *at, -1), reference.store(v_SLGH, v_pages, *at, -2)


def _implementation(implementation: str) -> str:
    name = chosen(implementation)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention={name!r} is for rows and takes no pages: {', '.join(IMPLEMENTATIONS)} take"
            " them"
        )
    return name


def _check_shapes(x_SLNH, k_pages, v_pages, tables_SP, starts_S, counts_S):
    *heads, page_size, size = v_pages.shape
    if (
        x_SLNH.shape[2] % heads[-1]
        or k_pages.shape != (*heads, size, page_size)
        or x_SLNH.shape[-1] != size
    ):
        raise ValueError(
            f"shapes of q {x_SLNH.shape}, k {k_pages.shape}, v {v_pages.shape} do not fit"
        )
    if not tables_SP.shape[:1] == starts_S.shape == counts_S.shape == x_SLNH.shape[:1]:
        found = f"tables {tables_SP.shape}, starts {starts_S.shape} and counts {counts_S.shape}"
        raise ValueError(f"{found} are not those of {x_SLNH.shape[0]} rows")


def _check_pallas(q, k, v, tables):
    wrong = None
    if q.dtype.name not in DTYPES:
        wrong = f"type {q.dtype} of q: takes {', '.join(DTYPES)}"
    elif k.dtype != v.dtype or k.dtype.name not in CACHE_DTYPES:
        wrong = (
            f"types {k.dtype} and {v.dtype} of pages: takes one of {', '.join(CACHE_DTYPES)} for"
            " both"
        )
    elif q.shape[-1] not in SIZES:
        wrong = f"head size {q.shape[-1]}: takes {' and '.join(map(str, SIZES))}"
    elif v.shape[3] % PAGE_STEP:
        wrong = f"page size {v.shape[3]}: takes multiples of {PAGE_STEP}"
    elif tables.size > TABLE_ENTRIES:
        wrong = (
            f"tables of {tables.shape[0]} x {tables.shape[1]} pages: takes {TABLE_ENTRIES} in all,"
            " so larger pages or fewer rows"
        )
    elif not interpret.available():
        wrong = "no TPU, and pallas_kernels.interpret is not on"
    if wrong:
        raise ValueError(f"attention='pallas': {wrong}; 'xla' takes it")
