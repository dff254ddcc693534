"""How far the engine is from the training forward over the same tokens: the mismatch that RL has to
live with or correct.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax.infer.request import Request
from glm_jax.model.transformer import GLM

CHUNK = 128  # positions whose logits exist at a time


@functools.partial(jax.jit, static_argnums=0)
def training_forward(
    graphdef, state, tokens_BL, segment_ids_BL, replay=None
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probability of every token given those before it, float32 [B, L - 1], and the experts
    [MoE layers, B, L, K] (None in a dense model). replay: as in GLM.trunk.
    """
    model = nnx.merge(graphdef, state)
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    out = model.trunk(tokens_BL, segment_ids_BL, positions_BL, replay=replay)
    chunks = []
    for start in range(0, tokens_BL.shape[1] - 1, CHUNK):
        stop = min(start + CHUNK, tokens_BL.shape[1] - 1)
        logprobs = jax.nn.log_softmax(model.logits(out.h[:, start:stop]), axis=-1)
        chunks.append(
            jnp.take_along_axis(logprobs, tokens_BL[:, start + 1 : stop + 1, None], axis=-1)[..., 0]
        )
    return jnp.concatenate(chunks, axis=1), None if out.routers is None else out.routers.experts


def replay_of(requests: Sequence[Request], num_layers: int, length: int) -> np.ndarray:
    """The experts of finished requests as GLM.trunk takes them: int32 [MoE layers, B, length, K],
    -1 where unknown. Raises ValueError where a request has none.
    """
    known = [request.experts for request in requests if request.experts is not None]
    if len(known) < len(requests):
        raise ValueError("replay needs requests of an engine with keep_experts=True")
    replay = np.full((num_layers, len(requests), length, known[0].shape[-1]), -1, np.int32)
    for row, experts in enumerate(known):
        replay[:, row, : len(experts)] = experts[:, :num_layers].swapaxes(0, 1)
    return replay


def agreement(model: GLM, requests: Sequence[Request], *, replay: bool) -> dict[str, float]:
    """Metrics of finished requests against the model they should have been sampled from.

    replay: route the training forward to the engine's experts; needs an engine with keep_experts,
    as the expert metric does.

    Returns `logprob_difference_mean` and `_max` (absolute, over sampled tokens); with experts kept,
    `experts_differ`: share of computed tokens whose set of experts differs in at least one layer;
    without replay only, as with it none can.
    """
    length = max(len(r.sequence) for r in requests)
    length = -(-length // CHUNK) * CHUNK if length > CHUNK else length
    tokens = np.zeros((len(requests), length), np.int32)
    segment_ids = np.zeros((len(requests), length), np.int32)
    for row, request in enumerate(requests):
        tokens[row, : len(request.sequence)] = request.sequence
        segment_ids[row, : len(request.sequence)] = 1
    wishes = replay_of(requests, model.config.num_moe_layers, length) if replay else None
    graphdef, state = nnx.split(model)
    logprobs, experts = jax.device_get(
        training_forward(graphdef, state, tokens, segment_ids, wishes)
    )
    differences, differ, computed = [], 0, 0
    for row, request in enumerate(requests):
        start = len(request.prompt) - 1
        differences.append(
            np.abs(
                logprobs[row, start : start + len(request.tokens)] - np.asarray(request.logprobs)
            )
        )
        if request.experts is not None and experts is not None and not replay:
            theirs = np.sort(request.experts[:, : model.config.num_moe_layers], axis=-1)
            ours = np.sort(experts[:, row, : len(theirs)].swapaxes(0, 1), axis=-1)
            differ += int((theirs != ours).any(axis=(1, 2)).sum())
            computed += len(theirs)
    differences = np.concatenate(differences)
    metrics = {
        "logprob_difference_mean": float(differences.mean()),
        "logprob_difference_max": float(differences.max()),
    }
    return metrics | ({"experts_differ": differ / computed} if computed else {})
