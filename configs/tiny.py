"""The demo: a GLM with every part of the architecture in it, learning the Python standard library
on a laptop.

python -m experiments.curate --config=configs/curate.py --output=W/data
python -m experiments.train --config=configs/tiny.py --workdir=W/run --config.data.paths=W/data,
"""

from ml_collections import ConfigDict

from configs import glm45


def get_config() -> ConfigDict:
    config = glm45.get_config()

    model = config.model
    model.vocab_size = 4096
    model.hidden_size = 128
    model.num_layers = 4
    model.num_dense_layers = 1
    model.dense_ffn_size = 384
    model.expert_ffn_size = 64
    model.num_heads = 8
    model.num_kv_heads = 2
    model.head_size = 32
    model.max_length = 512
    model.num_experts = 16
    model.num_experts_per_token = 4
    model.routed_scaling_factor = 1.0
    model.compute_dtype = "float32"
    model.remat = "dots"
    model.attention = "xla"  # the TPU kernel takes heads of 64 and 128
    model.expert_exchange = "all_to_all"

    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.expert = 1

    config.optimizer.ns_dtype = "float32"

    schedule = config.schedule
    schedule.total_tokens = 1_228_800  # 600 steps
    schedule.learning_rate = 1e-2
    schedule.final_learning_rate = 5e-4
    schedule.warmup_tokens = 40_000
    schedule.decay_tokens = schedule.total_tokens
    schedule.first_microbatches = 1
    schedule.last_microbatches = 1
    schedule.batch_ramp_tokens = 0
    schedule.bias_rate = 5e-3  # a short run has few steps to balance in
    schedule.late_bias_rate = schedule.bias_rate
    schedule.late_mtp_weight = schedule.mtp_weight
    schedule.switch_tokens = schedule.total_tokens

    config.data.batch_size = 8
    config.data.virtual_shards = 8
    config.data.sequence_length = 256
    config.data.fim_rate = 0.3

    loop = config.loop
    loop.checkpoint_every = 200
    loop.keep_checkpoints = 2
    loop.eval_every = 200
    loop.eval_batches = 16
    loop.sample_every = 200
    loop.sample_length = 96
    loop.sample_prompts = ("def add(", "import os\n\n\nclass ", "    def __init__(self, ")
    loop.fim_prompts = (
        (
            "    def test_close(self):\n        self.file.close()\n|       "
            " self.assertTrue(self.file.closed)\n"
        ),
    )
    return config
