"""Causal attention within segments: checks its inputs and runs the named implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import interpret
from pallas_kernels.attention import blocked, reference, rotary, tiled
from pallas_kernels.target import target_platform

IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas", "cudnn")
SIZES = (64, 128)
LENGTH_STEP = 128
DTYPES = ("bfloat16", "float32")


def attention(
    q_BLNH, k_BMGH, v_BMGH, segment_ids_BL, *, scale: float, implementation: str,
    kv_segment_ids_BM=None, q_offset=0, kv_offset=0,
    with_lse: bool = False,
):  # fmt: skip
    """softmax(scale q k^T) v over the keys of a query's own segment that are not after it in the
    row.

    Args:
      q_BLNH: queries [B, L, N, H].
      k_BMGH, v_BMGH: keys and values [B, M, G, H]; G divides N.
      segment_ids_BL: int32, not negative. Equal ids see each other; padding (0) sees nothing and is
        not seen. None: one segment.
      scale: factor on the scores.
      implementation: `pallas`, the TPU kernel, whose work follows the documents; `xla` skips the
        key blocks that causality forbids; `cudnn` for GPUs, fastest without segment ids;
        `reference`; `auto`: pallas where the trace is for a TPU, else xla.
      kv_segment_ids_BM: those of the keys; None: segment_ids_BL.
      q_offset, kv_offset: where query 0 and key 0 stand in the row, ints or int32 scalars.
      with_lse: return the log-sum-exp, too.

    Returns:
      [B, L, N, H] in the type of v, zeros for a query without a key; scores and softmax are
      float32. With with_lse also the natural log-sum-exp of the scaled scores, float32 [B, L, N],
      reference.NO_KEY for a query without a key. Both are differentiable.

    Raises:
      ValueError: for an unknown implementation, shapes that do not fit, or what the named
        implementation does not take.
    """
    name = chosen(implementation)
    if (
        q_BLNH.shape[2] % k_BMGH.shape[2]
        or k_BMGH.shape != v_BMGH.shape
        or q_BLNH.shape[-1] != k_BMGH.shape[-1]
    ):
        raise ValueError(
            f"shapes of q {q_BLNH.shape}, k {k_BMGH.shape}, v {v_BMGH.shape} do not fit"
        )
    whole = (
        kv_segment_ids_BM is None
        and isinstance(q_offset, int)
        and isinstance(kv_offset, int)
        and q_offset == kv_offset == 0
    )
    if name == "cudnn":
        return _cudnn(q_BLNH, k_BMGH, v_BMGH, segment_ids_BL, scale, whole=whole, with_lse=with_lse)
    if segment_ids_BL is None:
        segment_ids_BL = jnp.ones(q_BLNH.shape[:2], jnp.int32)
    if kv_segment_ids_BM is None:
        kv_segment_ids_BM = segment_ids_BL
    found = segment_ids_BL.shape, kv_segment_ids_BM.shape
    if found != (q_BLNH.shape[:2], k_BMGH.shape[:2]):
        raise ValueError(
            f"segment ids {found[0]} of queries {q_BLNH.shape} and {found[1]} of keys"
            f" {k_BMGH.shape} do not fit"
        )
    if name == "xla":
        if not whole or with_lse:
            raise ValueError(
                "attention='xla' takes neither offsets nor ids of keys and gives no log-sum-exp;"
                " 'pallas' and 'reference' do"
            )
        return blocked.attention(q_BLNH, k_BMGH, v_BMGH, segment_ids_BL, scale)
    if name == "pallas":
        _check_pallas(q_BLNH, k_BMGH, v_BMGH)
    run = tiled.attention if name == "pallas" else reference.attention
    out, lse = run(
        q_BLNH, k_BMGH, v_BMGH, segment_ids_BL, kv_segment_ids_BM, scale, q_offset, kv_offset
    )
    return (out, lse) if with_lse else out


def rotary_attention(
    q_BLX, k_BLY, v_BLY, biases, weights, angles, segment_ids_BL, *, scale: float, eps: float
) -> jax.Array:
    """`attention` by the TPU kernel of queries and keys as projections write them, which get their
    bias, RMS norm and rotary embedding first.

    Args:
      q_BLX, k_BLY, v_BLY: heads of 128 side by side, [B, L, N x 128], [B, L, G x 128].
      biases: of queries and keys, [N x 128] and [G x 128], or None for either. weights: of the norm
        of each of their heads, [128] both; None: no norm. eps: of the norm.
      angles: cos and sin, [B, L, R / 2]: the first R dimensions of a head turn, halves paired.
      segment_ids_BL, scale: as for attention.

    Returns [B, L, N x 128], differentiable in all but angles and ids. Raises ValueError for what
    the kernel does not take.
    """
    heads = [x.reshape(*x.shape[:2], -1, rotary.SIZE) for x in (q_BLX, k_BLY, v_BLY)]
    _check_pallas(*heads)
    q_BLX, q_norms_BNL = rotary.rotated(
        q_BLX, biases[0], weights[0], angles, eps, scale * tiled.LOG2_E
    )
    k_BLY, k_norms_BGL = rotary.rotated(k_BLY, biases[1], weights[1], angles, eps, 1.0)
    return tiled.attention_of_heads(
        q_BLX, k_BLY, v_BLY, q_norms_BNL, k_norms_BGL, segment_ids_BL, segment_ids_BL
    )[0]


def rotary_heads(
    q_BLX, k_BLY, biases, weights, angles, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys with their bias, RMS norm and rotary embedding, as heads [B, L, N, 128] and
    [B, L, G, 128], without gradients.

    Arguments as for rotary_attention, of any length.
    """
    angles = tuple(a.reshape(-1, a.shape[-1]) for a in angles)

    def heads(x, bias, weight):
        return rotary.rotated_tokens(x.reshape(-1, x.shape[-1]), bias, weight, angles, eps).reshape(
            *x.shape[:2], -1, rotary.SIZE
        )

    return tuple(map(heads, (q_BLX, k_BLY), biases, weights))


