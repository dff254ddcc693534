"""Rollouts packed into rows of training batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from glm_jax.rl.advantages import token_weights
from glm_jax.rollouts.rollout import Rollout
from glm_jax.sharding import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInputs:
    """What the loss of a token reads, along the targets, float32. old_logprobs: of the weights at
    the beginning of a step with several updates; None: those weights are the trained ones.
    """

    loss_weights: Array
    advantages: Array
    engine_logprobs: Array
    old_logprobs: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Microbatches [A, B, L], or one of them [B, L]: the rows of pre-training, and inputs along the
    targets. experts: int16 [A, MoE layers, B, L, K] to route to, -1 where unknown; None: no replay.
    """

    tokens: Array
    targets: Array
    segment_ids: Array
    positions: Array
    inputs: TokenInputs
    experts: Array | None = None

    @property
    def rows(self) -> dict[str, Array]:
        """The rows of pre-training."""
        names = ("tokens", "targets", "segment_ids", "positions")
        weights = {"loss_weights": self.inputs.loss_weights}
        return {name: getattr(self, name) for name in names} | weights

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays that there are, by name, for a file."""
        inputs = {f.name: getattr(self.inputs, f.name) for f in dataclasses.fields(TokenInputs)}
        named = self.rows | inputs | {"experts": self.experts}
        return {name: np.asarray(x) for name, x in named.items() if x is not None}


def place(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of indices whose lengths fit into row_length together: first fit, the longest first."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, room in enumerate(free) if room >= lengths[index]), None)
        if row is None:
            rows.append([])
            free.append(row_length)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


def pack(
    pairs: Sequence[tuple[Rollout, float]],
    *,
    row_length: int,
    rows: int,
    most: int,
    aggregation: str,
    mask_truncated: bool,
    replay: bool,
) -> tuple[PolicyBatch, int]:
    """Microbatches [A, B, L] of (rollout, advantage) pairs, and how many of them hold any. A would
    do for `most` pairs of a row each, so that one program serves every step.

    loss_weights are the token weights. replay: with the engine's experts. Raises ValueError for a
    rollout that does not fit into a row, or has no experts to replay.
    """
    lengths = [len(rollout.tokens) - 1 for rollout, _ in pairs]
    if max(lengths) > row_length:
        raise ValueError(
            f"a rollout of {max(lengths) + 1} tokens does not fit into row_length={row_length}"
        )
    counts = [
        0 if mask_truncated and r.status.value == "truncated" else r.num_sampled for r, _ in pairs
    ]
    weights = token_weights(counts, aggregation)
    placed = place(lengths, row_length)
    microbatches = -(-most // rows)
    shape = (microbatches * rows, row_length)
    batch: dict[str, np.ndarray] = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }
    batch |= {
        name: np.zeros(shape, np.float32)
        for name in ("loss_weights", "advantages", "engine_logprobs")
    }
    experts = None
    if replay:
        known = [r.experts for r, _ in pairs if r.experts is not None]
        if len(known) < len(pairs):
            raise ValueError("replay needs rollouts of an engine with keep_experts=True")
        layers, per_token = known[0].shape[1:]
        experts = np.full((microbatches, layers, rows, row_length, per_token), -1, np.int16)
    for row, indices in enumerate(placed):
        start = 0
        for segment, index in enumerate(indices, 1):
            (rollout, advantage), end = pairs[index], start + lengths[index]
            tokens = rollout.tokens
            loss_mask = rollout.mask[1:].astype(np.float32) * (counts[index] > 0)
            at = row, slice(start, end)
            batch["tokens"][at], batch["targets"][at] = tokens[:-1], tokens[1:]
            batch["segment_ids"][at], batch["positions"][at] = segment, np.arange(lengths[index])
            batch["loss_weights"][at] = loss_mask * weights[index]
            batch["advantages"][at] = loss_mask * advantage
            batch["engine_logprobs"][at] = loss_mask * rollout.logprobs[1:]
            if experts is not None and rollout.experts is not None:
                experts[row // rows, :, row % rows, start : start + len(rollout.experts)] = (
                    rollout.experts.swapaxes(0, 1)
                )
            start = end
    stacked = {name: x.reshape(microbatches, rows, row_length) for name, x in batch.items()}
    names = ("loss_weights", "advantages", "engine_logprobs")
    inputs = TokenInputs(**{name: stacked.pop(name) for name in names})
    packed = PolicyBatch(**stacked, inputs=inputs, experts=experts)
    return packed, -(-len(placed) // rows)
