"""Dispatch and combine of few tokens, for TPU, as a kernel each: rows are gathered and summed by
products with one-hot matrices. The MXU is idle while decoding, and XLA takes some thirty
operations to sort so few numbers and to look them up. No gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret, tuning
from pallas_kernels.cost import cost
from pallas_kernels.grouped_matmul import rows
from pallas_kernels.grouped_matmul.shapes import LANES
from pallas_kernels.once import once

# of a one-hot matrix, whose product with tokens of 5,120 takes a v5p some 0.1 ms (estimated), less
# than reading an expert
CELLS = 2**19
COLUMNS = 512  # of a product
CORES = 2  # of a v5p chip, of which the kernels use one


class Dispatched(NamedTuple):
    """rows: [R, D] or as words, zeros where no pair is. slot_TK: row of each pair, int32, -1: none.
    sizes_G: pairs of each group, int32.
    """

    rows: jax.Array
    slot_TK: jax.Array
    sizes_G: jax.Array


def takes(num_tokens: int, num_rows: int, width: int, dtype) -> bool:
    """Whether `dispatch` and `combine` are worth it in the current trace, and hold tokens and rows
    in vector memory.
    """
    held = (num_tokens + num_rows) * width * jnp.dtype(dtype).itemsize + 16 * num_tokens * num_rows
    return num_tokens * num_rows <= CELLS and 2 * held <= tuning.vmem_limit()


@once("num_groups", "num_rows", "alignment", "words")
def dispatch(
    x_TD, group_TK, *, num_groups: int, num_rows: int, alignment: int = 1, words: bool
) -> Dispatched:
    """Rows of tokens, sorted by the group of each (token, choice) pair, stably.

    group_TK: int32; outside of 0..num_groups-1: no row. Every group's rows start at a multiple of
    alignment, one group after the other. words: give rows as words (grouped_matmul/rows.py).
    """
    (num_tokens, per_token), (width, dtype) = group_TK.shape, (x_TD.shape[1], x_TD.dtype)

    def kernel(group, x_ref, rows_ref, slot_ref, sizes_ref):
        lane, row = _iota((num_tokens, num_groups), 1), _iota((num_tokens, num_rows), 1)
        of_group = [_ones(group[:, k : k + 1] == lane) for k in range(per_token)]
        sizes = _sum(sum(of_group), axis=0)
        # For each pair's group: where it starts, its pairs in earlier tokens, and then those in
        # earlier choices.
        before = _before(_aligned(sizes, alignment)) + _dot(
            _ones(_iota((num_tokens,) * 2, 1) < _iota((num_tokens,) * 2, 0)), sum(of_group)
        )
        slots = []
        for own in of_group:
            slots.append(
                jnp.where(_sum(own, axis=1) > 0, _sum(own * before, axis=1).astype(jnp.int32), -1)
            )
            before += own
        cells = sum(_ones(slot == row) for slot in slots)
        # transposed once, not for each product
        onehot_RT = _over_tokens(cells, _eye(num_tokens)).astype(dtype)
        for at in _chunks(width):
            rows.store_columns(rows_ref, at.start, _dot(onehot_RT, x_ref[:, at]))
        slot_ref[...], sizes_ref[...] = jnp.concatenate(slots, axis=1), sizes.astype(jnp.int32)

    out = (
        rows.row_shape(num_rows, width, dtype)
        if words
        else jax.ShapeDtypeStruct((num_rows, width), dtype)
    )
    numbers = (
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (group_TK.shape, (1, num_groups))
    )
    costs = cost(x_TD, out, macs=CORES * num_rows * num_tokens * width)
    *found, sizes = _call(kernel, "dispatch_few", (group_TK, x_TD), [out, *numbers], costs)
    return Dispatched(*found, sizes[0])


@once("width", "dtype")
def combine(y, slot_TK, weights_TK, came=1, *, width: int, dtype) -> jax.Array:
    """y_t = sum_k weights_tk row(slot_tk), added in float32: [T, width] in dtype.

    y: rows, [R, width] in dtype or as words; of those that no pair has anything. slot_TK: int32,
    -1: nothing to add. weights_TK: None: 1.
    came: int32; 0: no row has come, and all of y is zeros.
    """
    (num_tokens, per_token), num_rows = slot_TK.shape, len(y)

    def kernel(came, slot, *refs):
        weights, (y_ref, out_ref) = refs[:-2], refs[-2:]
        row = jnp.where(came[0] > 0, _iota((num_tokens, num_rows), 1), num_rows)
        cells = [_ones(slot[:, k : k + 1] == row) for k in range(per_token)]
        live = _over_tokens(sum(cells), jnp.ones((num_tokens, LANES), jnp.float32))[:, :1] > 0
        parts = [sum(cells).astype(dtype)]
        if weights:
            parts = _parts(
                sum(weights[0][:, k : k + 1] * cell for k, cell in enumerate(cells)), dtype
            )
        for at in _chunks(width):
            values = (
                rows.load_columns(y_ref, 0, num_rows, at, dtype)
                if len(y_ref.shape) == 3
                else y_ref[:, at]
            )
            values = jnp.where(live, values, jnp.zeros_like(values))  # others may hold NaN
            out_ref[:, at] = sum(_dot(part, values) for part in parts).astype(dtype)

    weights = () if weights_TK is None else (weights_TK.astype(jnp.float32),)
    out = jax.ShapeDtypeStruct((num_tokens, width), dtype)
    costs = cost(y, out, macs=3 * CORES * num_rows * num_tokens * width)
    return _call(
        kernel,
        "combine_few",
        (slot_TK, *weights, y),
        out,
        costs,
        scalars=(jnp.asarray(came, jnp.int32).reshape(1),),
    )


class Chunks(NamedTuple):
    """What ragged_all_to_all takes, int32 [E]: of one chunk for each expert of all devices, or for
    each device and expert here. Where its rows lie, how many go, where they are to lie, and how
    many come.
    """

    offsets: jax.Array
    sizes: jax.Array
    offsets_there: jax.Array
    sizes_come: jax.Array


class Plan(NamedTuple):
    """there, back: of rows on their way to their experts, from where `dispatch` with all experts as
    groups has them, and back. steps_4e: of few_rows.steps_of for the experts here. fits: 1 where
    all devices have room for their rows, else 0 and all sizes are zeros.
    """

    there: Chunks
    back: Chunks
    steps_4e: jax.Array
    fits: jax.Array


@once("devices", "num_rows", "alignment")
def plan(counts_NE, device, group, *, devices: int, num_rows: int, alignment: int) -> Plan:
    """Where rows go that are sorted by expert and then by the device that they come from.

    counts_NE: int32, how many rows each device has for each expert, of all groups of `devices`
    devices, one group after the other. A device has E / devices of its group's experts. device,
    group: int32, this one. num_rows: that a device has room for; each expert's start at a multiple
    of alignment.
    """
    num_all, num_experts = counts_NE.shape
    local, groups = num_experts // devices, num_all // devices

    def kernel(
        place,
        counts_ref,
        own_ref,
        size_ref,
        there_ref,
        come_ref,
        come_at_ref,
        come_from_ref,
        steps_ref,
        fits_ref,
    ):
        device, first = place[0], place[1] * devices
        counts_NE = counts_ref[...].astype(jnp.float32)
        expert, sender = _iota((devices, num_experts), 1), _iota((devices, num_experts), 0)
        owner = _over(expert, local)
        of_device = _ones(owner == sender)
        members = _ones(_over(_iota((groups, num_all), 1), devices) == _iota((groups, num_all), 0))
        taken_Gn = _over_lanes(_aligned(_dot(members, counts_NE), alignment), of_device)
        fits = _ones(jnp.max(taken_Gn, axis=(0, 1), keepdims=True) <= num_rows)
        c_nE = (
            _dot(
                _ones(_iota((devices, num_all), 1) == _iota((devices, num_all), 0) + first),
                counts_NE,
            )
            * fits
        )
        aligned_E = _aligned(_sum(c_nE, axis=0), alignment)
        starts_E = _before(aligned_E) - _dot(_before(_over_lanes(aligned_E, of_device)), of_device)
        there_nE = starts_E + _dot(_ones(_iota((devices,) * 2, 1) < _iota((devices,) * 2, 0)), c_nE)
        here_nE, mine = _before(c_nE), _ones(sender == device)
        # [1, E] in the order of devices and, of each, of the experts here: these columns over and
        # over, of which each device has its own.
        here_E = expert[:1] - owner[:1] * local + device * local
        columns = _ones(_iota((num_experts,) * 2, 0) == here_E)
        outs = own_ref, size_ref, there_ref, come_ref, come_at_ref, come_from_ref
        numbers = [x_nE * mine for x_nE in (here_nE, c_nE, there_nE)] + [
            _dot(x_nE, columns) * of_device for x_nE in (c_nE, there_nE, here_nE)
        ]
        for ref, x_nE in zip(outs, numbers, strict=True):
            ref[...] = _sum(x_nE, axis=0).astype(jnp.int32)
        own_experts = _ones(
            _iota((num_experts, local), 0) == _iota((num_experts, local), 1) + device * local
        )
        tiles_e = _dot(aligned_E, own_experts) * (1 / alignment)
        used_e = _ones(tiles_e > 0)
        # which group stands in each place
        place_ee = _ones(_before(used_e).astype(jnp.int32) == _iota((local, local), 0)) * used_e
        of_places = [
            _over_lanes(x_e, place_ee)
            for x_e in (_iota((1, local), 1).astype(jnp.float32), _before(tiles_e), tiles_e)
        ]
        steps_ref[...] = jnp.concatenate(
            [*of_places, _sum(used_e, axis=1) + jnp.zeros_like(used_e)], axis=0
        ).astype(jnp.int32)
        fits_ref[...] = fits.astype(jnp.int32)

    place = jnp.stack([jnp.asarray(device, jnp.int32), jnp.asarray(group, jnp.int32)])
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.int32)
        for shape in (*[(1, num_experts)] * 6, (4, local), (1, 1))
    ]
    *numbers, steps_4e, fits = _call(
        kernel, "plan_few", (counts_NE,), shapes, cost(counts_NE), scalars=(place,)
    )
    own, size, there, come, come_at, come_from = (x[0] for x in numbers)
    return Plan(
        Chunks(own, size, there, come), Chunks(come_at, come, come_from, size), steps_4e, fits[0, 0]
    )


def _call(kernel, name: str, arrays, out_shape, cost_estimate, scalars=()):
    return pl.pallas_call(
        kernel,
        in_specs=[
            *[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars),
            *[pl.BlockSpec(memory_space=pltpu.VMEM)] * len(arrays),
        ],
        out_specs=jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.VMEM), out_shape),
        out_shape=out_shape,
        cost_estimate=cost_estimate,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tuning.vmem_limit()),
        interpret=interpret.params(),
        name=name,
    )(*scalars, *arrays)


# --- inside of kernels: whole numbers as float32, which holds them exactly up to 2**24 ---


def _iota(shape, axis: int):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _ones(there):
    return jnp.where(there, 1.0, 0.0)


def _eye(size: int):
    return _ones(_iota((size, size), 0) == _iota((size, size), 1))


def _sum(x, axis: int):
    return jnp.sum(x, axis=axis, keepdims=True)


def _aligned(sizes, alignment: int):
    return jnp.ceil(sizes * (1 / alignment)) * alignment


def _over(number, size: int):
    """number // size."""
    return jnp.floor((number.astype(jnp.float32) + 0.5) * (1 / size)).astype(jnp.int32)


