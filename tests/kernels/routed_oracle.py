"""The routed feed-forward and its gradients in float64 numpy, one (token, choice) pair at a
time.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

NAMES = ("y", "dx", "dweights", "dgate", "dup", "ddown")


@dataclasses.dataclass
class Case:
    """arguments: x_TD, weights_TK or None, gate_EDF, up_EDF, down_EFD."""

    expert_TK: np.ndarray
    arguments: tuple
    dy_TD: jnp.ndarray


def draw(
    rng, *, tokens, per_token, experts, width, ffn, dtype=jnp.float32, weighted=True, expert_TK=None
) -> Case:
    """Random values; experts, unless given, from -1 to E, both of which mean none."""
    values = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    matrices = [
        values(experts, a, b) / a**0.5 for a, b in ((width, ffn), (width, ffn), (ffn, width))
    ]
    if expert_TK is None:
        expert_TK = rng.integers(-1, experts + 1, (tokens, per_token))
    weights = jnp.asarray(rng.random((tokens, per_token)), jnp.float32) if weighted else None
    return Case(
        np.asarray(expert_TK, np.int32),
        (values(tokens, width), weights, *matrices),
        values(tokens, width),
    )


def oracle(case: Case) -> tuple:
    """y and the gradients of x, weights (None without), gate, up, down for dy, as NAMES."""
    x, weights, gate, up, down = (
        None if a is None else np.asarray(a, np.float64) for a in case.arguments
    )
    dy = np.asarray(case.dy_TD, np.float64)
    factors = np.ones(case.expert_TK.shape) if weights is None else weights
    y, dx, dweights, dgate, dup, ddown = (np.zeros_like(a) for a in (x, x, factors, gate, up, down))
    for (t, k), e in np.ndenumerate(case.expert_TK):
        if not 0 <= e < len(gate):
            continue
        g, u, w = x[t] @ gate[e], x[t] @ up[e], factors[t, k]
        sigmoid = 1 / (1 + np.exp(-g))
        h = g * sigmoid * u
        y[t] += w * (h @ down[e])
        dh = w * (down[e] @ dy[t])
        dweights[t, k] = h @ down[e] @ dy[t]
        ddown[e] += np.outer(w * h, dy[t])
        dg, du = dh * u * sigmoid * (1 + g * (1 - sigmoid)), dh * g * sigmoid
        dgate[e] += np.outer(x[t], dg)
        dup[e] += np.outer(x[t], du)
        dx[t] += gate[e] @ dg + up[e] @ du
    return y, dx, None if weights is None else dweights, dgate, dup, ddown


def errors(ours, theirs) -> dict[str, float]:
    """Norm of the difference over the norm, by name."""
    found = {}
    for name, a, b in zip(NAMES, ours, theirs, strict=False):
        assert (a is None) == (b is None), name
        if b is not None:
            norm = np.linalg.norm(b)
            found[name] = float(
                np.linalg.norm(np.asarray(a, np.float64) - b) / (norm if norm else 1.0)
            )
    return found