def chosen(implementation: str) -> str:
    """The implementation that a name means in the current trace. Raises ValueError for an unknown
    name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation != "auto":
        return implementation
    return "pallas" if target_platform() == "tpu" else "xla"


def _check_pallas(q, k, v):
    wrong = None
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        wrong = (
            f"types {q.dtype}, {k.dtype}, {v.dtype} of q, k, v: takes one of {', '.join(DTYPES)}"
            " for all three"
        )
    elif q.shape[-1] not in SIZES:
        wrong = f"head size {q.shape[-1]}: takes {' and '.join(map(str, SIZES))}"
    elif q.shape[1] % LENGTH_STEP or k.shape[1] % LENGTH_STEP:
        wrong = (
            f"lengths {q.shape[1]} of queries and {k.shape[1]} of keys: takes multiples of"
            f" {LENGTH_STEP}"
        )
    elif not interpret.available():
        wrong = "no TPU, and pallas_kernels.interpret is not on"
    if wrong:
        raise ValueError(f"attention='pallas': {wrong}; 'xla' takes it")


def _cudnn(q, k, v, segment_ids, scale, *, whole: bool, with_lse: bool):
    """Packed rows by a mask [B, 1, L, L], which cuDNN reads in every block: it costs memory and
    time, but no scores are stored.
    """
    if not whole or with_lse:
        raise ValueError(
            "attention='cudnn' takes neither offsets nor ids of keys and gives no log-sum-exp;"
            " 'pallas' and 'reference' do"
        )
    if target_platform() != "gpu":
        raise ValueError(
            f"attention='cudnn': the program is for {target_platform()}, no GPU; 'xla' takes it"
        )
    run = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    if segment_ids is None:
        return run(q, k, v, is_causal=True)
    # padding sees itself: a query without keys has a gradient that is not a number
    place, ids = jnp.arange(q.shape[1]), segment_ids + 1
    out = run(q, k, v, mask=reference.allowed_pairs(ids, ids, place, place)[:, None])
    return jnp.where(segment_ids[..., None, None] > 0, out, 0)
