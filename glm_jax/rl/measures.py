"""What a run reports about its rollouts: numbers for the curves, text for the eye."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from data.tokenizer import Tokenizer
from glm_jax.rollouts.rollout import Group, RolloutStatus


def of_groups(groups: Sequence[Group]) -> dict[str, float]:
    """`reward` (mean over episodes that say something about the model), by part and by group of
    tasks; `length` in sampled tokens and its 90th percentile; the share of every status. Nothing of
    no groups.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    if not rollouts:
        return {}
    counted = [r for g in groups for r in g.episodes if r.status.is_models]
    lengths = [r.num_sampled for r in rollouts]
    statuses = collections.Counter(r.status for r in rollouts)
    by_group, by_part = collections.defaultdict(list), collections.defaultdict(list)
    for rollout in counted:
        by_group[rollout.task.group].append(rollout.reward.value)
        for part, value in rollout.reward.parts.items():
            by_part[part].append(value)
    measured = {
        "reward": float(np.mean([r.reward.value for r in counted])) if counted else 0.0,
        "rollouts": len(rollouts),
        "length": float(np.mean(lengths)),
        "length_p90": float(np.percentile(lengths, 90)),
    }
    measured |= {
        f"status/{status.value}": statuses[status] / len(rollouts) for status in RolloutStatus
    }
    measured |= {
        f"reward_part/{part}": float(np.mean(values)) for part, values in sorted(by_part.items())
    }
    return measured | {
        f"reward/{group}": float(np.mean(values)) for group, values in sorted(by_group.items())
    }


def staleness(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Mean and largest age in updates of the rollouts to train on."""
    ages = [version - r.oldest for g in groups for r in g.rollouts]
    return {"staleness": float(np.mean(ages)), "staleness_max": max(ages)} if ages else {}


def held_out(groups: Sequence[Group]) -> dict[str, float]:
    """pass@1, estimated from all rollouts: `held_out`, and by group of tasks; `held_out_truncated`,
    a share.
    """
    measured = of_groups(groups)
    named = {
        "held_out": measured["reward"],
        "held_out_truncated": measured["status/truncated"],
        "held_out_length": measured["length"],
    }
    return named | {
        f"held_out/{k.removeprefix('reward/')}": v
        for k, v in measured.items()
        if k.startswith("reward/")
    }


def readable(groups: Sequence[Group], tokenizer: Tokenizer) -> list[dict]:
    """A line a rollout: what was asked, what was written, what became of it."""
    lines = []
    for group in groups:
        for rollout in group.rollouts:
            sampled = np.flatnonzero(rollout.mask)
            first = int(sampled[0]) if len(sampled) else len(rollout.tokens)
            lines.append({
                "task": group.task.id, "group": group.task.group, "status": rollout.status.value,
                "reward": rollout.reward.value,
                "parts": dict(rollout.reward.parts), "version": rollout.oldest,
                "length": rollout.num_sampled,
                "prompt": tokenizer.decode(rollout.tokens[:first]),
                "output": tokenizer.decode(rollout.tokens[first:]),
                "answer": group.task.answer,
            })  # fmt: skip
    return lines


def held_out_scores(records: Sequence[Mapping]) -> list[tuple[int, float]]:
    """Of a run's metrics: (steps done, mean reward on the held-out tasks) of each evaluation."""
    before = [(r["step"], r["held_out"]) for r in records if "held_out" in r]
    return before + [(r["step"] + 1, r["held_out_after"]) for r in records if "held_out_after" in r]
