"""The cold start of configs/rl_calculator_tiny.py: the tiny model learns the form of a tool call,
and to guess more often than to call.

python -m experiments.cold_start --output=W/cold_start.jsonl --generators=calculator --tasks=W \
    --count=4000 --worked_share=0.3
python -m experiments.sft --config=configs/sft_calculator_tiny.py --workdir=W/sft \
    --config.start.workdir=RUN \
    --config.data.paths='("W/cold_start.jsonl",)' --config.data.tokenizer=RUN
"""

from ml_collections import ConfigDict

from configs import sft_tiny


def get_config() -> ConfigDict:
    config = sft_tiny.get_config()
    config.data.paths = ("runs/demo/calculator/cold_start.jsonl",)
    config.data.sequence_length = 288  # one episode
    tokens_per_step = config.data.batch_size * config.data.sequence_length

    schedule = config.schedule
    schedule.total_tokens = 500 * tokens_per_step
    schedule.warmup_tokens = 10 * tokens_per_step
    schedule.decay_tokens = schedule.total_tokens
    schedule.switch_tokens = schedule.total_tokens
    return config
