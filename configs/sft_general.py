"""Cold start of the general expert (arXiv 2508.06471, section 3.1): writing, chat, instructions,
translation and role-play.

    python -m experiments.sft --config=configs/sft_general.py --workdir=runs/experts/sft_general

Numbers without a source in configs/sft_unified.py, which this changes, are ours here as well.
"""

from ml_collections import ConfigDict

from configs import sft_unified


def get_config() -> ConfigDict:
    config = sft_unified.get_config()
    config.data.paths = ("data/cold_start/general.jsonl",)
    config.data.thinking_share = 0.5  # the quick answer is trained on, too; ours
    schedule = config.schedule
    schedule.total_tokens = 1_000_000_000  # a small set; ours
    schedule.warmup_tokens = 40_000_000
    schedule.decay_tokens = schedule.total_tokens
    schedule.switch_tokens = schedule.total_tokens
    return config
