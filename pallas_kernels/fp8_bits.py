"""float8_e4m3fn to bfloat16 inside of a kernel by shifts and masks: a third of the conversion's
work on chips that have none of their own.

Rows come out in another order, and scaled; whatever is multiplied by them has to be in that order,
too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

LANES = 128
PACK = 32  # float8 rows of a register
SCALE = 2.0**-120  # of what comes out, over what went in
LIFT = 2.0**64  # on what is multiplied by that, so that the products are no subnormal numbers
CHIPS = ("v4", "v5e", "v5p", "v6e")  # kinds without a conversion of their own


def to_bfloat16(values: jax.Array) -> jax.Array:
    """[K, N] as bfloat16 SCALE times it; of every 32 rows the even ones, then the odd ones. Where
    the chip takes bfloat16's subnormal numbers for zero, so does this float8's, which are below
    2^-6.

    A register's 32-bit lane holds rows 4i..4i+3. Sign and the other seven bits of the even ones,
    then of the odd ones, move to where bfloat16 has them.
    """
    lanes = pltpu.bitcast(values, jnp.int32)
    sign, rest = jnp.int32(-0x7FFF8000), jnp.int32(0x07F007F0)  # 0x80008000
    even = ((lanes << 8) & sign) | ((lanes << 4) & rest)
    odd = (lanes & sign) | ((lanes >> 4) & rest)
    halves = [
        pltpu.bitcast(half, jnp.bfloat16).reshape(-1, PACK // 2, values.shape[1])
        for half in (even, odd)
    ]
    return jnp.concatenate(halves, axis=1).reshape(values.shape)


def in_order(x: jax.Array) -> jax.Array:
    """x [..., K] in the order of to_bfloat16's rows.

    By a product with a permutation, which is exact: XLA:TPU transposes 2 x 16 numbers within a
    register 30 times as slowly.
    """
    unit = LANES if x.shape[-1] % LANES == 0 else PACK
    permutation = jnp.asarray(np.eye(unit)[:, _source(np.arange(unit))], x.dtype)
    blocks = x.reshape(*x.shape[:-1], -1, unit)
    return jnp.einsum(
        "...k,kl->...l", blocks, permutation, precision=jax.lax.Precision.HIGHEST
    ).reshape(x.shape)


def in_order_lifted(x: jax.Array) -> jax.Array:
    """Inside of a kernel: LIFT times in_order's, of bfloat16 [R, K], K a multiple of 128."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    permutation = jnp.where(row == _source(column), LIFT, 0.0).astype(x.dtype)
    parts = [x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)]
    return jnp.concatenate(
        [
            jnp.dot(part, permutation, preferred_element_type=jnp.float32).astype(x.dtype)
            for part in parts
        ],
        axis=1,
    )


def _source(place):
    """Of which row what to_bfloat16 puts at a place is."""
    return place - place % PACK + place % (PACK // 2) * 2 + place % PACK // (PACK // 2)
