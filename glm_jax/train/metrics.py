"""Where a run's numbers go (metrics.jsonl, TensorBoard, log.txt), and the one FLOP formula behind
MFU.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter

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


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s of one device: from PEAK_FLOPS; a CPU's float32 matmul is timed (all simulated devices
    share it). None: unknown.
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


class NonFinite(FloatingPointError):
    """A step whose loss, gradients, update or new weights are not finite; the message names it and
    where its batch was written.
    """


# names, and what names begin with
MUST_BE_FINITE = ("loss", "grad_norm", "param_norm", "held_out_loss", "grad_rms/", "update_rms/")


def check_finite(
    metrics: Mapping,
    *,
    step: int,
    workdir: pathlib.Path,
    batch: Callable[[], Mapping[str, np.ndarray]],
    good: Callable,
):
    """Raises NonFinite where a metric of MUST_BE_FINITE is not; to be called before the step's
    weights are used or saved.

    batch: the step's, written to the work directory for whoever looks into it. good: gives the step
    of the newest checkpoint, or None.
    """
    bad = [
        name
        for name, value in metrics.items()
        if name.startswith(MUST_BE_FINITE) and not np.all(np.isfinite(value))
    ]
    if not bad:
        return
    path = workdir / f"nonfinite_step_{step}_process_{jax.process_index()}.npz"
    try:
        np.savez(path, **batch())
        where = f"its batch is in {path}"
    except OSError as error:  # a full disk must not hide what happened
        where = f"its batch could not be written to {path} ({error.strerror})"
    kept = (
        "there is no checkpoint yet"
        if (step_kept := good()) is None
        else f"the last good checkpoint is of step {step_kept}"
    )
    found = ", ".join(f"{name} is {float(np.asarray(metrics[name]).flat[0])}" for name in bad)
    raise NonFinite(f"{found} at step {step}; {where}; {kept}")


@contextlib.contextmanager
def naming(path: pathlib.Path):
    """An OSError that says which file could not be written: a full disk's own does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


class Recorder:
    """Writes metrics.jsonl (one object a step) and TensorBoard events; on resume drops what lies
    past the restored step.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self.path = workdir / "metrics.jsonl"
        self._drop_after(first_step)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def _drop_after(self, first_step: int):
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) < first_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(self.path)

    def write(self, record: dict):
        """record: `step` and scalars or lists of numbers; each list entry becomes a TensorBoard
        curve of its own. Raises OSError.
        """
        with naming(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        for name, value in record.items():
            entries = (
                {name: value}
                if not isinstance(value, list)
                else {f"{name}/{i}": v for i, v in enumerate(value)}
            )
            for tag, number in entries.items():
                if isinstance(number, int | float):
                    self.board.add_scalar(tag, number, record["step"])

    def text(self, step: int, name: str, text: str):
        self.board.add_text(name, text, step)

    def close(self):
        """Never raises: what could not be written was raised by `write`, or another error ends the
        run.
        """
        for opened in (self.file, self.board):
            with contextlib.suppress(OSError):
                opened.close()


def _step_of(line: str) -> float:
    """Step of a metrics line; infinity for one that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def read_metrics(workdir: str | pathlib.Path) -> list[dict]:
    """All finished lines of metrics.jsonl, oldest first."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if _step_of(line) != float("inf")]
