"""Muon against AdamW on the demo's corpus, three learning rates each, 384 steps of 4 x 256 tokens.

    python -m experiments.sweep --sweep=experiments/sweeps/muon_vs_adamw.py --workdir=W --data=DIR

DIR: made by experiments.curate --config=configs/curate.py. Six runs of about 4 minutes each on two
cores. Every run sees the same batches in the same order from the same initial weights; held-out
loss, on the same 4,096 tokens, every 8 steps. results.md says after which share of the steps the
best Muon run is where the best AdamW run ends.
"""

CONFIG = "configs/tiny.py"
METRIC = "held_out_loss"
PLOT = {"x": "steps", "group": "optimizer.name", "challenger": "muon", "baseline": "adamw"}

_STEPS, _ROWS, _LENGTH = 384, 4, 256
_TOKENS = _STEPS * _ROWS * _LENGTH


def _run(name: str, learning_rate: float) -> dict:
    return {
        "optimizer.name": name,
        "schedule.learning_rate": learning_rate,
        "schedule.final_learning_rate": learning_rate / 20,
        "schedule.total_tokens": _TOKENS,
        "schedule.decay_tokens": _TOKENS,
        "schedule.switch_tokens": _TOKENS,
        "data.batch_size": _ROWS,
        "data.virtual_shards": _ROWS,
        "data.sequence_length": _LENGTH,
        "loop.eval_every": 8,
        "loop.eval_batches": 4,
        "loop.checkpoint_every": 96,
        "loop.keep_checkpoints": 1,
        "loop.sample_every": 0,
        "loop.sample_length": 48,
    }


RUNS = {
    "muon_1e-2": _run("muon", 1e-2),
    "muon_2e-2": _run("muon", 2e-2),
    "muon_4e-2": _run("muon", 4e-2),
    "adamw_3e-3": _run("adamw", 3e-3),
    "adamw_6e-3": _run("adamw", 6e-3),
    "adamw_1.2e-2": _run("adamw", 1.2e-2),
}
