"""GLM-4.5 355B-A32B: general pre-training, 15T tokens at 4,096 (arXiv 2508.06471, Table 1 and
section 2).

    python -m experiments.train --config=configs/glm45.py --workdir=W

351.246B parameters in the layers, 355.234B with the MTP block, 32.08B active, none of them counting
embedding and head; 358.338B stored, with embedding and head and the copies of both that the
released MTP block carries. Every other config starts from this one and says what differs.
"""

from ml_collections import ConfigDict


def _model() -> ConfigDict:
    model = ConfigDict()
    model.vocab_size = 151552  # padded
    model.hidden_size = 5120
    model.num_layers = 92  # 3 dense + 89 MoE
    model.num_dense_layers = 3
    model.num_mtp_layers = 1
    model.dense_ffn_size = 12288
    model.expert_ffn_size = 1536
    model.num_heads = 96
    model.num_kv_heads = 8
    model.head_size = 128
    model.qk_norm = True
    model.attention_bias = True  # on q, k, v
    model.rotary_fraction = 0.5
    model.rope_theta = 1e4  # 1e6 from the 32K stage on
    model.max_length = 131072
    model.norm_eps = 1e-5
    model.num_experts = 160
    model.num_experts_per_token = 8
    model.num_shared_experts = 1
    model.num_expert_groups = 1
    model.num_groups_per_token = 1
    model.norm_topk_prob = True
    model.routed_scaling_factor = 2.5
    model.init_std = 0.02
    # shared, copied (into Hugging Face folders, as released) or own
    model.mtp_embeddings = "copied"
    model.compute_dtype = "bfloat16"
    model.scan_layers = True  # False compiles longer and runs faster on a CPU
    model.remat = "full"  # none, full, dots, context
    model.attention = "auto"  # auto (pallas on a TPU, else xla), reference, xla, pallas, cudnn
    # auto (pallas: TPU, batched: CPU, else ragged_dot), reference, batched, ragged_dot, pallas,
    # mosaic_gpu
    model.grouped_matmul = "auto"
    model.expert_exchange = "ragged_all_to_all"  # all_gather, all_to_all; on a CPU one of these two
    model.expert_buffer = 1.25  # rows of an exchange's buffers over the rows a device sends
    return model


def _mesh() -> ConfigDict:
    """Devices along each axis; -1: what is left over."""
    mesh = ConfigDict()
    mesh.data = 1
    mesh.fsdp = -1
    mesh.expert = 8
    mesh.context = 1
    mesh.tensor = 1
    return mesh


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.name = "muon"  # muon (embedding, biases and norms on AdamW) or adamw
    optimizer.momentum = 0.95
    optimizer.nesterov = True
    optimizer.ns_steps = 5
    optimizer.ns_dtype = "bfloat16"
    optimizer.update_rms = 0.2
    optimizer.split_heads = False  # orthogonalise q, k, v, o per head
    optimizer.weight_decay = 0.1
    optimizer.adam_b1 = 0.9
    optimizer.adam_b2 = 0.95
    optimizer.adam_eps = 1e-8  # not printed in the paper
    optimizer.max_grad_norm = 1.0  # not printed in the paper; 0: no clipping
    return optimizer


def _schedule() -> ConfigDict:
    """All in tokens."""
    schedule = ConfigDict()
    schedule.total_tokens = 15_000_000_000_000
    schedule.learning_rate = 2.5e-4
    schedule.final_learning_rate = 2.5e-5
    schedule.warmup_tokens = 32_000_000_000  # not printed in the paper
    schedule.decay_tokens = 23_100_000_000_000  # one cosine to the end of mid-training
    schedule.first_microbatches = 1  # 16M tokens a step ...
    schedule.last_microbatches = 4  # ... to 64M
    schedule.batch_ramp_tokens = 500_000_000_000
    schedule.mtp_weight = 0.3
    schedule.late_mtp_weight = 0.1
    schedule.bias_rate = 1e-3  # loss-free balancing
    schedule.late_bias_rate = 0.0
    schedule.switch_tokens = 15_000_000_000_000  # from here on late_mtp_weight and late_bias_rate
    schedule.balance_weight = 1e-4  # sequence balance loss
    return schedule


def _data() -> ConfigDict:
    data = ConfigDict()
    data.paths = ("data/curated",)  # folders written by experiments.curate
    data.weights = (1.0,)
    data.batch_size = 4096  # rows of a microbatch: 16.8M tokens
    data.sequence_length = 4096
    data.packing = "concat_then_split"  # or best_fit
    data.num_packing_bins = 64  # rows that best_fit fills at a time
    data.virtual_shards = 4096  # independent data streams; row r comes from stream r modulo this
    data.seed = 0
    data.fim_rate = 0.5  # share of code documents; not printed in the paper
    data.fim_psm_fraction = 0.5  # prefix-suffix-middle; the rest suffix-prefix-middle
    data.fim_level = "character"  # or token
    data.epochs = 0  # 0: endless
    data.verify_checksums = False
    return data


def _loop() -> ConfigDict:
    loop = ConfigDict()
    loop.seed = 0
    loop.checkpoint_every = 500  # steps
    loop.keep_checkpoints = 3
    loop.eval_every = 500
    loop.eval_batches = 16  # 0: all held-out text
    loop.sample_every = 0  # 0: never; else also at the end
    loop.sample_length = 128
    loop.sample_temperature = 0.6
    loop.sample_top_p = 0.95
    loop.sample_prompts = ("def add(",)
    loop.fim_prompts = ("def square(x):\n    return |\n\nprint(square(3))\n",)
    return loop


def _start() -> ConfigDict:
    start = ConfigDict()
    # of the run whose weights begin this one: the stage before, or an import of experiments.convert
    start.workdir = ""
    start.step = -1  # its checkpoint; -1: the newest
    return start


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = _model()
    config.mesh = _mesh()
    config.optimizer = _optimizer()
    config.schedule = _schedule()
    config.data = _data()
    config.loop = _loop()
    config.start = _start()
    return config
