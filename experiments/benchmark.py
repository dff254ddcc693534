"""Training speed on this machine beside transformers + torch: same model, batch, precision and
optimizer, in one run.

    python -m experiments.benchmark --config=configs/bench.py

Each side runs in processes of its own, in turn (ours, theirs, ours, ...), and reports tokens/s of
its median step, peak memory and the share of the measured float32 matmul peak by useful FLOPs
(glm_jax.train.metrics.flops_per_token). `ours, muon` shows what Muon adds.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

from absl import flags
from ml_collections import config_flags

from experiments import entry
from experiments.benchmark_sides import ours, theirs
from glm_jax.train.metrics import flops_per_token

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The model to time: a file of configs/, computed in float32."
)
SIDE = flags.DEFINE_enum(
    "side", "all", ["all", "ours", "ours, muon", "theirs"], "Times only this side, in this process."
)
STEPS = flags.DEFINE_integer("steps", 8, "The number of timed steps in a round.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "The number of rounds of each side.", lower_bound=1)


def measure(run, side: str) -> dict:
    """Median seconds a step after two warm-up steps, first and last loss, peak memory of this
    process in GiB.
    """
    one = (
        theirs(run) if side == "theirs" else ours(run, "muon" if side == "ours, muon" else "adamw")
    )
    start = time.perf_counter()
    first = one()
    started = time.perf_counter() - start
    one()
    seconds, last = [], first
    for _ in range(STEPS.value):
        start = time.perf_counter()
        last = one()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": statistics.median(seconds),
        "best": min(seconds),
        "first_step": started,
        "loss": [first, last],
        "peak_gib": peak,
    }


def main():
    run = entry.run_config(CONFIG.value)
    if SIDE.value != "all":
        print(json.dumps(measure(run, SIDE.value)))
        return
    import jax

    from glm_jax.train.metrics import peak_flops

    tokens = run.data.batch_size * run.data.sequence_length
    useful = flops_per_token(run.model, run.data.sequence_length)
    sides = ("ours", "theirs", "ours, muon")
    rounds = {side: [] for side in sides}
    peaks = []
    for number in range(ROUNDS.value):
        peaks.append(peak_flops(jax.local_devices()[0]))
        for side in sides:
            command = [
                sys.executable,
                "-m",
                "experiments.benchmark",
                *sys.argv[1:],
                f"--side={side}",
            ]
            out = subprocess.run(
                command, check=True, capture_output=True, text=True
            ).stdout.splitlines()[-1]
            rounds[side].append(json.loads(out))
            print(
                f"round {number}, {side}: {tokens / rounds[side][-1]['seconds']:,.0f} tokens/s",
                flush=True,
            )
    print(
        f"\nfloat32 matmul peak {max(peaks) / 1e9:.0f} GFLOP/s; useful FLOPs a token"
        f" {useful / 1e6:.1f}M; {tokens} tokens a step"
    )
    print(
        f"{'side':12} {'tokens/s':>9} {'of peak':>8} {'peak GiB':>9} {'first step s':>13}   loss,"
        " first to last"
    )
    for side, results in rounds.items():
        speed = tokens / statistics.median(r["seconds"] for r in results)
        memory, first = (max(r[k] for r in results) for k in ("peak_gib", "first_step"))
        losses = results[0]["loss"]
        print(
            f"{side:12} {speed:9,.0f} {speed * useful / max(peaks):8.1%} {memory:9.2f}"
            f" {first:13.1f}   {losses[0]:.3f} {losses[1]:.3f}"
        )
    ratios = [
        t["seconds"] / o["seconds"] for o, t in zip(rounds["ours"], rounds["theirs"], strict=True)
    ]
    print(
        f"ours / theirs: {statistics.median(ratios):.2f} (rounds:"
        f" {', '.join(f'{r:.2f}' for r in ratios)})"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    entry.run(main)
