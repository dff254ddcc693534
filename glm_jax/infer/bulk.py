"""Work in bulk, nobody waiting: many prompts continued by an engine, or given continuations scored
by its model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from glm_jax.infer.engine import Engine
from glm_jax.infer.request import Request
from glm_jax.infer.sampling import SamplingParams

MIN_LENGTH = 32  # tokens a row; from here on each power of two that occurs compiles a program
LOGITS_CHUNK = 512  # positions whose logits exist at a time


def continue_all(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    label: str = "",
) -> list[Request]:
    """Every prompt's finished request, in order. label: of the progress bar, empty for none. Errors
    as in Engine.submit.
    """
    requests = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
    with tqdm(total=len(requests), desc=label, unit="answer", disable=not label) as bar:
        while not engine.idle:
            bar.update(len(engine.step()))
    return requests


def score_all(
    engine: Engine,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int,
    label: str = "",
) -> list[tuple[float, bool]]:
    """log p(continuation | context) in nats and whether greedy decoding gives the continuation, for
    each (context, continuation).

    By one forward pass a pair, without the engine's cache, in batches of about batch_tokens with
    all rows padded to one power of two. A context that does not fit into the engine's context
    together with its continuation loses its beginning. Raises ValueError for a pair with an empty
    part, or a continuation that does not fit.
    """
    longest = engine.config.context
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 1 <= len(continuation) <= longest:
            raise ValueError(
                f"pair {number}: {len(context)} tokens continued by {len(continuation)}; valid: at"
                f" least one, continued by 1..{longest}"
            )
    rows = [[*context, *continuation][-(longest + 1) :] for context, continuation in pairs]
    lengths = [min(max(_power(2, len(row) - 1), MIN_LENGTH), longest) for row in rows]
    # the longest first: what does not fit into memory fails at once
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    with tqdm(total=len(rows), desc=label, unit="row", disable=not label) as bar:
        for length, group in itertools.groupby(order, key=lengths.__getitem__):
            numbers, most = list(group), max(1, batch_tokens // length)
            for part in (numbers[start : start + most] for start in range(0, len(numbers), most)):
                size = min(_power(4, len(part)), most)
                logprobs_BL, is_best_BL = _score_rows(
                    engine, [rows[i] for i in part], (size, length)
                )
                for place, i in enumerate(part):
                    end = len(rows[i]) - 1
                    scored = place, slice(end - len(pairs[i][1]), end)
                    scores[i] = (
                        float(logprobs_BL[scored].sum(dtype=np.float64)),
                        bool(is_best_BL[scored].all()),
                    )
                bar.update(len(part))
    return scores


def _power(base: int, count: int) -> int:
    """The smallest power of base that is at least count."""
    power = 1
    while power < count:
        power *= base
    return power


def _score_rows(
    engine: Engine, rows: list[list[int]], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """For position i of each row: log-probability of token i + 1, and whether it is the most likely
    one. Both of `shape`.
    """
    tokens_BL = np.zeros(shape, np.int32)
    targets_BL = np.zeros(shape, np.int32)
    lengths_B = np.zeros(shape[0], np.int32)
    for place, row in enumerate(rows):
        lengths_B[place] = count = len(row) - 1
        tokens_BL[place, :count], targets_BL[place, :count] = row[:-1], row[1:]
    return jax.device_get(
        _target_scores(engine.graphdef, engine.state, tokens_BL, targets_BL, lengths_B)
    )


@functools.partial(jax.jit, static_argnums=0)
def _target_scores(graphdef, state, tokens_BL, targets_BL, lengths_B):
    """Float32 log-probabilities of the targets and whether each is the argmax, [B, L]; logits exist
    for a chunk of positions.
    """
    model = nnx.merge(graphdef, state)
    step = jnp.arange(tokens_BL.shape[1])
    segment_ids_BL = (step < lengths_B[:, None]).astype(jnp.int32)
    h_BLD = model.trunk(tokens_BL, segment_ids_BL, jnp.broadcast_to(step, tokens_BL.shape)).h

    def chunk_scores(chunk):
        h_CD, targets_C = chunk
        logits_CV = model.logits(h_CD[None])[0]
        hit_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        return (
            hit_C - jax.nn.logsumexp(logits_CV, axis=-1),
            jnp.argmax(logits_CV, axis=-1) == targets_C,
        )

    size = tokens_BL.size
    chunk = min(LOGITS_CHUNK, size)
    in_chunks = lambda x: jnp.pad(x, ((0, -size % chunk),) + ((0, 0),) * (x.ndim - 1)).reshape(
        -1, chunk, *x.shape[1:]
    )
    flat = h_BLD.reshape(size, -1), targets_BL.reshape(size)
    logprobs, is_best = jax.lax.map(chunk_scores, jax.tree.map(in_chunks, flat))
    return logprobs.reshape(-1)[:size].reshape(tokens_BL.shape), is_best.reshape(-1)[:size].reshape(
        tokens_BL.shape
    )
