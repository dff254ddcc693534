"""A 1B-active MoE with GLM-4.5's structure, sized so that Muon trains it on one 80 GB GPU.

    python -m experiments.train --config=configs/gpu_1b.py --workdir=W \
        --config.data.paths='("DATA",)'

2.87B parameters, of which 0.94B multiply each token in the layers, 1.29B with the MTP block and the
two products with the head. experiments.measure_gpu times its training step and its decoding.
Against GLM-4.5: narrower, shallower, 32 experts, 40 query heads.
"""

from ml_collections import ConfigDict

from configs import glm45


def get_config() -> ConfigDict:
    config = glm45.get_config()
    model = config.model
    model.vocab_size = 65536
    model.hidden_size = 2048
    model.num_layers = 14
    model.num_dense_layers = 1
    model.dense_ffn_size = 6144
    model.expert_ffn_size = 768
    model.num_heads = 40  # as wide as GLM-4.5's 96 heads, relative to the model
    model.num_kv_heads = 8
    model.max_length = 32768
    model.num_experts = 32
    model.routed_scaling_factor = 1.0
    model.attention = "cudnn"  # flash attention; the engine takes xla
    # XLA makes ragged_dot dense on a GPU: every expert would multiply every row
    model.grouped_matmul = "batched"

    config.mesh.expert = 1

    schedule = config.schedule
    schedule.total_tokens = 20_000_000_000
    schedule.warmup_tokens = 200_000_000
    schedule.decay_tokens = schedule.total_tokens
    schedule.last_microbatches = 1
    schedule.batch_ramp_tokens = 0
    schedule.switch_tokens = schedule.total_tokens

    config.data.batch_size = 8
    config.data.virtual_shards = 8
    return config
