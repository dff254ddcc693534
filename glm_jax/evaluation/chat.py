"""Tasks asked as a chat: sampled, parsed and judged on the path that reinforcement learning takes,
so that the two cannot disagree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tqdm import tqdm

from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.worker import RolloutWorker, prompt_of
from glm_jax.evaluation.subject import Subject
from glm_jax.rollouts.rollout import Rollout
from glm_jax.rollouts.task import Task


def rollouts(
    tasks: Sequence[Task], subject: Subject, label: str, max_turns: int = 1
) -> list[Rollout | None]:
    """One judged rollout of each task; None where prompt and answer do not fit into the context.
    max_turns: of an episode in an environment.
    """
    settings = subject.settings
    spec = SamplingSpec(
        group_size=1, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        seed=settings.seed, thinking=settings.thinking,
        max_turns=max_turns,
    )  # fmt: skip
    prompt = lambda task: prompt_of(subject.tokenizer, task, thinking=settings.thinking)
    fits = [fits_into(subject, prompt(task)) for task in tasks]
    asked = list(itertools.compress(tasks, fits))
    worker = RolloutWorker(subject.engine, subject.tokenizer)
    with tqdm(total=len(asked), desc=label, unit="answer") as bar:
        groups = iter(worker.rollouts(asked, spec, 0, bar.update))
    return [next(groups).rollouts[0] if fit else None for fit in fits]


def fits_into(subject: Subject, prompt: Sequence[int]) -> bool:
    return len(prompt) + subject.settings.max_new_tokens <= subject.engine.config.context
