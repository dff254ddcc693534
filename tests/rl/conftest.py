"""A toy run to start from, a file of tasks, and a config of reinforcement learning that fits them."""

import json

import pytest
import toy

from data.chat_template import render
from experiments import entry
from glm_jax.train import loop as pretraining


@pytest.fixture(scope="session")
def start(corpus_folder, tmp_path_factory):
    """Work directory of a toy run of one step."""
    from configs import tiny

    config = tiny.get_config()
    config.model.update(toy.MODEL)
    config.data.update(paths=(str(corpus_folder),), batch_size=8, virtual_shards=8, sequence_length=64)
    config.schedule.update(total_tokens=512, decay_tokens=1024, warmup_tokens=512)
    config.loop.update(checkpoint_every=1, eval_every=0, eval_batches=1, sample_every=0)
    workdir = tmp_path_factory.mktemp("start") / "run"
    config.mesh.data = 8
    pretraining.train(entry.run_config(config), workdir, config_json=config.to_json(), progress=False)
    return workdir


def write_tasks(path, first, count):
    tasks = [
        {"id": str(i), "verifier": "choice", "prompt": f"x{i}", "answer": {"letter": "A", "options": 4}, "group": f"g{i % 2}"}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(t) + "\n" for t in tasks))
    return str(path)


@pytest.fixture
def rl_config(start, tmp_path):
    """configs/rl_math_tiny.py for the toy: tasks of a file, outputs of 6 tokens."""
    from configs import rl_math_tiny

    config = rl_math_tiny.get_config()
    config.model.update(toy.MODEL)
    config.mesh.data = 1
    config.start.workdir = str(start)
    config.engine.update(context=32, num_rows=16, min_rows=16, page_size=8, num_pages=64, prefill_chunk=16, min_chunk=16, decode_steps=4)
    longest = len(render([{"role": "user", "content": "x99"}]))
    assert longest < 64
    config.tasks.update(train=(write_tasks(tmp_path / "train.jsonl", 0, 12),), held_out=(write_tasks(tmp_path / "held.jsonl", 50, 3),))
    config.rollout.update(prompts_per_step=4, group_size=3)
    config.grpo.update(row_length=48, rows=4, learning_rate=1e-3)
    config.control.length_stages = ((0, 6),)
    config.loop.update(steps=4, checkpoint_every=2, keep_checkpoints=9, eval_every=4, eval_samples=2, save_rollouts_every=2)
    return config
