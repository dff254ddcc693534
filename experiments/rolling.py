"""A finished run put to work on tasks: what experiments.difficulty and experiments.distill begin
with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from data import chat_template
from glm_jax import load
from glm_jax.infer.engine import Engine, EngineConfig
from glm_jax.rewards import verifiers
from glm_jax.rewards.task import Task
from glm_jax.rl.collector import Draw, Roller
from glm_jax.rl.pool import load_sources

PAGE_SIZE = 16  # tokens


def open_run(
    workdir: str, sources: Sequence[str], draw: Draw, num_rows: int
) -> tuple[list[Task], Roller]:
    """The training tasks of the sources (as in config.tasks.train), and what rolls the run out over
    them, num_rows rollouts at a time.

    Raises ValueError for what is wrong with sources, answers or run, and for a task whose prompt
    and output the model cannot hold.
    """
    if not 0 < draw.temperature < math.inf:
        raise ValueError(f"temperature={draw.temperature} must be above 0")
    tasks = load_sources(sources, "train")
    verifiers.check(tasks)
    model, tokenizer = load(workdir)
    if tokenizer is None:
        raise ValueError(f"{workdir} has no tokenizer.json")
    prompts = {
        t.id: len(chat_template.encode(tokenizer, t.messages, t.tools, thinking=draw.thinking))
        for t in tasks
    }
    longest = max(prompts, key=prompts.get)
    context = prompts[longest] + draw.max_new_tokens
    if context > model.config.max_length:
        raise ValueError(
            f"task {longest!r}: its prompt of {prompts[longest]} tokens and"
            f" max_new_tokens={draw.max_new_tokens} exceed the model's"
            f" max_length={model.config.max_length}"
        )
    config = EngineConfig(
        context=context, num_rows=num_rows, min_rows=num_rows, page_size=PAGE_SIZE,
        num_pages=num_rows * -(-context // PAGE_SIZE),
        prefill_chunk=256, min_chunk=64, decode_steps=8, draft_tokens=0, weights="compute",
        cache_dtype="compute", keep_experts=False,
    )  # fmt: skip
    return tasks, Roller(Engine(model, config, tokenizer.decode), tokenizer)
