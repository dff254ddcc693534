"""The smallest model with every part of the architecture: a step compiles in seconds."""

MODEL = {
    "vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_dense_layers": 1, "dense_ffn_size": 48, "expert_ffn_size": 16,
    "num_heads": 4, "num_kv_heads": 2, "head_size": 16, "max_length": 64, "num_experts": 8, "num_experts_per_token": 2,
    "scan_layers": True,
}  # fmt: skip
