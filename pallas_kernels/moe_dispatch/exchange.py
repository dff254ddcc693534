"""The routed experts over a mesh axis, each device holding E / n of them: rows travel to their
experts' devices and back.

Dropless in bounded memory: in each round a device sends every other at most `quota` rows, so
buffers hold n * quota rows, which is `factor` times its own T * K; what does not fit goes in the
next round. All devices count rounds alike, from the largest number of rows that any device has for
any other; under balanced routing there is one round. Many tokens go in parts, one after the other.
To the TPU kernels a token goes once for all its experts of a device, 0.66 times as often as to each
where 8 of 160 live on 8 devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.grouped_matmul.rows import pack
from pallas_kernels.moe_dispatch import few_exchange, routed
from pallas_kernels.moe_dispatch.api import chosen, routed_ffn
from pallas_kernels.moe_dispatch.kernel import copy_rows, unwritten
from pallas_kernels.moe_dispatch.route import Route, Rows, plan_route, rows_once
from pallas_kernels.moe_dispatch.routed import FEW_PAIRS
from pallas_kernels.moe_dispatch.sorting import (
    Dispatch,
    combine_rows,
    gather_rows,
    gather_weights,
    sum_words,
    take,
)
from pallas_kernels.target import target_platform

COLLECTIVES = ("all_to_all", "ragged_all_to_all")
# of a device's tokens, and rows of each of its experts in a part, by the mean
MOST_PARTS, PART_ROWS = 4, 2048


@dataclasses.dataclass(frozen=True)
class Exchange:
    """axis: of the mesh, over which experts are split. collective: `all_to_all` sends whole slots,
    `ragged_all_to_all` (TPU, GPU) only the rows in them. factor: rows of a buffer over T * K.
    implementation: of routed_ffn.
    """

    axis: str
    collective: str
    factor: float
    implementation: str

    def __post_init__(self):
        if self.collective not in COLLECTIVES:
            raise ValueError(
                f"collective={self.collective!r} is not one of {', '.join(COLLECTIVES)}"
            )
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ValueError(f"factor={self.factor}: must be a positive number")

    def quota(self, num_pairs: int) -> int:
        """Rows from one device to another in a round, of num_pairs that each has."""
        return min(num_pairs, math.ceil(self.factor * num_pairs / jax.lax.axis_size(self.axis)))


def routed_exchange(
    x_TD, expert_TK, weights_TK, gate_eDF, up_eDF, down_eFD, exchange: Exchange
) -> jax.Array:
    """routed_ffn with the experts of all devices of an axis, inside jax.shard_map over it.

    Args:
      x_TD, weights_TK: this device's tokens and their weights.
      expert_TK: index among all n * e experts, device i holding those from i * e on; outside of
        them: no expert.
      gate_eDF, up_eDF, down_eFD: this device's experts, as routed_ffn takes them.

    Returns:
      [T, D]. Differentiable in x, weights and matrices. The backward pass goes the same rounds: the
      first with what the forward pass kept, the others computed anew, so that its memory does not
      grow with their number.

    Raises:
      ValueError: where XLA has no such collective for the platform, and as routed_ffn.
    """
    if exchange.collective == "ragged_all_to_all" and target_platform() == "cpu":
        raise ValueError(
            "collective='ragged_all_to_all': XLA has none for CPUs; 'all_to_all' works everywhere"
        )
    matrices = gate_eDF, up_eDF, down_eFD
    if few_exchange.takes(exchange, expert_TK.shape, down_eFD.shape, x_TD.dtype):
        return few_exchange.exchanged(exchange, _in_parts, x_TD, expert_TK, weights_TK, matrices)
    return _in_parts(exchange, x_TD, expert_TK, weights_TK, matrices)


def _in_parts(exchange: Exchange, x_TD, expert_TK, weights_TK, matrices):
    num_local = matrices[2].shape[0]
    parts = num_parts(exchange, expert_TK.shape, num_local)
    split = lambda x: x.reshape(parts, -1, *x.shape[1:])
    quota = exchange.quota(expert_TK.size // parts)
    routes = [
        plan_route(exchange.axis, quota, expert_tK, num_local) for expert_tK in split(expert_TK)
    ]
    y_PtD = _exchanged(exchange, _stacked(routes), split(x_TD), split(weights_TK), matrices)
    return y_PtD.reshape(x_TD.shape)


def num_parts(exchange: Exchange, shape: tuple[int, int], num_local: int) -> int:
    """Parts of [T, K] pairs that are exchanged one after the other, so that one's exchange runs
    beside another's products. num_local: experts of a device.

    Only what XLA starts early is worth it, and only where each part has enough rows to pay for
    reading the matrices again.
    """
    fits = [
        n
        for n in range(1, MOST_PARTS + 1)
        if shape[0] % n == 0 and math.prod(shape) // n >= PART_ROWS * num_local
    ]
    return max(fits, default=1) if exchange.collective == "ragged_all_to_all" else 1


def ragged_layout(devices: int, quota: int, device, send_n, receive_n):
    """What ragged_all_to_all takes: offsets and sizes of what is sent, offsets at the receivers,
    sizes of what is received, int32 [n]. Slots as all_to_all has them: those for device d at d *
    quota, and at d those from here at (this device) * quota.
    """
    offsets = jnp.arange(devices, dtype=jnp.int32) * quota
    return (
        offsets,
        send_n.astype(jnp.int32),
        jnp.full(devices, device * quota, jnp.int32),
        receive_n.astype(jnp.int32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(exchange: Exchange, x_SD, send_n, receive_n):
    """Slots [n * quota, D] to their devices, send_n rows of those for each; what empty slots hold
    is unknown. The gradient goes back.
    """
    return _send(exchange, "forth", x_SD, send_n, receive_n)


def _send(exchange: Exchange, direction: str, x_SD, send_n, receive_n):
    if exchange.collective == "all_to_all":
        return jax.lax.all_to_all(x_SD, exchange.axis, 0, 0, tiled=True)
    # XLA sends rows of two lines. Asked for so, it gets them in buffers that nobody has to fill or
    # to lay out anew.
    rows = x_SD.reshape(len(x_SD), 2, -1)
    if target_platform() == "tpu":
        buffer = unwritten(rows.shape, rows.dtype, send_n, name=f"unwritten_{direction}")
    else:
        buffer = jax.lax.empty(rows.shape, rows.dtype)
    return _ragged(exchange, rows, buffer, send_n, receive_n).reshape(x_SD.shape)


def _ragged(exchange: Exchange, rows, buffer, send_n, receive_n):
    devices = jax.lax.axis_size(exchange.axis)
    layout = ragged_layout(
        devices, len(rows) // devices, jax.lax.axis_index(exchange.axis), send_n, receive_n
    )
    return jax.lax.ragged_all_to_all(rows, buffer, *layout, axis_name=exchange.axis)


send.defvjp(
    lambda exchange, x_SD, *sizes: (send(exchange, x_SD, *sizes), sizes),
    lambda exchange, sizes, dy_SD: (_send(exchange, "back", dy_SD, *reversed(sizes)), None, None),
)


def _send_words(exchange: Exchange, name: str, words_S1W, send_n, receive_n):
    """The same of words, which XLA sends as they lie, and one of zeros after. name: one for each
    array that is alive at a time.
    """
    if exchange.collective == "all_to_all":
        sent = jax.lax.all_to_all(words_S1W, exchange.axis, 0, 0, tiled=True)
        return jnp.pad(sent, ((0, 1), (0, 0), (0, 0)))
    buffer = unwritten(words_S1W.shape, words_S1W.dtype, send_n, zeros=1, name=f"unwritten_{name}")
    with jax.named_scope(f"send_{name}"):
        return _ragged(exchange, words_S1W, buffer, send_n, receive_n)


def _round(exchange: Exchange, route: Route, number, x_TD, weights_TK, matrices):
    """What the rows of one round add to y [T, D]."""
    implementation = chosen(exchange.implementation)
    dispatch = route.dispatch(number, implementation == "pallas")
    pairs = dispatch.group_sizes_E, route.sizes(route.received_n, number)
    # Weights go along, so that the expert's kernels multiply by them and find their gradients: here
    # that would take passes over all rows.
    told = [gather_weights(weights_TK, dispatch), route.experts(dispatch)]
    if implementation == "pallas" and len(dispatch.source_R) > FEW_PAIRS:
        rows = rows_once(dispatch, len(route.sent_n))
        weights_S, experts_S, places_S = _told(exchange, *told, rows.place_S)
        return _round_of_words(
            exchange,
            dispatch,
            pairs,
            rows,
            experts_S.astype(jnp.int32),
            places_S.astype(jnp.int32),
            x_TD,
            weights_S,
            matrices,
        )
    weights_S, experts_S = _told(exchange, *told)
    x_SD = checkpoint_name(send(exchange, gather_rows(x_TD, dispatch), *pairs), "expert_rows")
    y_SD = routed_ffn(
        x_SD,
        experts_S.astype(jnp.int32)[:, None],
        weights_S[:, None],
        *matrices,
        implementation=implementation,
    )
    return combine_rows(send(exchange, y_SD, *reversed(pairs)), None, dispatch)


def _told(exchange: Exchange, *numbers_S) -> list[jax.Array]:
    """Numbers of slots at the devices that the slots go to, as float32: one exchange, and whole
    numbers stay what they are.
    """
    told_S = jax.lax.all_to_all(
        jnp.stack([n.astype(jnp.float32) for n in numbers_S], axis=1),
        exchange.axis,
        0,
        0,
        tiled=True,
    )
    return [told_S[:, i] for i in range(len(numbers_S))]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _round_of_words(
    exchange: Exchange,
    dispatch: Dispatch,
    pairs,
    rows: Rows,
    experts_S,
    places_S,
    x_TD,
    weights_S,
    matrices,
):
    """A round by the TPU kernels: rows stay words from the packing of tokens to the sums of their
    results.

    pairs: those sent to and received from each device. experts_S, places_S: of what is received.
    """
    matrices = routed.in_type(matrices, x_TD.dtype)
    return _words_forward(
        exchange, dispatch, pairs, rows, experts_S, places_S, x_TD, weights_S, matrices, keep=False
    )[0]


def _words_forward(
    exchange, dispatch, pairs, rows, experts_S, places_S, x_TD, weights_S, matrices, *, keep: bool
):
    width, dtype, devices = x_TD.shape[1], x_TD.dtype, len(rows.sent_n)
    there_nq = (experts_S < len(matrices[2])).reshape(devices, -1)
    places_nq = places_S.reshape(devices, -1)
    once = rows.sent_n, jnp.max(jnp.where(there_nq, places_nq + 1, 0), axis=1)
    x = checkpoint_name(
        _send_words(exchange, "rows", copy_rows(pack(x_TD), rows.source_S), *once), "expert_rows"
    )
    plan = routed.plan_rows(experts_S[:, None], len(matrices[2]))
    rows_S = (
        places_nq + jnp.arange(devices, dtype=jnp.int32)[:, None] * places_nq.shape[1]
    ).reshape(-1)
    tokens_R = jnp.where(plan.source_R < 0, -1, take(rows_S, plan.source_R))
    weights_R = take(weights_S, plan.source_R)
    y, kept = routed.forward(x, tokens_R, plan, weights_R, matrices, dtype, keep=keep)
    back = _send_words(
        exchange, "results", copy_rows(y, plan.slot_TK.reshape(-1)), *reversed(pairs)
    )
    return sum_words(back, None, dispatch, width=width, dtype=dtype), (
        once,
        x,
        tokens_R,
        plan,
        weights_R,
        kept,
    )


def _round_forward(exchange, dispatch, pairs, rows, experts_S, places_S, x_TD, weights_S, matrices):
    typed = routed.in_type(matrices, x_TD.dtype, differentiable=True)
    y_TD, kept = _words_forward(
        exchange, dispatch, pairs, rows, experts_S, places_S, x_TD, weights_S, typed, keep=True
    )
    return y_TD, (dispatch, pairs, rows.source_S, weights_S, matrices, kept)


def _round_backward(exchange, residuals, dout_TD):
    dispatch, pairs, source_S, weights_S, matrices, (once, x, tokens_R, plan, weights_R, kept) = (
        residuals
    )
    width, dtype = dout_TD.shape[1], dout_TD.dtype
    dout = _send_words(exchange, "result_gradients", copy_rows(pack(dout_TD), source_S), *once)
    dx, dweights_R, gradients = routed.backward(
        x, dout, tokens_R, plan, weights_R, routed.in_type(matrices, dtype), kept, dtype
    )
    back = _send_words(
        exchange, "row_gradients", copy_rows(dx, plan.slot_TK.reshape(-1)), *reversed(pairs)
    )
    dx_TD = sum_words(back, None, dispatch, width=width, dtype=dtype)
    dweights_S = take(dweights_R, plan.slot_TK.reshape(-1)).astype(weights_S.dtype)
    gradients = tuple(d.astype(w.dtype) for d, w in zip(gradients, matrices, strict=True))
    return None, None, None, None, None, dx_TD, dweights_S, gradients


_round_of_words.defvjp(_round_forward, _round_backward)


# --- all rounds; the leading dimension P of routes, tokens and weights is that of parts ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(exchange, routes, x_PtD, weights_PtK, matrices):
    run = functools.partial(_round, exchange)
    first = [
        run(route, 0, x, weights, matrices)
        for route, x, weights in zip(*map(_unstacked, (routes, x_PtD, weights_PtK)), strict=True)
    ]
    return _further(exchange, routes, jnp.stack(first), x_PtD, weights_PtK, matrices)


def _further(exchange, routes, first_PtD, x_PtD, weights_PtK, matrices):
    def add(part, number, y_PtD):
        return y_PtD.at[part].add(
            _round(exchange, _at(routes, part), number, x_PtD[part], weights_PtK[part], matrices)
        )

    return _for_further_rounds(routes, add, first_PtD)


def _forward(exchange, routes, x_PtD, weights_PtK, matrices):
    first, pullbacks = [], []
    for route, x, weights in zip(*map(_unstacked, (routes, x_PtD, weights_PtK)), strict=True):
        y_tD, pullback = jax.vjp(
            functools.partial(_round, exchange, route, 0), x, weights, matrices
        )
        first.append(y_tD)
        pullbacks.append(pullback)
    y_PtD = _further(exchange, routes, jnp.stack(first), x_PtD, weights_PtK, matrices)
    return y_PtD, (pullbacks, routes, x_PtD, weights_PtK, matrices)


def _backward(exchange, residuals, dy_PtD):
    pullbacks, routes, x_PtD, weights_PtK, matrices = residuals
    gradients = [pullback(dy_tD) for pullback, dy_tD in zip(pullbacks, dy_PtD, strict=True)]
    dx, dweights, dmatrices = zip(*gradients, strict=True)

    def add(part, number, gradients):
        run = functools.partial(_round, exchange, _at(routes, part), number)
        dx_tD, dweights_tK, further = jax.vjp(run, x_PtD[part], weights_PtK[part], matrices)[1](
            dy_PtD[part]
        )
        dx_PtD, dweights_PtK, dmatrices = gradients
        return (
            dx_PtD.at[part].add(dx_tD),
            dweights_PtK.at[part].add(dweights_tK),
            jax.tree.map(jnp.add, dmatrices, further),
        )

    first = (
        jnp.stack(dx),
        jnp.stack(dweights),
        functools.reduce(functools.partial(jax.tree.map, jnp.add), dmatrices),
    )
    return None, *_for_further_rounds(routes, add, first)


_exchanged.defvjp(_forward, _backward)


def _for_further_rounds(routes, do, init):
    """do(part, number, value) for each round but the first of each part; one program for all of
    them.
    """
    rounds = lambda part, value: jax.lax.fori_loop(
        1, routes.rounds[part], functools.partial(do, part), value
    )
    return (
        rounds(0, init)
        if len(routes.rounds) == 1
        else jax.lax.fori_loop(0, len(routes.rounds), rounds, init)
    )


def _stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _at(tree, part):
    return jax.tree.map(lambda x: x[part], tree)


def _unstacked(tree) -> list:
    return [_at(tree, part) for part in range(len(jax.tree.leaves(tree)[0]))]
