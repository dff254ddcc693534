"""The demo's cold start: the tiny model learns to answer in GLM-4.5's chat template, with a little
reasoning.

python -m experiments.cold_start --output=W/cold_start.jsonl
python -m experiments.sft --config=configs/sft_tiny.py --workdir=W/sft \
    --config.start.workdir=W/run \
    --config.data.paths='("W/cold_start.jsonl",)' --config.data.tokenizer=W/run
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()

    config.start.workdir = "runs/demo/run"

    schedule = config.schedule
    schedule.total_tokens = 409_600  # 200 steps
    schedule.learning_rate = 4e-3
    schedule.final_learning_rate = 4e-4
    schedule.warmup_tokens = 16_384
    schedule.decay_tokens = schedule.total_tokens
    schedule.switch_tokens = schedule.total_tokens

    data = ConfigDict()
    data.paths = ("runs/demo/cold_start.jsonl",)  # JSONL of conversations
    data.tokenizer = "runs/demo/run"  # the start's
    # of conversations with reasoning that do not say themselves; the others lose it
    data.thinking_share = 0.8
    data.held_out_fraction = 0.05
    data.batch_size = 8
    data.sequence_length = 256
    data.num_packing_bins = 16
    data.virtual_shards = 8
    data.seed = 0
    data.epochs = 0  # 0: endless
    config.data = data

    config.loop.checkpoint_every = 1000
    config.loop.eval_every = 0
    config.loop.eval_batches = 0
    config.loop.sample_every = 0
    return config
