"""Attention by the TPU kernels: what they take is made of what api.attention takes, and their
gradients are joined.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention import kernel
from pallas_kernels.attention.backward_kernel import BackwardQueries, backward
from pallas_kernels.attention.kernel import Queries, forward
from pallas_kernels.attention.rotary import head_products
from pallas_kernels.attention.shapes import blocks_for
from pallas_kernels.attention.tiles import tiles
from pallas_kernels.attention.walk import LANES, Blocks, Keys
from pallas_kernels.tuning import vmem_limit

LOG2_E = math.log2(math.e)


def attention(q_BLNH, k_BMGH, v_BMGH, q_ids_BL, kv_ids_BM, scale: float, q_offset, kv_offset):
    """As api.attention with all arguments given: out [B, L, N, H] and log-sum-exp [B, L, N]."""
    size = q_BLNH.shape[-1]
    # A half-filled head costs the MXU as much as a full one.
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -size % LANES)))
    q_BLNH = pad((q_BLNH * (scale * LOG2_E)).astype(q_BLNH.dtype))
    k_BMGH = pad(k_BMGH)
    v_BMGH = pad(v_BMGH)
    flat = (x.reshape(*x.shape[:2], -1) for x in (q_BLNH, k_BMGH, v_BMGH))
    norms = (_norms(x).swapaxes(1, 2) for x in (q_BLNH, k_BMGH))
    out_BLX, lse_BNL = attention_of_heads(*flat, *norms, q_ids_BL, kv_ids_BM, q_offset, kv_offset)
    return out_BLX.reshape(q_BLNH.shape)[..., :size], lse_BNL.swapaxes(1, 2)


def attention_of_heads(
    q_BLX, k_BMY, v_BMY, q_norms_BNL, k_norms_BGM, q_ids_BL, kv_ids_BM, q_offset=0, kv_offset=0
):
    """The same of heads side by side whose queries have been multiplied by scale x log2 e, given
    bounds of the heads' lengths: out [B, L, N x H] and log-sum-exp [B, N, L].
    """
    length, heads, groups = q_BLX.shape[1], q_norms_BNL.shape[1], k_norms_BGM.shape[1]
    per_group = heads // groups
    blocks = {
        pass_: blocks_for(length, k_BMY.shape[1], per_group, q_BLX.dtype, pass_)
        for pass_ in ("forward", "backward")
    }
    # Whole blocks; what is added sees nothing and is not seen.
    q_block, kv_block = (
        math.lcm(*(getattr(b, name) for b in blocks.values())) for name in ("q", "kv")
    )
    pad = lambda x, block, axis=1: jnp.pad(
        x, [(0, -n % block if a == axis else 0) for a, n in enumerate(x.shape)]
    )
    offsets = jnp.asarray(q_offset, jnp.int32), jnp.asarray(kv_offset, jnp.int32)
    # for roundings of both
    bound_BNL = (
        q_norms_BNL
        * jnp.repeat(jnp.max(k_norms_BGM, axis=-1), per_group, axis=1)[..., None]
        * 1.001
    )
    shift_BNL = jnp.maximum(pad(bound_BNL, q_block, 2) - kernel.HEADROOM, 0)
    shift_BGPL = jax.lax.stop_gradient(shift_BNL).reshape(len(shift_BNL), groups, per_group, -1)
    wide = pad(q_BLX, q_block), pad(k_BMY, kv_block), pad(v_BMY, kv_block)
    ids = pad(q_ids_BL, q_block), pad(kv_ids_BM, kv_block)
    out_BLX, lse_BGPL = _attend(
        *wide, shift_BGPL, *ids, offsets, blocks["forward"], blocks["backward"]
    )
    return out_BLX[:, :length], lse_BGPL.reshape(shift_BNL.shape)[..., :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attend(
    q_BLX,
    k_BMY,
    v_BMY,
    shift_BGPL,
    q_ids_BL,
    kv_ids_BM,
    offsets,
    forward_blocks: Blocks,
    backward_blocks: Blocks,
):
    return _attend_forward(
        q_BLX,
        k_BMY,
        v_BMY,
        shift_BGPL,
        q_ids_BL,
        kv_ids_BM,
        offsets,
        forward_blocks,
        backward_blocks,
    )[0]


def _attend_forward(q_BLX, k_BMY, v_BMY, shift_BGPL, q_ids_BL, kv_ids_BM, offsets, blocks, _):
    q_ids, kv_ids = _ids(q_ids_BL, kv_ids_BM, blocks)
    listed = tiles(q_ids_BL, kv_ids_BM, *offsets, blocks.q, blocks.kv)
    queries, keys = Queries(q_BLX, shift_BGPL, q_ids), Keys(k_BMY, v_BMY, kv_ids)
    out, lse = forward(queries, keys, listed, blocks, vmem_limit())
    return (out, lse), (q_BLX, k_BMY, v_BMY, q_ids_BL, kv_ids_BM, offsets, out, lse)


def _attend_backward(_, blocks, residuals, cotangents):
    q_BLX, k_BMY, v_BMY, q_ids_BL, kv_ids_BM, offsets, out, lse = residuals
    dout, dlse = cotangents
    delta = head_products(out, dout).reshape(lse.shape) - dlse
    q_ids, kv_ids = _ids(q_ids_BL, kv_ids_BM, blocks)
    listed = tiles(q_ids_BL, kv_ids_BM, *offsets, blocks.q, blocks.kv)
    queries = BackwardQueries(q_BLX, dout, lse * LOG2_E, delta, q_ids)
    dq, dk, dv = backward(queries, Keys(k_BMY, v_BMY, kv_ids), listed, blocks, vmem_limit())
    return dq, dk.astype(k_BMY.dtype), dv.astype(v_BMY.dtype), None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _norms(x):
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


def _ids(q_ids_BL, kv_ids_BM, blocks: Blocks):
    return q_ids_BL[:, None], kv_ids_BM.reshape(kv_ids_BM.shape[0], -1, 1, blocks.kv)
