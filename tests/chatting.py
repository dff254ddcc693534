"""A toy that chats: fine-tuned until it answers the tasks of toy.write_tasks in GLM-4.5's format,
as often wrongly as rightly.
"""

import pathlib

import jax
import pytest
import toy

from experiments import entry
from glm_jax.sft.conversations import SOURCE, write_conversations
from glm_jax.sharding import make_mesh
from glm_jax.train import loop

NUM_TASKS = 12


def write_guesses(path: pathlib.Path) -> str:
    """Conversations that answer every task with A and with B, after more or less reasoning."""
    turns = [(i, letter, words) for i in range(NUM_TASKS) for letter in "AB" for words in (1, 2, 4)]
    answers = [
        {"role": "assistant", "reasoning_content": "so " * words, "content": f"\\boxed{{{x}}}"}
        for _, x, words in turns
    ]
    questions = [{"role": "user", "content": f"x{i}"} for i, _, _ in turns]
    found = [
        {"messages": [*pair], "thinking": True} for pair in zip(questions, answers, strict=True)
    ]
    write_conversations(path, found)
    return str(path)


def fine_tune(
    workdir: pathlib.Path, paths: list[str], tokenizer: pathlib.Path, *, start: str, steps: int
):
    """configs/sft_tiny.py for the toy, on one device. start: a work directory, or '' for weights
    from the seed.
    """
    from configs import sft_tiny

    config = sft_tiny.get_config()
    config.model.update(toy.MODEL)
    config.mesh.data = 1
    config.start.workdir = start
    config.data.update(
        paths=tuple(paths), tokenizer=str(tokenizer), sequence_length=64, held_out_fraction=0.2
    )
    tokens = steps * config.data.batch_size * config.data.sequence_length
    config.schedule.update(
        total_tokens=tokens,
        decay_tokens=tokens,
        switch_tokens=tokens,
        warmup_tokens=2048,
        learning_rate=1e-2,
    )
    config.loop.eval_batches = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        loop.train(
            entry.sft_config(config),
            workdir,
            config_json=config.to_json(),
            progress=False,
            source=SOURCE,
        )
