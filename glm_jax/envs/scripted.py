"""Episodes that a script plays in the model's place: they show what an environment pays, and make
conversations to fine-tune on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from glm_jax.envs.environment import Agent, Environment, answer_of
from glm_jax.rollouts.task import Task

MAX_TURNS = 32


@dataclasses.dataclass(frozen=True)
class Played:
    """An episode: its conversation, the tools that were offered, the sum of its rewards."""

    messages: Sequence[Mapping]
    tools: Sequence[Mapping]
    reward: float


def play(environment: Environment, task: Task, agent: Agent, seed: int = 0) -> Played:
    """The agent's episode. Raises ValueError where it has not ended after MAX_TURNS."""
    try:
        return _play(environment, task, agent, seed)
    finally:
        if close := getattr(environment, "close", None):
            answer_of(close)


def _play(environment: Environment, task: Task, agent: Agent, seed: int) -> Played:
    start = answer_of(environment.reset, task, seed)
    messages, reward = list(start.messages), 0.0
    for _ in range(MAX_TURNS):
        messages.append(agent(messages))
        step = answer_of(environment.step, {"content": ""} | dict(messages[-1]))
        messages += step.messages
        reward += step.reward.value
        if step.done:
            return Played(messages, start.tools, reward)
    raise ValueError(f"task {task.id!r}: its episode has not ended after {MAX_TURNS} turns")


def idle(messages: Sequence[Mapping]) -> Mapping:
    """The agent that does nothing."""
    del messages
    return {"role": "assistant", "content": ""}
