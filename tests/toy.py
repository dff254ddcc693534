"""The smallest model with every part of the architecture: a step compiles in seconds; and what of its records two runs must share."""

from glm_jax.train.metrics import read_metrics

MEASURED = {"tokens_per_second", "mfu"}  # differ from run to run

MODEL = {
    "vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_dense_layers": 1, "dense_ffn_size": 48, "expert_ffn_size": 16,
    "num_heads": 4, "num_kv_heads": 2, "head_size": 16, "max_length": 64, "num_experts": 8, "num_experts_per_token": 2,
    "scan_layers": True,
}  # fmt: skip


def records(workdir) -> list[dict]:
    """A run's metrics without what is measured: equal bit for bit between equal runs."""
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in read_metrics(workdir)]
