"""One rollout under way: its tokens so far, and its turns."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax.envs.environment import NO_REWARD, Environment, Harness
from glm_jax.infer.request import Request
from glm_jax.rollouts.rollout import ALONG_TOKENS, Rollout, RolloutStatus
from glm_jax.rollouts.task import Reward, Task
from glm_jax.serve.recorder import Session


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """How the rollouts of a call are sampled."""

    group_size: int  # rollouts of a task
    max_new_tokens: int  # that the model may sample in all turns of an episode together
    temperature: float
    seed: int  # of the run
    thinking: bool
    max_turns: int = 32  # of the model, then the episode ends as MAX_TURNS
    step_seconds: float = 60.0  # that an environment may take to answer, then it ends as TIMEOUT
    max_calls: int = 64  # of tools in one turn, more end it as TOO_MANY_CALLS


@dataclasses.dataclass(eq=False)
class Episode:
    """tokens and what is along them as in Rollout; experts: of the tokens that the engine has
    computed, in parts. environment: None where a verifier judges the only turn. session: of a
    harness, which has the tokens then. deadline: until when an environment may answer, by
    time.monotonic.
    """

    task: Task
    spec: SamplingSpec
    seed: int
    environment: Environment | Harness | None
    session: Session | None = None
    deadline: float = math.inf
    tools: Sequence[Mapping] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    mask: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    experts: list[np.ndarray] = dataclasses.field(default_factory=list)
    turns: int = 0
    status: RolloutStatus | None = None  # None: it goes on
    message: Mapping | None = None  # the only turn's, for its verifier
    reward: Reward = NO_REWARD

    def give(self, tokens: Sequence[int]):
        """Adds tokens that the model did not sample."""
        self.tokens += tokens
        self.mask += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.versions += [-1] * len(tokens)

    def take(self, request: Request, num_moe_layers: int):
        """Adds what a finished request sampled."""
        self.tokens += request.tokens
        self.mask += [True] * len(request.tokens)
        self.logprobs += request.logprobs
        self.versions += request.versions
        if request.experts is not None:
            known = sum(map(len, self.experts))  # as they were when the token was first computed
            self.experts.append(request.experts[known:, :num_moe_layers])
        self.turns += 1

    def earn(self, reward: Reward):
        """Adds a turn's reward. Raises ValueError for one that is no number."""
        if not math.isfinite(reward.value):
            raise ValueError(f"reward {reward.value!r} must be a finite number")
        parts = collections.Counter(self.reward.parts)
        parts.update(reward.parts)
        self.reward = Reward(self.reward.value + reward.value, dict(parts))

    def rollouts(self, number: int) -> list[Rollout]:
        """Of an episode that has ended: one, or one for each path of a session. number: of the
        episode in its group.
        """
        assert self.status is not None, "it has ended"
        parts = self.session.paths() if self.session is not None else []
        found = []
        for part in parts or [self]:
            along: dict[str, Any] = {name: getattr(part, name) for name in ALONG_TOKENS}
            found.append(Rollout(
                task=self.task, **along, status=self.status, reward=self.reward,
                experts=np.concatenate(part.experts) if part.experts else None,
                episode=number if len(parts) > 1 else None,
            ))  # fmt: skip
        return found
