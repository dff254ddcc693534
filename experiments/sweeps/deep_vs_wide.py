"""Deep and narrow against shallow and wide at equal parameters (10.85M), two learning rates each,
384 steps of 4 x 256 tokens.

    python -m experiments.sweep --sweep=experiments/sweeps/deep_vs_wide.py --workdir=W --data=DIR

DIR: made by experiments.curate --config=configs/curate.py. Four runs of about 8 minutes each on two
cores. Both have 16 experts top-4 and a query width of twice the model's; 12 layers of width 144 or
3 layers of width 256, one dense each, MTP block and embeddings included in the count. At this size
the wide model spends more of it on embedding and head, so it multiplies 16% more parameters a
token.
"""

CONFIG = "configs/tiny.py"
METRIC = "held_out_loss"
PLOT = {"x": "steps", "group": "model.num_layers", "challenger": "12", "baseline": "3"}

_STEPS, _ROWS, _LENGTH = 384, 4, 256
_TOKENS = _STEPS * _ROWS * _LENGTH

_DEEP = {
    "model.num_layers": 12,
    "model.hidden_size": 144,
    "model.num_heads": 6,
    "model.head_size": 48,
    "model.expert_ffn_size": 90,
    "model.dense_ffn_size": 512,
}
_WIDE = {
    "model.num_layers": 3,
    "model.hidden_size": 256,
    "model.num_heads": 8,
    "model.head_size": 64,
    "model.expert_ffn_size": 172,
    "model.dense_ffn_size": 736,
}


def _run(shape: dict, learning_rate: float) -> dict:
    return shape | {
        "schedule.learning_rate": learning_rate,
        "schedule.final_learning_rate": learning_rate / 20,
        "schedule.total_tokens": _TOKENS,
        "schedule.decay_tokens": _TOKENS,
        "schedule.switch_tokens": _TOKENS,
        "data.batch_size": _ROWS,
        "data.virtual_shards": _ROWS,
        "data.sequence_length": _LENGTH,
        "loop.eval_every": 16,
        "loop.eval_batches": 4,
        "loop.checkpoint_every": 96,
        "loop.keep_checkpoints": 1,
        "loop.sample_every": 0,
        "loop.sample_length": 48,
    }


RUNS = {
    "deep_5e-3": _run(_DEEP, 5e-3),
    "deep_1e-2": _run(_DEEP, 1e-2),
    "wide_5e-3": _run(_WIDE, 5e-3),
    "wide_1e-2": _run(_WIDE, 1e-2),
}
