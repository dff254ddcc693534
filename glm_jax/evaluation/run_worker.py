"""A rollout worker of a finished run: what experiments.difficulty and experiments.distill begin
with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from glm_jax.envs import registry
from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.worker import RolloutWorker, prompt_of
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.loading import load
from glm_jax.rewards.sources import load_sources
from glm_jax.rollouts.task import Task

PAGE_SIZE = 16  # tokens


def open_worker(
    workdir: str, sources: Sequence[str], spec: SamplingSpec, num_rows: int
) -> tuple[list[Task], RolloutWorker]:
    """The training tasks of the sources (as in config.tasks.train), and a worker that samples the
    run's rollouts, num_rows at a time.

    Raises ValueError for what is wrong with sources, answers or run, and for a task whose prompt
    and output the model cannot hold.
    """
    if not 0 < spec.temperature < math.inf:
        raise ValueError(f"temperature={spec.temperature} must be above 0")
    tasks = load_sources(sources, "train")
    registry.check(tasks)
    model, tokenizer = load(workdir)
    if tokenizer is None:
        raise ValueError(f"{workdir} has no tokenizer.json")
    prompts = {t.id: len(prompt_of(tokenizer, t, thinking=spec.thinking)) for t in tasks}
    longest = max(prompts, key=lambda name: prompts[name])
    context = prompts[longest] + spec.max_new_tokens
    if context > model.config.max_length:
        raise ValueError(
            f"task {longest!r}: its prompt of {prompts[longest]} tokens and"
            f" max_new_tokens={spec.max_new_tokens} exceed the model's"
            f" max_length={model.config.max_length}"
        )
    config = EngineConfig(
        context=context, num_rows=num_rows, min_rows=num_rows, page_size=PAGE_SIZE,
        num_pages=num_rows * -(-context // PAGE_SIZE),
        prefill_chunk=256, min_chunk=64, decode_steps=8, draft_tokens=0, weights="compute",
        cache_dtype="compute", keep_experts=False,
    )  # fmt: skip
    return tasks, RolloutWorker(Engine(model, config, tokenizer.decode), tokenizer)
