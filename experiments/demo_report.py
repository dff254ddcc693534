"""What the demo shows: held-out bits per byte, expert load, a sample, a completed gap, and a figure; of reinforcement learning
the share of held-out puzzles solved, before and after, two answers, and a figure.

    python -m experiments.demo_report --workdir=runs/demo/run
    python -m experiments.demo_report --workdir=runs/demo/run --rl=runs/demo/rl
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
from absl import flags

from experiments import entry
from glm_jax.rl.measures import held_out_scores
from glm_jax.train.metrics import read_metrics

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a finished run of experiments.train.")
RL = flags.DEFINE_string("rl", None, "Work directory of a finished run of experiments.rl: report that one.")


def figure(records: list[dict], path: pathlib.Path):
    """Training and held-out loss, and the load of the experts, over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = np.asarray([r["tokens"] for r in records]) / 1e6
    smooth = lambda x: np.convolve(np.pad(x, (9, 0), mode="edge"), np.ones(10) / 10, mode="valid")  # noqa: E731
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(tokens, smooth([r["cross_entropy"] for r in records]), label="next token")
    if "mtp" in records[0]:
        left.plot(tokens, smooth([r["mtp"] for r in records]), label="token after next (MTP)")
    held_out = [(r["tokens"] / 1e6, r["held_out_loss"]) for r in records if "held_out_loss" in r]
    left.plot(*zip(*held_out, strict=True), "ko", label="held-out, next token")
    left.set(xlabel="million tokens", ylabel="nats a token", title="Loss")
    left.legend(frameon=False)
    if "max_violation" in records[0]:
        violation = np.asarray([r["max_violation"] for r in records])
        for router in range(violation.shape[1]):
            name = "MTP" if "mtp" in records[0] and router == violation.shape[1] - 1 else f"router {router}"
            right.plot(tokens, smooth(violation[:, router]), label=name, linewidth=1)
        right.legend(frameon=False, fontsize=8)
    right.set(xlabel="million tokens", ylabel="max load / mean load - 1", title="Expert load", ylim=(0, None))
    fig.savefig(path, dpi=120)


def rl_figure(records: list[dict], path: pathlib.Path):
    """Solved held-out puzzles and training reward, and entropy and length, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [r["step"] + 1 for r in records]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(steps, [r["reward"] for r in records], color="0.7", linewidth=1, label="rollouts of the step")
    left.plot(*zip(*held_out_scores(records), strict=True), "o-", label="held-out puzzles")
    left.set(xlabel="steps", ylabel="share solved at temperature 1", title="pass@1", ylim=(0, 1))
    left.legend(frameon=False, loc="upper left")
    lines = right.plot(
        *zip(*((r["step"] + 1, r["entropy"]) for r in records if "entropy" in r), strict=True), label="entropy, nats a token"
    )
    lengths = right.twinx()
    lines += lengths.plot(steps, [r["length"] for r in records], color="tab:orange", label="length, tokens (right)")
    right.set(xlabel="steps", title="Outputs", ylim=(0, None))
    lengths.set(ylim=(0, None))
    right.legend(handles=lines, frameon=False, loc="lower left")
    fig.savefig(path, dpi=120)


def report_rl(workdir: pathlib.Path):
    records = read_metrics(workdir)
    if not records or "held_out_after" not in records[-1]:
        raise ValueError(f"{workdir} holds no finished run: let experiments.rl finish first")
    rl_figure(records, workdir / "rl.png")
    rollouts = sorted((workdir / "rollouts").glob("*.jsonl"))[-1].read_text("utf-8").rstrip("\n").split("\n")
    for rollout in map(json.loads, rollouts[:: len(rollouts) // 2]):
        print(f"{rollout['prompt']}{rollout['output']}\nreward {rollout['reward']:g}\n")
    before, after = (score for _, score in (held_out_scores(records)[0], held_out_scores(records)[-1]))
    print(f"held-out puzzles solved: {before:.1%} after fine-tuning, {after:.1%} after {len(records)} steps of reinforcement learning")
    print(f"figure: {workdir / 'rl.png'}\nmore:   experiments/notebooks/rl.ipynb")


def main(argv: list[str]):
    del argv
    if RL.value:
        report_rl(pathlib.Path(RL.value))
        return
    workdir = pathlib.Path(WORKDIR.value)
    records = read_metrics(workdir)
    evaluated = [r for r in records if "held_out_bits_per_byte" in r]
    if not evaluated:
        raise ValueError(f"{workdir} holds no evaluated step yet: let experiments.train finish first")
    path = workdir / "loss.png"
    figure(records, path)
    samples = sorted((workdir / "samples").glob("*.txt"))
    if samples:
        print(samples[-1].read_text())
    speed = np.median([r["tokens_per_second"] for r in records])
    print(f"{records[-1]['step'] + 1} steps, {records[-1]['tokens']:,} tokens, {speed:,.0f} tokens/s")
    print(f"held-out: {evaluated[-1]['held_out_bits_per_byte']:.3f} bits per byte (before training: 8)")
    if "max_violation" in records[0]:
        last = np.asarray([r["max_violation"] for r in records[-100:]])
        print(f"expert load over the last {len(last)} steps: the fullest takes {1 + last.mean():.2f} times the mean (average over routers)")
    print(f"figure: {path}\nmore:   .venv/bin/python -m experiments.generate --workdir={workdir} --prompt='def '")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    entry.run(main)
