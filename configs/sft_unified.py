"""Unified fine-tuning of the 355B (arXiv 2508.06471, section 3.1): the base model learns from what
all experts have written.

    python -m experiments.distill --workdir=EXPERT --tasks=TASKS --max_new_tokens=65536 \
        --output=runs/experts/reasoning.jsonl
    python -m experiments.sft --config=configs/sft_unified.py --workdir=W

The first for each expert, with --thinking=false for what needs a quick answer. From the paper: from
the base model, millions of samples of up to 128K tokens, with and without reasoning. It prints no
learning rate, batch or number of tokens: those are ours. Not run: a row stays whole on its device
until the mesh splits lengths (mesh.context), and 92 layers' inputs of 128K tokens are 123 GB.
"""

from ml_collections import ConfigDict

from configs import glm45


def _data() -> ConfigDict:
    data = ConfigDict()
    data.paths = (
        "runs/experts/reasoning.jsonl",
        "runs/experts/agent.jsonl",
        "runs/experts/general.jsonl",
    )
    data.tokenizer = "runs/glm45/long_context"  # the start's
    # of what does not say itself whether it thinks; experiments.distill says so. Ours
    data.thinking_share = 0.5
    data.held_out_fraction = 0.001
    data.batch_size = 64  # 8.4M tokens; ours
    data.sequence_length = 131_072
    data.num_packing_bins = 64
    data.virtual_shards = 64
    data.seed = 0
    data.epochs = 0  # 0: endless
    return data


def get_config() -> ConfigDict:
    config = glm45.get_config()
    config.start.workdir = "runs/glm45/long_context"  # the base model, after mid-training
    config.model.rope_theta = 1e6  # from the 32K stage on
    config.data = _data()

    schedule = config.schedule
    schedule.total_tokens = 20_000_000_000  # ours
    schedule.learning_rate = 2.5e-5  # where pre-training ended; ours
    schedule.final_learning_rate = 2.5e-6  # ours
    schedule.warmup_tokens = 400_000_000  # ours
    schedule.decay_tokens = schedule.total_tokens
    schedule.first_microbatches = 1
    schedule.last_microbatches = 1
    schedule.batch_ramp_tokens = 0
    schedule.mtp_weight = schedule.late_mtp_weight  # as late pre-training had it
    schedule.bias_rate = schedule.late_bias_rate
    schedule.switch_tokens = schedule.total_tokens

    config.loop.checkpoint_every = 100
    config.loop.eval_every = 100
    return config
