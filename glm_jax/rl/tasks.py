"""The tasks of a run, and which of them the next step takes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from data.tokenizer import Tokenizer
from glm_jax.envs import registry
from glm_jax.envs.worker import prompt_of
from glm_jax.rewards.sources import TaskOrder, load_sources, with_wrong_answers
from glm_jax.rl.config import RlConfig
from glm_jax.rl.curriculum import read_difficulties, split_pools
from glm_jax.rollouts.task import Task


class Tasks:
    """Checked: every answer can be judged, every prompt with its output fits into the engine. What
    an environment adds to a prompt is not known before.
    """

    def __init__(self, config: RlConfig, tokenizer: Tokenizer):
        self.train = load_sources(config.tasks.train, "train")
        self.held_out = load_sources(config.tasks.held_out, "held_out")
        asked = {json.dumps(t.messages) for t in self.train} | {t.id for t in self.train}
        for task in self.held_out:
            if task.id in asked or json.dumps(task.messages) in asked:
                raise ValueError(f"task {task.id!r} of tasks.held_out is in tasks.train, too")
        registry.check([*self.train, *self.held_out])
        longest = max(tokens for _, tokens in config.control.length_stages)
        thinking = config.tasks.thinking
        for task in [*self.train, *self.held_out]:
            prompt = prompt_of(tokenizer, task, thinking=thinking)
            if len(prompt) + longest > config.engine.context:
                raise ValueError(
                    f"task {task.id!r}: its prompt of {len(prompt)} tokens and an output of"
                    f" {longest} exceed engine.context={config.engine.context}"
                )
        self.order = TaskOrder(
            with_wrong_answers(self.train, config.tasks.wrong_answers, config.tasks.seed),
            config.tasks.seed,
        )

    def pools(self, config: RlConfig) -> dict[str, list[int]] | None:
        """Indices of the training tasks by pool of the curriculum; None without one."""
        control = config.control
        if control.curriculum == "none":
            return None
        known = read_difficulties(control.difficulty)
        return split_pools(self.train, known, control.pass_few, control.pass_many)

    def take(self, count: int, pool: str, indices: Sequence[int]) -> list[Task]:
        """The next tasks of a pool."""
        return self.order.take(count, pool, indices)
