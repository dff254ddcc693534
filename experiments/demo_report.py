"""What the demo shows: held-out bits per byte, expert load, a sample, a completed gap, and a
figure; of reinforcement learning the share of held-out puzzles solved and of answers that show
their work, before and after, an example, and a figure.

    python -m experiments.demo_report --workdir=runs/demo/run
    python -m experiments.demo_report --workdir=runs/demo/run --rl=runs/demo/rl
"""

from __future__ import annotations

import pathlib

import numpy as np
from absl import flags

from experiments import entry, reasoning_report
from glm_jax.run.recorder import read_metrics

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The work directory of a finished run of experiments.train."
)
RL = flags.DEFINE_string(
    "rl",
    None,
    "The work directory of a finished run of experiments.rl; the report is then about that run.",
)


def figure(records: list[dict], path: pathlib.Path):
    """Training and held-out loss, and the load of the experts, over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = np.asarray([r["tokens"] for r in records]) / 1e6
    smooth = lambda x: np.convolve(np.pad(x, (9, 0), mode="edge"), np.ones(10) / 10, mode="valid")
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(tokens, smooth([r["cross_entropy"] for r in records]), label="next token")
    if "mtp" in records[0]:
        left.plot(tokens, smooth([r["mtp"] for r in records]), label="token after next (MTP)")
    held_out = [(r["tokens"] / 1e6, r["held_out_loss"]) for r in records if "held_out_loss" in r]
    left.plot(*zip(*held_out, strict=True), "ko", label="held-out, next token")
    left.set(xlabel="million tokens", ylabel="nats a token", title="Loss")
    left.legend(frameon=False)
    if "max_violation" in records[0]:
        violation = np.stack([r["max_violation"] for r in records])
        for router in range(violation.shape[1]):
            name = (
                "MTP"
                if "mtp" in records[0] and router == violation.shape[1] - 1
                else f"router {router}"
            )
            right.plot(tokens, smooth(violation[:, router]), label=name, linewidth=1)
        right.legend(frameon=False, fontsize=8)
    right.set(
        xlabel="million tokens",
        ylabel="max load / mean load - 1",
        title="Expert load",
        ylim=(0, None),
    )
    fig.savefig(path, dpi=120)


def main():
    if RL.value:
        reasoning_report.report_rl(pathlib.Path(RL.value))
        return
    workdir = pathlib.Path(entry.given(WORKDIR))
    records = read_metrics(workdir)
    evaluated = [r for r in records if "held_out_bits_per_byte" in r]
    if not evaluated:
        raise ValueError(
            f"{workdir} holds no evaluated step yet: let experiments.train finish first"
        )
    path = workdir / "loss.png"
    figure(records, path)
    samples = sorted((workdir / "samples").glob("*.txt"))
    if samples:
        print(samples[-1].read_text())
    speed = np.median([r["tokens_per_second"] for r in records])
    print(
        f"{records[-1]['step'] + 1} steps, {records[-1]['tokens']:,} tokens, {speed:,.0f} tokens/s"
    )
    print(
        f"held-out: {evaluated[-1]['held_out_bits_per_byte']:.3f} bits per byte (before"
        " training: 8)"
    )
    if "max_violation" in records[0]:
        last = np.asarray([r["max_violation"] for r in records[-100:]])
        print(
            f"expert load over the last {len(last)} steps: the fullest takes {1 + last.mean():.2f}"
            " times the mean (average over routers)"
        )
    print(
        f"figure: {path}\nmore:   .venv/bin/python -m experiments.generate --workdir={workdir}"
        " --prompt='def '"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    entry.run(main)
