"""The 19M model of the speed comparison with transformers and torch: float32, 4 x 512 tokens a
step.

    python -m experiments.benchmark --config=configs/bench.py

8 layers, width 256, 16 experts top-4, vocabulary 8,192: 19.14M parameters. docs/results/ has the
numbers.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    model = config.model
    model.vocab_size = 8192
    model.hidden_size = 256
    model.num_layers = 8
    model.num_mtp_layers = 0  # transformers does not train it
    model.dense_ffn_size = 768
    model.expert_ffn_size = 128
    model.num_heads = 8
    model.head_size = 64
    config.optimizer.name = "adamw"
    config.data.batch_size = 4
    config.data.virtual_shards = 4
    config.data.sequence_length = 512
    return config
