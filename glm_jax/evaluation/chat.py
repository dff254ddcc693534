"""Tasks asked as a chat: sampled, parsed and judged on the path that reinforcement learning takes,
so that the two cannot disagree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tqdm import tqdm

from data import chat_template
from glm_jax.envs.worker import RolloutWorker, SamplingSpec
from glm_jax.evaluation.subject import Subject
from glm_jax.rollouts.rollout import Rollout
from glm_jax.rollouts.task import Task


def rollouts(tasks: Sequence[Task], subject: Subject, label: str) -> list[Rollout | None]:
    """One judged rollout of each task; None where prompt and answer do not fit into the context."""
    settings = subject.settings
    spec = SamplingSpec(
        group_size=1, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        seed=settings.seed, thinking=settings.thinking,
    )  # fmt: skip
    prompts = [prompt_of(task, subject) for task in tasks]
    fits = [fits_into(subject, prompt) for prompt in prompts]
    asked = list(itertools.compress(tasks, fits))
    worker = RolloutWorker(subject.engine, subject.tokenizer)
    with tqdm(total=len(asked), desc=label, unit="answer") as bar:
        groups = iter(worker.rollouts(asked, spec, 0, bar.update))
    return [next(groups).rollouts[0] if fit else None for fit in fits]


def prompt_of(task: Task, subject: Subject) -> list[int]:
    thinking = subject.settings.thinking
    return chat_template.encode(subject.tokenizer, task.messages, task.tools, thinking=thinking)


def fits_into(subject: Subject, prompt: Sequence[int]) -> bool:
    return len(prompt) + subject.settings.max_new_tokens <= subject.engine.config.context
