"""The routed experts over a mesh axis, each device holding E / n of them: rows travel to their experts' devices and back.

Dropless in bounded memory: in each round a device sends every other at most `quota` rows, so buffers hold n * quota rows, which is
`factor` times its own T * K; what does not fit goes in the next round. All devices count rounds alike, from the largest number of
rows that any device has for any other; under balanced routing there is one round. Many tokens go in parts, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.grouped_matmul.rows import pack
from pallas_kernels.moe_dispatch import routed
from pallas_kernels.moe_dispatch.api import chosen, routed_ffn
from pallas_kernels.moe_dispatch.kernel import copy_rows, unwritten
from pallas_kernels.moe_dispatch.routed import FEW_PAIRS
from pallas_kernels.moe_dispatch.sorting import (
    Dispatch,
    combine_rows,
    gather_rows,
    gather_weights,
    sort_by_expert,
    source_tokens,
    sum_words,
    take,
)
from pallas_kernels.target import target_platform

COLLECTIVES = ("all_to_all", "ragged_all_to_all")
MOST_PARTS, PART_PAIRS = 4, 2**16  # of a device's tokens, and (token, expert) pairs of a part: 4,096 rows for each of 16 experts


@dataclasses.dataclass(frozen=True)
class Exchange:
    """axis: of the mesh, over which experts are split. collective: `all_to_all` sends whole slots, `ragged_all_to_all` (TPU, GPU) only
    the rows in them. factor: rows of a buffer over T * K. implementation: of routed_ffn.
    """

    axis: str
    collective: str
    factor: float
    implementation: str

    def __post_init__(self):
        if self.collective not in COLLECTIVES:
            raise ValueError(f"collective={self.collective!r} is not one of {', '.join(COLLECTIVES)}")
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ValueError(f"factor={self.factor}: must be a positive number")

    def quota(self, num_pairs: int) -> int:
        """Rows from one device to another in a round, of num_pairs that each has."""
        return min(num_pairs, math.ceil(self.factor * num_pairs / jax.lax.axis_size(self.axis)))


def routed_exchange(x_TD, expert_TK, weights_TK, gate_eDF, up_eDF, down_eFD, exchange: Exchange) -> jax.Array:
    """routed_ffn with the experts of all devices of an axis, inside jax.shard_map over it.

    Args:
      x_TD, weights_TK: this device's tokens and their weights.
      expert_TK: index among all n * e experts, device i holding those from i * e on; outside of them: no expert.
      gate_eDF, up_eDF, down_eFD: this device's experts, as routed_ffn takes them.

    Returns:
      [T, D]. Differentiable in x, weights and matrices. The backward pass goes the same rounds: the first with what the forward pass kept,
      the others computed anew, so that its memory does not grow with their number.

    Raises:
      ValueError: where XLA has no such collective for the platform, and as routed_ffn.
    """
    if exchange.collective == "ragged_all_to_all" and target_platform() == "cpu":
        raise ValueError("collective='ragged_all_to_all': XLA has none for CPUs; 'all_to_all' works everywhere")
    parts = num_parts(exchange, expert_TK.shape)
    split = lambda x: x.reshape(parts, -1, *x.shape[1:])  # noqa: E731
    routes = [plan_route(exchange, expert_tK, down_eFD.shape[0]) for expert_tK in split(expert_TK)]
    y_PtD = _exchanged(exchange, _stacked(routes), split(x_TD), split(weights_TK), (gate_eDF, up_eDF, down_eFD))
    return y_PtD.reshape(x_TD.shape)


def num_parts(exchange: Exchange, shape: tuple[int, int]) -> int:
    """Parts of [T, K] pairs that are exchanged one after the other, so that one's exchange runs beside another's products.

    Only what XLA starts early is worth it, and only where each part has enough rows to pay for reading the matrices again.
    """
    fits = [n for n in range(1, MOST_PARTS + 1) if shape[0] % n == 0 and math.prod(shape) // n >= PART_PAIRS]
    return max(fits, default=1) if exchange.collective == "ragged_all_to_all" else 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("source_R", "rank_TK", "device_TK", "sent_n", "received_ne", "rounds"), meta_fields=("quota",),
)  # fmt: skip
@dataclasses.dataclass
class Route:
    """Where a device's pairs go and what it gets, int32.

    source_R: pair in each row, sorted by expert, so by device. device_TK: that a pair goes to, -1: none. rank_TK: its place among the rows
    for that device. sent_n: rows for each device. received_ne: rows from each device for each expert here. rounds: of all devices.
    """

    source_R: jax.Array
    rank_TK: jax.Array
    device_TK: jax.Array
    sent_n: jax.Array
    received_ne: jax.Array
    rounds: jax.Array
    quota: int

    def dispatch(self, number, pallas: bool) -> Dispatch:
        """Round `number` of what this device sends: its pairs in n * quota slots, those for a device together."""
        index = number * self.quota + jnp.arange(self.quota)
        row_nq = (jnp.cumsum(self.sent_n) - self.sent_n)[:, None] + index
        source = jnp.where(index < self.sent_n[:, None], take(self.source_R, row_nq), -1).reshape(-1)
        now = (self.device_TK >= 0) & (self.rank_TK // self.quota == number)
        slot_TK = jnp.where(now, self.device_TK * self.quota + self.rank_TK % self.quota, -1)
        return Dispatch(source, slot_TK, self.sizes(self.sent_n, number), whole=False, pallas=pallas)

    def sizes(self, rows_n, number):
        """Those of rows for or from each device that go in a round."""
        return jnp.clip(rows_n - number * self.quota, 0, self.quota)

    def received_experts(self, number):
        """Expert here of every slot that a round fills, [n * quota, 1]; e where a slot stays empty."""
        ends_ne = jnp.cumsum(self.received_ne, axis=1)
        index = number * self.quota + jnp.arange(self.quota)
        return jnp.sum(index[None, :, None] >= ends_ne[:, None, :], axis=-1, dtype=jnp.int32).reshape(-1, 1)


def plan_route(exchange: Exchange, expert_TK, num_local: int) -> Route:
    """Sorts a device's pairs by expert and tells every other how many of them come."""
    devices = jax.lax.axis_size(exchange.axis)
    plan = sort_by_expert(expert_TK, devices * num_local)
    counts_ne = plan.group_sizes_E.reshape(devices, num_local)
    sent_n = jnp.sum(counts_ne, axis=1)
    known = (expert_TK >= 0) & (expert_TK < devices * num_local)
    device_TK = jnp.where(known, expert_TK // num_local, -1)
    rank_TK = plan.slot_TK - take(jnp.cumsum(sent_n) - sent_n, device_TK)
    quota = exchange.quota(expert_TK.size)
    # Over all axes: where devices of another part of the mesh went on for longer, their collectives would not meet.
    rounds = jax.lax.pmax(jnp.max(-(-sent_n // quota)), jax.sharding.get_abstract_mesh().axis_names)
    received_ne = jax.lax.all_to_all(counts_ne, exchange.axis, 0, 0, tiled=True)
    return Route(plan.source_R, rank_TK, device_TK, sent_n, received_ne, rounds, quota)


def ragged_layout(devices: int, quota: int, device, send_n, receive_n):
    """What ragged_all_to_all takes: offsets and sizes of what is sent, offsets at the receivers, sizes of what is received, int32 [n].
    Slots as all_to_all has them: those for device d at d * quota, and at d those from here at (this device) * quota.
    """
    offsets = jnp.arange(devices, dtype=jnp.int32) * quota
    return offsets, send_n.astype(jnp.int32), jnp.full(devices, device * quota, jnp.int32), receive_n.astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(exchange: Exchange, x_SD, send_n, receive_n):
    """Slots [n * quota, D] to their devices, send_n rows of those for each; what empty slots hold is unknown. The gradient goes back."""
    return _send(exchange, "forth", x_SD, send_n, receive_n)


def _send(exchange: Exchange, direction: str, x_SD, send_n, receive_n):
    if exchange.collective == "all_to_all":
        return jax.lax.all_to_all(x_SD, exchange.axis, 0, 0, tiled=True)
    # XLA sends rows of two lines. Asked for so, it gets them in buffers that nobody has to fill or to lay out anew.
    rows = x_SD.reshape(len(x_SD), 2, -1)
    if target_platform() == "tpu":
        buffer = unwritten(rows.shape, rows.dtype, send_n, name=f"unwritten_{direction}")
    else:
        buffer = jax.lax.empty(rows.shape, rows.dtype)
    return _ragged(exchange, rows, buffer, send_n, receive_n).reshape(x_SD.shape)


def _ragged(exchange: Exchange, rows, buffer, send_n, receive_n):
    devices = jax.lax.axis_size(exchange.axis)
    layout = ragged_layout(devices, len(rows) // devices, jax.lax.axis_index(exchange.axis), send_n, receive_n)
    return jax.lax.ragged_all_to_all(rows, buffer, *layout, axis_name=exchange.axis)


send.defvjp(
    lambda exchange, x_SD, *sizes: (send(exchange, x_SD, *sizes), sizes),
    lambda exchange, sizes, dy_SD: (_send(exchange, "back", dy_SD, *reversed(sizes)), None, None),
)


def _send_words(exchange: Exchange, name: str, words_S1W, send_n, receive_n):
    """The same of words, which XLA sends as they lie, and one of zeros behind. name: one for each array that is alive at a time."""
    num_rows, *rest = words_S1W.shape
    if exchange.collective == "all_to_all":
        sent = jax.lax.all_to_all(words_S1W, exchange.axis, 0, 0, tiled=True)
        return jnp.pad(sent, ((0, 1), (0, 0), (0, 0)))
    buffer = unwritten((num_rows + 1, *rest), words_S1W.dtype, send_n, name=f"unwritten_{name}")
    return _ragged(exchange, words_S1W, buffer, send_n, receive_n)


def _round(exchange: Exchange, route: Route, number, x_TD, weights_TK, matrices):
    """What the rows of one round add to y [T, D]."""
    implementation = chosen(exchange.implementation)
    words = implementation == "pallas" and route.received_ne.shape[0] * route.quota > FEW_PAIRS
    dispatch = route.dispatch(number, implementation == "pallas")
    there = dispatch.group_sizes_E, route.sizes(jnp.sum(route.received_ne, axis=1), number)
    # Weights go along, so that the expert's kernels multiply by them and find their gradients: here that would take passes over all rows.
    weights_S1 = jax.lax.all_to_all(gather_weights(weights_TK, dispatch)[:, None], exchange.axis, 0, 0, tiled=True)
    experts_S1 = route.received_experts(number)
    if words:
        return _round_of_words(exchange, dispatch, there, experts_S1, x_TD, weights_S1, matrices)
    x_SD = checkpoint_name(send(exchange, gather_rows(x_TD, dispatch), *there), "expert_rows")
    y_SD = routed_ffn(x_SD, experts_S1, weights_S1, *matrices, implementation=implementation)
    return combine_rows(send(exchange, y_SD, *reversed(there)), None, dispatch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _round_of_words(exchange: Exchange, dispatch: Dispatch, there, experts_S1, x_TD, weights_S1, matrices):
    """A round by the TPU kernels: rows stay words from the packing of tokens to the sums of their results."""
    return _words_forward(exchange, dispatch, there, experts_S1, x_TD, weights_S1, routed.in_type(matrices, x_TD.dtype), keep=False)[0]


def _words_forward(exchange, dispatch, there, experts_S1, x_TD, weights_S1, matrices, *, keep: bool):
    width, dtype = x_TD.shape[1], x_TD.dtype
    x = _send_words(exchange, "rows", copy_rows(pack(x_TD), source_tokens(dispatch)), *there)
    x = checkpoint_name(x, "expert_rows")
    plan = routed.plan_rows(experts_S1, len(matrices[2]))
    weights_R = take(weights_S1.reshape(-1), plan.source_R)
    y, kept = routed.forward(x, plan, weights_R, matrices, dtype, keep=keep)
    back = _send_words(exchange, "results", copy_rows(y, plan.slot_TK.reshape(-1)), *reversed(there))
    return sum_words(back, None, dispatch, width=width, dtype=dtype), (x, plan, weights_R, kept)


def _round_forward(exchange, dispatch, there, experts_S1, x_TD, weights_S1, matrices):
    typed = routed.in_type(matrices, x_TD.dtype, differentiable=True)
    y_TD, kept = _words_forward(exchange, dispatch, there, experts_S1, x_TD, weights_S1, typed, keep=True)
    return y_TD, (dispatch, there, weights_S1, matrices, kept)


def _round_backward(exchange, residuals, dout_TD):
    dispatch, there, weights_S1, matrices, (x, plan, weights_R, kept) = residuals
    width, dtype = dout_TD.shape[1], dout_TD.dtype
    dout = _send_words(exchange, "result_gradients", copy_rows(pack(dout_TD), source_tokens(dispatch)), *there)
    dx, dweights_R, gradients = routed.backward(x, dout, plan, weights_R, routed.in_type(matrices, dtype), kept, dtype)
    back = _send_words(exchange, "row_gradients", copy_rows(dx, plan.slot_TK.reshape(-1)), *reversed(there))
    dx_TD = sum_words(back, None, dispatch, width=width, dtype=dtype)
    dweights_S1 = take(dweights_R, plan.slot_TK).astype(weights_S1.dtype)
    gradients = tuple(d.astype(w.dtype) for d, w in zip(gradients, matrices, strict=True))
    return None, None, None, dx_TD, dweights_S1, gradients


_round_of_words.defvjp(_round_forward, _round_backward)


# --- all rounds; the leading dimension P of routes, tokens and weights is that of parts ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(exchange, routes, x_PtD, weights_PtK, matrices):
    run = functools.partial(_round, exchange)
    first = [run(route, 0, x, weights, matrices) for route, x, weights in zip(*map(_unstacked, (routes, x_PtD, weights_PtK)), strict=True)]
    return _further(exchange, routes, jnp.stack(first), x_PtD, weights_PtK, matrices)


def _further(exchange, routes, first_PtD, x_PtD, weights_PtK, matrices):
    def add(part, number, y_PtD):
        return y_PtD.at[part].add(_round(exchange, _at(routes, part), number, x_PtD[part], weights_PtK[part], matrices))

    return _for_further_rounds(routes, add, first_PtD)


def _forward(exchange, routes, x_PtD, weights_PtK, matrices):
    first, pullbacks = [], []
    for route, x, weights in zip(*map(_unstacked, (routes, x_PtD, weights_PtK)), strict=True):
        y_tD, pullback = jax.vjp(functools.partial(_round, exchange, route, 0), x, weights, matrices)
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
        dx_tD, dweights_tK, further = jax.vjp(run, x_PtD[part], weights_PtK[part], matrices)[1](dy_PtD[part])
        dx_PtD, dweights_PtK, dmatrices = gradients
        return dx_PtD.at[part].add(dx_tD), dweights_PtK.at[part].add(dweights_tK), jax.tree.map(jnp.add, dmatrices, further)

    first = jnp.stack(dx), jnp.stack(dweights), functools.reduce(functools.partial(jax.tree.map, jnp.add), dmatrices)
    return None, *_for_further_rounds(routes, add, first)


_exchanged.defvjp(_forward, _backward)


def _for_further_rounds(routes, do, init):
    """do(part, number, value) for each round but the first of each part; one program for all of them."""
    rounds = lambda part, value: jax.lax.fori_loop(1, routes.rounds[part], functools.partial(do, part), value)  # noqa: E731
    return rounds(0, init) if len(routes.rounds) == 1 else jax.lax.fori_loop(0, len(routes.rounds), rounds, init)


def _stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _at(tree, part):
    return jax.tree.map(lambda x: x[part], tree)


def _unstacked(tree) -> list:
    return [_at(tree, part) for part in range(len(jax.tree.leaves(tree)[0]))]
