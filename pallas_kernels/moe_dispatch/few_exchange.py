"""The routed experts over a mesh axis for few tokens, while decoding: every device knows how many
rows each has for each expert, so rows arrive sorted by expert, and a round plans itself in one
kernel. Where a device has no room for its rows, all exchange one pair at a time.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import few_rows_shapes
from pallas_kernels.grouped_matmul.rows import pack, unpack
from pallas_kernels.grouped_matmul.tiles import buffer_rows
from pallas_kernels.moe_dispatch import few_tokens, routed
from pallas_kernels.moe_dispatch.api import chosen
from pallas_kernels.moe_dispatch.kernel import unwritten

FEW_FACTOR = 2  # rows that a device has room for, over T * K


def takes(exchange, pairs: tuple[int, int], down: tuple[int, int, int], dtype) -> bool:
    """Whether so many (token, choice) pairs are few, and vector memory holds them and their rows.

    pairs: [T, K]. down: shape of the down projections [e, F, D].
    """
    num_pairs, (num_local, _, width) = pairs[0] * pairs[1], down
    few = (
        chosen(exchange.implementation) == "pallas"
        and exchange.collective == "ragged_all_to_all"
        and num_pairs <= routed.FEW_PAIRS
    )
    num_rows = room(exchange, pairs, num_local, dtype)[0]
    return (
        few
        and few_tokens.takes(pairs[0], num_pairs, width, dtype)
        and few_rows_shapes.holds(num_rows, width, dtype)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def exchanged(exchange, otherwise, x_TD, expert_TK, weights_TK, matrices) -> jax.Array:
    """exchange.routed_exchange of few tokens.

    otherwise: (exchange, x_TD, expert_TK, weights_TK, matrices) -> [T, D], which is differentiated.
    """
    width, dtype = (x_TD.shape[1], x_TD.dtype)
    num_local = matrices[2].shape[0]
    devices = jax.lax.axis_size(exchange.axis)
    num_rows, alignment = room(exchange, expert_TK.shape, num_local, dtype)
    others = tuple(
        axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis != exchange.axis
    )
    place = jax.lax.axis_index(exchange.axis), jax.lax.axis_index(others) if others else 0

    def run(expert_TK):
        sent = few_tokens.dispatch(
            x_TD, expert_TK, num_groups=devices * num_local, num_rows=expert_TK.size, words=True
        )
        # Of all groups: devices that went on for longer than others would wait for their
        # collectives.
        counts_NE = _to_all(sent.sizes_G, (*others, exchange.axis))
        plan = few_tokens.plan(
            counts_NE, *place, devices=devices, num_rows=num_rows, alignment=alignment
        )
        x_RD = unpack(
            _send_chunks(exchange, "few_rows", sent.rows, num_rows, plan.there),
            width=width,
            dtype=dtype,
        )
        y_RD = routed.few_products(x_RD, plan.steps_4e, alignment, *matrices)
        back = _send_chunks(exchange, "few_results", pack(y_RD), expert_TK.size, plan.back)
        return few_tokens.combine(
            back, sent.slot_TK, weights_TK, plan.fits, width=width, dtype=dtype
        ), plan.fits

    y_TD, fits = run(expert_TK)
    pair_TK = jnp.arange(expert_TK.size).reshape(expert_TK.shape)
    one_pair = lambda pair, y_TD: y_TD + run(jnp.where(pair_TK == pair, expert_TK, -1))[0]
    return jax.lax.fori_loop(0, jnp.where(fits > 0, 0, expert_TK.size), one_pair, y_TD)


def _forward(exchange, otherwise, x_TD, expert_TK, *args):
    return jax.vjp(lambda x_TD, *args: otherwise(exchange, x_TD, expert_TK, *args), x_TD, *args)


def _backward(exchange, otherwise, pullback, dy_TD):
    dx_TD, *others = pullback(dy_TD)
    return dx_TD, None, *others


exchanged.defvjp(_forward, _backward)


def room(exchange, pairs: tuple[int, int], num_local: int, dtype) -> tuple[int, int]:
    """Rows that a device has room for, of few tokens, at least for one pair of every device; and
    their alignment.
    """
    devices, (num_tokens, per_token) = jax.lax.axis_size(exchange.axis), pairs
    alignment = few_rows_shapes.alignment_for(num_tokens * per_token, num_local, dtype)
    most = devices * num_tokens * min(per_token, num_local)
    return buffer_rows(
        min(most, max(devices, math.ceil(FEW_FACTOR * math.prod(pairs)))), num_local, alignment
    ), alignment


def _to_all(x, axes) -> jax.Array:
    """The x of every device, [N, ...], by an all-to-all, which takes the shortest ways: XLA's
    all_gather goes round a ring.
    """
    return jax.lax.all_to_all(
        jnp.broadcast_to(x, (jax.lax.axis_size(axes), *x.shape)), axes, 0, 0, tiled=True
    )


def _send_chunks(exchange, name: str, words_S1W, num_rows: int, chunks) -> jax.Array:
    """Words in chunks to and from each device, [num_rows, 1, W]; unwritten memory where none
    comes.
    """
    buffer = unwritten(
        (num_rows, *words_S1W.shape[1:]), words_S1W.dtype, chunks.sizes, name=f"unwritten_{name}"
    )
    with jax.named_scope(f"send_{name}"):
        return jax.lax.ragged_all_to_all(words_S1W, buffer, *chunks, axis_name=exchange.axis)