def _before(sizes_AG):
    """Sums over earlier lanes."""
    size = sizes_AG.shape[1]
    return _dot(sizes_AG, _ones(_iota((size, size), 0) < _iota((size, size), 1)))


def _dot(a, b):
    return _product(a, b, 1, 0)


def _over_tokens(a_TR, b_TN):
    """a^T b, [R, N]."""
    return _product(a_TR, b_TN, 0, 0)


def _over_lanes(a_AE, b_NE):
    """a b^T, [A, N]."""
    return _product(a_AE, b_NE, 1, 1)


def _product(a, b, a_axis: int, b_axis: int):
    rows = a.shape[0]
    if a_axis == 1 and rows < 8:
        a = jnp.concatenate([a] * 8, axis=0)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    product = lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )
    return product[:rows] if a_axis == 1 else product


def _parts(x, dtype) -> list:
    """x as a sum of arrays of a type: of bfloat16 three, which hold a float32's 24 bits."""
    if dtype == x.dtype:
        return [x]
    parts = []
    for _ in range(3):
        parts.append(x.astype(dtype))
        x -= parts[-1].astype(x.dtype)
    return parts


def _chunks(width: int) -> list[slice]:
    return [slice(start, min(start + COLUMNS, width)) for start in range(0, width, COLUMNS)]
