"""Attention and its gradients as a loop over queries in float64."""

import numpy as np

NO_KEY = -1e30


def attention(q, k, v, q_ids, kv_ids, scale, q_offset=0, kv_offset=0):
    """out [B, L, N, H] and log-sum-exp [B, L, N]."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], NO_KEY)
    for b, i, n, keys, probs, total in _queries(q, k, q_ids, kv_ids, scale, q_offset, kv_offset):
        out[b, i, n] = probs @ v[b, keys, n // (q.shape[2] // k.shape[2])]
        lse[b, i, n] = total
    return out, lse


def gradients(q, k, v, q_ids, kv_ids, scale, dout, dlse, q_offset=0, kv_offset=0):
    """Of sum(out dout) + sum(lse dlse)."""
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    for b, i, n, keys, probs, _ in _queries(q, k, q_ids, kv_ids, scale, q_offset, kv_offset):
        g = n // (q.shape[2] // k.shape[2])
        dprobs = v[b, keys, g] @ dout[b, i, n]
        dscores = probs * (dprobs - probs @ dprobs + dlse[b, i, n]) * scale
        dq[b, i, n] = dscores @ k[b, keys, g]
        dk[b, keys, g] += np.outer(dscores, q[b, i, n])
        dv[b, keys, g] += np.outer(probs, dout[b, i, n])
    return dq, dk, dv


def _queries(q, k, q_ids, kv_ids, scale, q_offset, kv_offset):
    """Queries that see a key, with these keys, their probabilities and the log-sum-exp."""
    batch, length, heads, _ = q.shape
    kv_index = kv_offset + np.arange(k.shape[1])
    for b in range(batch):
        for i in range(length):
            keys = np.flatnonzero(
                (kv_ids[b] == q_ids[b, i]) & (q_ids[b, i] > 0) & (kv_index <= q_offset + i)
            )
            for n in range(heads if len(keys) else 0):
                scores = scale * (k[b, keys, n // (heads // k.shape[2])] @ q[b, i, n])
                exps = np.exp(scores - scores.max())
                yield b, i, n, keys, exps / exps.sum(), scores.max() + np.log(exps.sum())


def relative(found, expected) -> float:
    """Norm of the difference over the norm."""
    return float(
        np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)
    )
