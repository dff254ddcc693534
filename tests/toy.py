"""The smallest model with every part of the architecture: a step compiles in seconds; a run of it
to start from, reinforcement learning that fits it, and what of their records two runs must share.
"""

import json
import pathlib

from glm_jax.rollouts.rollout import RolloutStatus
from glm_jax.rollouts.task import Reward
from glm_jax.run.recorder import read_metrics

MEASURED = {"tokens_per_second", "mfu"}  # differ from run to run, as all seconds do

MODEL = {
    "vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_dense_layers": 1,
    "dense_ffn_size": 48, "expert_ffn_size": 16,
    "num_heads": 4, "num_kv_heads": 2, "head_size": 16, "max_length": 64, "num_experts": 8,
    "num_experts_per_token": 2,
    "scan_layers": True,
}  # fmt: skip

# configs/rl_math_tiny.py for the toy: outputs of 6 tokens. Tasks and start are up to the test.
RL = {f"model.{key}": value for key, value in MODEL.items()} | {
    "mesh.data": 1, "engine.context": 32, "engine.num_rows": 16, "engine.min_rows": 16,
    "engine.page_size": 8, "engine.num_pages": 64,
    "engine.prefill_chunk": 16, "engine.min_chunk": 16, "engine.decode_steps": 4,
    "rollout.prompts_per_step": 4, "rollout.group_size": 3,
    "grpo.row_length": 48, "grpo.rows": 4, "grpo.learning_rate": 1e-3,
    "control.length_stages": ((0, 6),), "loop.steps": 4,
    "loop.checkpoint_every": 2, "loop.keep_checkpoints": 9, "loop.eval_every": 4,
    "loop.eval_samples": 2, "loop.save_rollouts_every": 2,
}  # fmt: skip


def pretrain(data: pathlib.Path, workdir: pathlib.Path):
    """A run of one step on a curated dataset, for later stages to start from."""
    from configs import tiny
    from experiments import entry
    from glm_jax.train import loop

    config = tiny.get_config()
    config.model.update(MODEL)
    config.data.update(paths=(str(data),), batch_size=8, virtual_shards=8, sequence_length=64)
    config.schedule.update(total_tokens=512, decay_tokens=1024, warmup_tokens=512)
    config.loop.update(checkpoint_every=1, eval_every=0, eval_batches=1, sample_every=0)
    loop.train(entry.run_config(config), workdir, config_json=config.to_json(), progress=False)


def write_tasks(path: pathlib.Path, first: int, count: int) -> str:
    """A file of tasks with short prompts, in two groups."""
    tasks = [
        {
            "id": str(i),
            "verifier": "choice",
            "prompt": f"x{i}",
            "answer": {"letter": "A", "options": 4},
            "group": f"g{i % 2}",
        }
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(t) + "\n" for t in tasks))
    return str(path)


def parity(tasks, messages) -> list[Reward]:
    """A reward that a toy can get: whether its text has an even number of characters."""
    del tasks
    rewards = [float(len(m["content"]) % 2 == 0) for m in messages]
    return [Reward(r, {"even": r}) for r in rewards]


def judge_by_parity(patch=setattr):
    """Any output can be read, and is judged by `parity`: the toy's own ones would be malformed
    without exception, and teach nothing. patch: monkeypatch's, or for a whole process.
    """
    from glm_jax.envs import worker

    patch(worker.verifiers, "score", parity)
    patch(worker.RolloutWorker, "read", read_anything)


def read_anything(worker, tools, request) -> tuple[RolloutStatus, dict]:
    """For RolloutWorker.read: a toy cannot write GLM's format."""
    del tools
    return RolloutStatus.COMPLETED, {"content": worker.tokenizer.decode(request.tokens)}


def records(workdir) -> list[dict]:
    """A run's metrics without what is measured: equal bit for bit between equal runs."""
    is_measured = lambda name: name in MEASURED or name.startswith("seconds/")
    return [
        {k: v for k, v in record.items() if not is_measured(k)} for record in read_metrics(workdir)
    ]


def small_config(corpus_folder):
    """configs/tiny.py shrunk until a step compiles in seconds; a mesh of one device is up to the
    test.
    """
    from configs import tiny

    config = tiny.get_config()
    config.model.update(MODEL)
    config.data.update(
        paths=(str(corpus_folder),), batch_size=8, virtual_shards=8, sequence_length=64
    )
    config.schedule.update(total_tokens=6 * 512, decay_tokens=6 * 512, warmup_tokens=512)
    config.loop.update(checkpoint_every=2, keep_checkpoints=2, eval_every=0, eval_batches=1,
                       sample_every=0, sample_length=4,
                       sample_prompts=("def f(",), fim_prompts=())  # fmt: skip
    return config
