"""Group-relative advantages (r(x, y_i) - mean r: arXiv 2508.06471, section 3.3.2), and the loss
weight of each token of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm_jax.rollouts.rollout import Group, Rollout

STD_FLOOR = 1e-6


def advantages(group: Group, *, normalize_std: bool) -> list[tuple[Rollout, float]]:
    """(rollout, advantage) of the rollouts that may teach and have sampled tokens. The mean, and
    the standard deviation, are over all episodes that may teach, each of which counts once.
    """
    of_episodes = [r.reward.value for r in group.episodes if r.status.is_models]
    if not of_episodes:
        return []
    rollouts = [r for r in group.learnable if r.num_sampled]
    centred = np.asarray([r.reward.value for r in rollouts], np.float64) - np.mean(of_episodes)
    if normalize_std:
        centred = centred / (np.std(of_episodes) + STD_FLOOR)
    return list(zip(rollouts, centred.tolist(), strict=True))


def token_weights(counts: Sequence[int], aggregation: str) -> list[float]:
    """Weight of each sampled token of rollouts with so many sampled tokens; all tokens' weights sum
    to 1.

    'token': the same for all, so that long rollouts weigh more. 'sequence': every rollout weighs
    the same.
    """
    if aggregation == "token":
        return [1 / max(sum(counts), 1)] * len(counts)
    sampled = sum(count > 0 for count in counts)
    return [1 / (max(count, 1) * max(sampled, 1)) for count in counts]
