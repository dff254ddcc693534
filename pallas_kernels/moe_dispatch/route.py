"""Where a device's (token, expert) pairs go over a mesh axis, in rounds of bounded size, and which
tokens go along.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.moe_dispatch.sorting import (
    Dispatch,
    few,
    pair_in,
    sort_by_expert,
    source_tokens,
    starts,
    take,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("source_R", "rank_TK", "device_TK", "expert_TK", "sent_n", "received_n", "rounds"),
    meta_fields=("quota", "num_local"),
)  # fmt: skip
@dataclasses.dataclass
class Route:
    """Where a device's pairs go and how many it gets, int32.

    source_R: pair in each row, sorted by device. device_TK: that a pair goes to, -1: none;
    expert_TK: among the num_local there.
    rank_TK: its place among the rows for that device. sent_n, received_n: rows for and from each
    device. rounds: of all devices.
    """

    source_R: jax.Array
    rank_TK: jax.Array
    device_TK: jax.Array
    expert_TK: jax.Array
    sent_n: jax.Array
    received_n: jax.Array
    rounds: jax.Array
    quota: int
    num_local: int

    def dispatch(self, number, pallas: bool) -> Dispatch:
        """Round `number` of what this device sends: its pairs in n * quota slots, those for a
        device together.
        """
        now = (self.device_TK >= 0) & (self.rank_TK // self.quota == number)
        slot_TK = jnp.where(now, self.device_TK * self.quota + self.rank_TK % self.quota, -1)
        if few(slot_TK.size):
            source = pair_in(slot_TK.reshape(-1), len(self.sent_n) * self.quota)
        else:
            index = number * self.quota + jnp.arange(self.quota)
            row_nq = (jnp.cumsum(self.sent_n) - self.sent_n)[:, None] + index
            source = jnp.where(
                index < self.sent_n[:, None], take(self.source_R, row_nq), -1
            ).reshape(-1)
        return Dispatch(
            source, slot_TK, self.sizes(self.sent_n, number), whole=False, pallas=pallas
        )

    def sizes(self, rows_n, number):
        """Those of rows for or from each device that go in a round."""
        return jnp.clip(rows_n - number * self.quota, 0, self.quota)

    def experts(self, dispatch: Dispatch):
        """Of the pair in each slot, at its device, [S]; num_local: none."""
        return jnp.where(
            dispatch.source_R < 0,
            self.num_local,
            take(self.expert_TK.reshape(-1), dispatch.source_R),
        )


def plan_route(axis: str, quota: int, expert_TK, num_local: int) -> Route:
    """Sorts a device's pairs by device and tells every other how many of them come."""
    devices = jax.lax.axis_size(axis)
    known = (expert_TK >= 0) & (expert_TK < devices * num_local)
    device_TK = jnp.where(known, expert_TK // num_local, -1)
    plan = sort_by_expert(device_TK, devices)
    sent_n = plan.group_sizes_E
    rank_TK = plan.slot_TK - starts(sent_n, device_TK)
    # Over all axes: where devices of another part of the mesh went on for longer, their collectives
    # would not meet.
    rounds = jax.lax.pmax(jnp.max(-(-sent_n // quota)), jax.sharding.get_abstract_mesh().axis_names)
    received_n = jax.lax.all_to_all(sent_n, axis, 0, 0, tiled=True)
    return Route(
        plan.source_R,
        rank_TK,
        device_TK,
        expert_TK % num_local,
        sent_n,
        received_n,
        rounds,
        quota,
        num_local,
    )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("source_S", "place_S", "sent_n"), meta_fields=()
)
@dataclasses.dataclass
class Rows:
    """A round's tokens, each once for every device that has experts of it, however many. source_S:
    token in each of n * quota places, those for a device together, -1: none. place_S: of each
    slot's token, among the places for its device. sent_n: tokens for each.
    """

    source_S: jax.Array
    place_S: jax.Array
    sent_n: jax.Array


def rows_once(dispatch: Dispatch, devices: int) -> Rows:
    """Of a dispatch whose slots for a device are sorted by token."""
    token_nq = source_tokens(dispatch).reshape(devices, -1)
    new_nq = (token_nq >= 0) & (
        token_nq != jnp.pad(token_nq[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    )
    place_nq = jnp.cumsum(new_nq, axis=1, dtype=jnp.int32) - 1
    slots = token_nq.size
    first_n = jnp.arange(devices, dtype=jnp.int32)[:, None] * token_nq.shape[1]
    source_S = (
        jnp.full(slots, -1, jnp.int32)
        .at[jnp.where(new_nq, first_n + place_nq, slots)]
        .set(token_nq, mode="drop")
    )
    return Rows(source_S, place_nq.reshape(-1), jnp.sum(new_nq, axis=1, dtype=jnp.int32))
