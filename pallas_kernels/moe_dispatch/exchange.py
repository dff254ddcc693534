"""The routed experts over a mesh axis, each device holding E / n of them: rows travel to their experts' devices and back.

Dropless in bounded memory: in each round a device sends every other at most `quota` rows, so buffers hold n * quota rows, which is
`factor` times its own T * K; what does not fit goes in the next round. All devices count rounds alike, from the largest number of
rows that any device has for any other; under balanced routing there is one round.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.moe_dispatch.api import chosen, routed_ffn
from pallas_kernels.moe_dispatch.kernel import unwritten
from pallas_kernels.moe_dispatch.sorting import Dispatch, combine_rows, gather_rows, gather_weights, sort_by_expert, take
from pallas_kernels.target import target_platform

COLLECTIVES = ("all_to_all", "ragged_all_to_all")


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
    return _exchanged(exchange, plan_route(exchange, expert_TK, down_eFD.shape[0]), x_TD, weights_TK, (gate_eDF, up_eDF, down_eFD))


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
    devices = jax.lax.axis_size(exchange.axis)
    layout = ragged_layout(devices, len(x_SD) // devices, jax.lax.axis_index(exchange.axis), send_n, receive_n)
    # XLA sends rows of two lines. Asked for so, it gets them in buffers that nobody has to fill or to lay out anew.
    rows = x_SD.reshape(len(x_SD), 2, -1)
    if target_platform() == "tpu":
        buffer = unwritten(rows.shape, rows.dtype, send_n, name=f"unwritten_{direction}")
    else:
        buffer = jax.lax.empty(rows.shape, rows.dtype)
    return jax.lax.ragged_all_to_all(rows, buffer, *layout, axis_name=exchange.axis).reshape(x_SD.shape)


def _send_backward(exchange, sizes, dy_SD):
    return _send(exchange, "back", dy_SD, *reversed(sizes)), None, None


send.defvjp(lambda exchange, x_SD, *sizes: (send(exchange, x_SD, *sizes), sizes), _send_backward)


def _round(exchange: Exchange, route: Route, number, x_TD, weights_TK, matrices):
    """What the rows of one round add to y [T, D]."""
    implementation = chosen(exchange.implementation)
    dispatch = route.dispatch(number, implementation == "pallas")
    there = dispatch.group_sizes_E, route.sizes(jnp.sum(route.received_ne, axis=1), number)
    x_SD = checkpoint_name(send(exchange, gather_rows(x_TD, dispatch), *there), "expert_rows")
    # Weights go along, so that the expert's kernels multiply by them and find their gradients: here that would take passes over all rows.
    weights_S1 = jax.lax.all_to_all(gather_weights(weights_TK, dispatch)[:, None], exchange.axis, 0, 0, tiled=True)
    y_SD = routed_ffn(x_SD, route.received_experts(number), weights_S1, *matrices, implementation=implementation)
    return combine_rows(send(exchange, y_SD, *reversed(there)), None, dispatch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(exchange, route, x_TD, weights_TK, matrices):
    first_TD = _round(exchange, route, 0, x_TD, weights_TK, matrices)
    return _further(exchange, route, first_TD, x_TD, weights_TK, matrices)


def _further(exchange, route, first_TD, x_TD, weights_TK, matrices):
    add = lambda number, y_TD: y_TD + _round(exchange, route, number, x_TD, weights_TK, matrices)  # noqa: E731
    return jax.lax.fori_loop(1, route.rounds, add, first_TD)


def _forward(exchange, route, x_TD, weights_TK, matrices):
    first_TD, pullback = jax.vjp(functools.partial(_round, exchange, route, 0), x_TD, weights_TK, matrices)
    return _further(exchange, route, first_TD, x_TD, weights_TK, matrices), (pullback, route, x_TD, weights_TK, matrices)


def _backward(exchange, residuals, dy_TD):
    pullback, route, *arguments = residuals

    def add(number, gradients):
        further = jax.vjp(functools.partial(_round, exchange, route, number), *arguments)[1](dy_TD)
        return jax.tree.map(jnp.add, gradients, further)

    return None, *jax.lax.fori_loop(1, route.rounds, add, pullback(dy_TD))


_exchanged.defvjp(_forward, _backward)
