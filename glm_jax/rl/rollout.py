"""What was drawn for a task, and what became of it."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from glm_jax.rewards.task import Reward, Task


class RolloutStatus(enum.Enum):
    """How a rollout ended. Only the first three say something about the model."""

    COMPLETED = "completed"  # by a stop token, in the format that was asked for; right or wrong
    TRUNCATED = "truncated"  # at the output length
    FORMAT_ERROR = "format_error"  # what it wrote cannot be read
    ENVIRONMENT_ERROR = "environment_error"  # the judge or the environment failed
    ABORTED = "aborted"  # taken back before its end

    @property
    def is_models(self) -> bool:
        """Whether the rollout may teach: what the environment did wrong must not."""
        return self in (
            RolloutStatus.COMPLETED,
            RolloutStatus.TRUNCATED,
            RolloutStatus.FORMAT_ERROR,
        )


@dataclasses.dataclass(eq=False)
class Rollout:
    """One conversation, as tokens: prompt, what the model drew, and in between what an environment
    answered.

    tokens [n]; along them mask (the model drew it), logprobs (the engine's, 0 elsewhere) and
    versions (of the weights, -1 elsewhere). experts: int16 [n - 1, MoE layers, K] of the tokens but
    the last, or None.
    """

    task: Task
    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]
    versions: list[int]
    status: RolloutStatus
    reward: Reward
    experts: np.ndarray | None = None

    @property
    def num_drawn(self) -> int:
        return sum(self.mask)

    @property
    def oldest(self) -> int:
        """The oldest version that a token was drawn with."""
        return min(v for v, drawn in zip(self.versions, self.mask, strict=True) if drawn)


@dataclasses.dataclass(eq=False)
class Group:
    """The rollouts of one task, whose rewards are compared with each other."""

    task: Task
    rollouts: list[Rollout]

    @property
    def learnable(self) -> list[Rollout]:
        return [r for r in self.rollouts if r.status.is_models]

    @property
    def has_variance(self) -> bool:
        return len({r.reward.value for r in self.learnable}) > 1


def group_to_json(group: Group) -> dict:
    """Plain JSON values, for a checkpoint."""
    rollouts = []
    for rollout in group.rollouts:
        entry = {
            name: getattr(rollout, name) for name in ("tokens", "mask", "logprobs", "versions")
        }
        entry |= {"status": rollout.status.value, "reward": dataclasses.asdict(rollout.reward)}
        rollouts.append(
            entry | {"experts": None if rollout.experts is None else rollout.experts.tolist()}
        )
    return {"task": dataclasses.asdict(group.task), "rollouts": rollouts}


def group_from_json(saved: dict) -> Group:
    """The inverse of group_to_json."""
    task = Task(
        **{k: tuple(v) if k in ("messages", "tools") else v for k, v in saved["task"].items()}
    )
    rollouts = []
    for entry in saved["rollouts"]:
        experts = None if entry["experts"] is None else np.asarray(entry["experts"], np.int16)
        changed = {
            "task": task,
            "status": RolloutStatus(entry["status"]),
            "reward": Reward(**entry["reward"]),
            "experts": experts,
        }
        rollouts.append(Rollout(**entry | changed))
    return Group(task, rollouts)
