"""What a kernel costs, for XLA, which overlaps collectives with it, and for the planner."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def cost(*arrays: jax.Array | jax.ShapeDtypeStruct, macs: int = 0) -> pl.CostEstimate:
    """arrays: what is read or written once, anything with a shape and a type. macs:
    multiply-adds.
    """
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return pl.CostEstimate(flops=2 * macs, bytes_accessed=moved, transcendentals=0)
