"""Attention by the TPU kernels: what they take is made of what api.attention takes, and their gradients are joined."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention import kernel
from pallas_kernels.attention.backward_kernel import backward
from pallas_kernels.attention.kernel import LANES, forward
from pallas_kernels.attention.shapes import Blocks, blocks_for
from pallas_kernels.attention.tiles import tiles
from pallas_kernels.tuning import vmem_limit

LOG2_E = math.log2(math.e)


def attention(q_BLNH, k_BMGH, v_BMGH, q_ids_BL, kv_ids_BM, scale: float, q_offset, kv_offset):
    """As api.attention with all arguments given: out [B, L, N, H] and log-sum-exp [B, L, N]."""
    _, length, heads, size = q_BLNH.shape
    shape = length, k_BMGH.shape[1], heads // k_BMGH.shape[2], q_BLNH.dtype
    blocks = {pass_: blocks_for(*shape, pass_) for pass_ in ("forward", "backward")}
    # A half-filled head costs the unit as much as a full one. Whole blocks; what is added sees nothing and is not seen.
    q_block, kv_block = (math.lcm(*(getattr(b, name) for b in blocks.values())) for name in ("q", "kv"))
    pad = lambda x, block: jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, -size % LANES)))  # noqa: E731
    pad_ids = lambda ids, block: jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)))  # noqa: E731
    scaled = (q_BLNH * (scale * LOG2_E)).astype(q_BLNH.dtype)
    offsets = jnp.asarray(q_offset, jnp.int32), jnp.asarray(kv_offset, jnp.int32)
    arrays = pad(scaled, q_block), pad(k_BMGH, kv_block), pad(v_BMGH, kv_block), pad_ids(q_ids_BL, q_block), pad_ids(kv_ids_BM, kv_block)
    out, lse = _attend(*arrays, offsets, blocks["forward"], blocks["backward"])
    return out[:, :length, :, :size], lse[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q_BLNH, k_BMGH, v_BMGH, q_ids_BL, kv_ids_BM, offsets, forward_blocks: Blocks, backward_blocks: Blocks):
    return _attend_forward(q_BLNH, k_BMGH, v_BMGH, q_ids_BL, kv_ids_BM, offsets, forward_blocks, backward_blocks)[0]


def _attend_forward(q_BLNH, k_BMGH, v_BMGH, q_ids_BL, kv_ids_BM, offsets, blocks, _):
    groups, heads = k_BMGH.shape[2], q_BLNH.shape[2] // k_BMGH.shape[2]
    longest_BG = jnp.max(_norms(k_BMGH), axis=1)
    bound = _norms(q_BLNH) * jnp.repeat(longest_BG, heads, axis=1)[:, None] * 1.001  # for the roundings of both norms
    shift = _by_group(jnp.maximum(bound - kernel.HEADROOM, 0), groups)
    ids = _ids(q_ids_BL, kv_ids_BM, blocks)
    listed = tiles(q_ids_BL, kv_ids_BM, *offsets, blocks.q, blocks.kv)
    out, lse = forward(_flat(q_BLNH), shift, ids[0], _flat(k_BMGH), _flat(v_BMGH), ids[1], listed, heads, blocks, vmem_limit())
    out, lse = out.reshape(q_BLNH.shape), lse.reshape(lse.shape[0], -1, lse.shape[-1]).swapaxes(1, 2)
    return (out, lse), (q_BLNH, k_BMGH, v_BMGH, q_ids_BL, kv_ids_BM, offsets, out, lse)


def _attend_backward(_, blocks, residuals, cotangents):
    q_BLNH, k_BMGH, v_BMGH, q_ids_BL, kv_ids_BM, offsets, out, lse = residuals
    dout, dlse = cotangents
    groups, heads = k_BMGH.shape[2], q_BLNH.shape[2] // k_BMGH.shape[2]
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse
    rows = _by_group(lse * LOG2_E, groups), _by_group(delta, groups)
    ids = _ids(q_ids_BL, kv_ids_BM, blocks)
    listed = tiles(q_ids_BL, kv_ids_BM, *offsets, blocks.q, blocks.kv)
    wide = _flat(q_BLNH), _flat(dout)
    dq, dk, dv = backward(*wide, *rows, ids[0], _flat(k_BMGH), _flat(v_BMGH), ids[1], listed, heads, blocks, vmem_limit())
    dk, dv = (d.reshape(x.shape).astype(x.dtype) for d, x in ((dk, k_BMGH), (dv, v_BMGH)))
    return dq.reshape(q_BLNH.shape), dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _norms(x):
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


def _flat(x_BLNH):
    """[B, L, N x H], as it lies in memory."""
    return x_BLNH.reshape(*x_BLNH.shape[:2], -1)


def _by_group(x_BLN, groups: int):
    """[B, G, N / G, L]."""
    return x_BLN.swapaxes(1, 2).reshape(x_BLN.shape[0], groups, -1, x_BLN.shape[1])


def _ids(q_ids_BL, kv_ids_BM, blocks: Blocks):
    return q_ids_BL[:, None], kv_ids_BM.reshape(kv_ids_BM.shape[0], -1, 1, blocks.kv)
