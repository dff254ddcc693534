"""What was sampled for a task, and what became of it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import numpy as np

from glm_jax.rollouts.task import Reward, Task, task_from_json


class RolloutStatus(enum.Enum):
    """How a rollout ended."""

    COMPLETED = "completed"  # by a stop token, in the required format; right or wrong
    TRUNCATED = "truncated"  # at the output length or the end of the context
    MAX_TURNS = "max_turns"  # the environment had not ended after the last turn
    FORMAT_ERROR = "format_error"  # what it wrote cannot be read
    TOO_MANY_CALLS = "too_many_calls"  # of tools in one turn
    TIMEOUT = "timeout"  # the environment did not answer in time
    ENVIRONMENT_ERROR = "environment_error"  # the verifier or the environment failed
    ABORTED = "aborted"  # cancelled before its end

    @property
    def is_models(self) -> bool:
        """Whether the rollout may be trained on: what the environment did wrong must not."""
        return self in (
            RolloutStatus.COMPLETED,
            RolloutStatus.TRUNCATED,
            RolloutStatus.MAX_TURNS,
            RolloutStatus.FORMAT_ERROR,
            RolloutStatus.TOO_MANY_CALLS,
        )

    @property
    def keeps_reward(self) -> bool:
        """Whether what earlier turns earned counts: not where the model broke the rules of the
        format (arXiv 2508.06471, section 3.3.2), nor where the environment failed.
        """
        return self in (RolloutStatus.COMPLETED, RolloutStatus.TRUNCATED, RolloutStatus.MAX_TURNS)


@dataclasses.dataclass(eq=False)
class Rollout:
    """One conversation as tokens: the prompt, what the model sampled, and what an environment
    answered in between.

    tokens: int32 [n]. Along them: mask, bool, whether the model sampled the token; logprobs,
    float32, the engine's, 0 elsewhere; versions, int32, of the weights, -1 elsewhere. experts:
    int16 [n - 1, MoE layers, K], what each token but the last was routed to, or None. episode: None
    for one of its own; an agent that edits its history leaves several rollouts of one episode,
    which have its number in the group and its reward. Sequences are converted.
    """

    task: Task
    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    status: RolloutStatus
    reward: Reward
    experts: np.ndarray | None = None
    episode: int | None = None

    def __post_init__(self):
        for name, dtype in ALONG_TOKENS.items():
            setattr(self, name, np.asarray(getattr(self, name), dtype))
            if getattr(self, name).shape != self.tokens.shape:
                raise ValueError(
                    f"rollout of task {self.task.id!r}: {name} has the shape"
                    f" {getattr(self, name).shape}, tokens {self.tokens.shape}"
                )

    @property
    def num_sampled(self) -> int:
        """Tokens that the model sampled."""
        return int(self.mask.sum())

    @property
    def num_turns(self) -> int:
        """Of the model: stretches of sampled tokens."""
        return int(np.sum(np.diff(self.mask.astype(np.int8), prepend=0) == 1))

    @property
    def oldest(self) -> int:
        """The oldest version of the weights that a token was sampled with; the largest int32 where
        none was sampled.
        """
        return int(self.versions[self.mask].min(initial=np.iinfo(np.int32).max))


ALONG_TOKENS = {
    "tokens": np.int32,
    "mask": np.bool_,
    "logprobs": np.float32,
    "versions": np.int32,
}


@dataclasses.dataclass(eq=False)
class Group:
    """The rollouts of one task, whose rewards are compared with each other."""

    task: Task
    rollouts: list[Rollout]

    @property
    def learnable(self) -> list[Rollout]:
        return [r for r in self.rollouts if r.status.is_models]

    @property
    def episodes(self) -> list[Rollout]:
        """The first rollout of each episode, which stands for its status and its reward."""
        found = {}
        for index, rollout in enumerate(self.rollouts):
            own = rollout.episode is None
            found.setdefault((own, index if own else rollout.episode), rollout)
        return list(found.values())

    @property
    def has_variance(self) -> bool:
        """Whether there is something to learn: rewards that differ, and tokens to reinforce."""
        learnable = self.learnable
        return len({r.reward.value for r in learnable}) > 1 and any(
            r.num_sampled for r in learnable
        )


def pack_groups(groups: Sequence[Group]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Groups for a checkpoint: plain JSON values, and what is along the tokens of all rollouts, one
    rollout after the other. `experts` is empty where no rollout has any.
    """
    entries = [
        {
            "task": dataclasses.asdict(group.task),
            "rollouts": [
                {
                    "length": len(rollout.tokens),
                    "status": rollout.status.value,
                    "reward": dataclasses.asdict(rollout.reward),
                    "has_experts": rollout.experts is not None,
                    "episode": rollout.episode,
                }
                for rollout in group.rollouts
            ],
        }
        for group in groups
    ]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    arrays = {
        name: np.concatenate([np.zeros(0, dtype), *(getattr(r, name) for r in rollouts)])
        for name, dtype in ALONG_TOKENS.items()
    }
    experts = [r.experts.astype(np.int16) for r in rollouts if r.experts is not None]
    return entries, arrays | {
        "experts": np.concatenate(experts) if experts else np.zeros((0, 0, 0), np.int16)
    }


def unpack_groups(entries: Sequence[Mapping], arrays: Mapping[str, np.ndarray]) -> list[Group]:
    """The inverse of pack_groups; arrays of no elements may be missing."""
    arrays = pack_groups(())[1] | dict(arrays)
    groups, start, first = [], 0, 0
    for entry in entries:
        group = Group(task_from_json(entry["task"]), [])
        for saved in entry["rollouts"]:
            end, last = start + saved["length"], first + saved["length"] - 1
            group.rollouts.append(
                Rollout(
                    task=group.task,
                    **{name: arrays[name][start:end] for name in ALONG_TOKENS},
                    status=RolloutStatus(saved["status"]),
                    reward=Reward(**saved["reward"]),
                    experts=arrays["experts"][first:last] if saved["has_experts"] else None,
                    episode=saved.get("episode"),  # not in older checkpoints
                )
            )
            start, first = end, last if saved["has_experts"] else first
        groups.append(group)
    return groups
