"""The one FLOP formula that MFU is counted by, and the statistics of expert loads."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config import ModelConfig

# Peak dense bf16 FLOP/s of one device (a v5p or v4 chip's two cores are one JAX device), from the
# vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that multiply each token: attention, dense and active experts, router, shared
    expert, head, MTP block.
    """
    width = config.hidden_size
    attention = width * config.head_size * 2 * (config.num_heads + config.num_kv_heads)
    active_experts = config.num_experts_per_token + config.num_shared_experts
    moe = 3 * width * config.expert_ffn_size * active_experts + width * config.num_experts
    head = width * config.vocab_size
    trunk = (
        config.num_layers * attention
        + config.num_dense_layers * 3 * width * config.dense_ffn_size
        + config.num_moe_layers * moe
    )
    return trunk + head + config.num_mtp_layers * (2 * width * width + attention + moe + head)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Useful training FLOPs a token: 6 per matmul parameter, and causal attention, 3 * 4 * N * H *
    (L + 1) / 2 a layer.

    Recomputation (remat), masked attention blocks, optimizer and padding are not useful and do not
    count, so MFU = flops_per_token * tokens/s / peak of all devices is comparable between
    implementations.
    """
    layers = config.num_layers + config.num_mtp_layers
    attention = 12 * layers * config.num_heads * config.head_size * (length + 1) / 2
    return 6 * matmul_parameters(config) + attention


def peak_flops(device) -> float | None:
    """FLOP/s of one of jax.devices(): from PEAK_FLOPS; a CPU's float32 matmul is timed (all
    simulated devices share it). None: unknown.
    """
    if device.platform != "cpu":
        return PEAK_FLOPS.get(device.device_kind)
    n = 1536
    x = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / jax.local_device_count()


def load_statistics(expert_counts_RE: np.ndarray) -> tuple[list[float], list[float]]:
    """Per router: max violation (max load / mean load - 1, arXiv 2408.15664) and entropy of the
    load over log E (1: balanced).
    """
    counts = np.asarray(expert_counts_RE, np.float64)
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=-1) / np.log(
        counts.shape[-1]
    )
    return (share.max(-1) * counts.shape[-1] - 1).tolist(), entropy.tolist()
