"""What the demo shows: held-out bits per byte, expert load, a sample, a completed gap, and a figure; of reinforcement learning
the share of held-out puzzles solved and of answers that show their work, before and after, an example, and a figure.

    python -m experiments.demo_report --workdir=runs/demo/run
    python -m experiments.demo_report --workdir=runs/demo/run --rl=runs/demo/rl
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
from absl import flags

from experiments import entry
from glm_jax.train.metrics import read_metrics

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a finished run of experiments.train.")
RL = flags.DEFINE_string("rl", None, "Work directory of a finished run of experiments.rl: report that one.")

MIN_ANSWERS = 10  # whose share solved is worth a point


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


@dataclasses.dataclass
class Evaluation:
    """The answers to the held-out puzzles after `steps` steps, as the run saved them: what was asked, what was written, the reward."""

    steps: int
    answers: list[dict]

    @property
    def solved(self) -> float:
        return float(np.mean([a["reward"] for a in self.answers]))

    @property
    def length(self) -> float:
        """Mean, in tokens."""
        return float(np.mean([a["length"] for a in self.answers]))

    @property
    def reasoned(self) -> float:
        """Share of the answers that write something between <think> and </think>."""
        return float(np.mean([bool(reasoning(a["output"])) for a in self.answers]))

    def solved_where(self, reasoned: bool) -> float | None:
        """Share solved of the answers with reasoning, or of those without; None for fewer than ten answers, which say little."""
        rewards = [a["reward"] for a in self.answers if bool(reasoning(a["output"])) == reasoned]
        return float(np.mean(rewards)) if len(rewards) >= MIN_ANSWERS else None


def reasoning(output: str) -> str:
    return output.partition("<think>")[2].partition("</think>")[0].strip()


def evaluations(workdir: pathlib.Path) -> list[Evaluation]:
    """Of a run of experiments.rl, in the order of their steps."""
    files = sorted((workdir / "held_out").glob("*.jsonl"))
    return [Evaluation(int(f.stem), list(map(json.loads, f.read_text("utf-8").splitlines()))) for f in files]


def rl_figure(records: list[dict], evaluated: list[Evaluation], path: pathlib.Path):
    """Left: solved puzzles, held out and of the rollouts. Right: share of held-out answers with reasoning, and their length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [e.steps for e in evaluated]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(
        [r["step"] + 1 for r in records], [r["reward"] for r in records], color="0.75", linewidth=1, label="training puzzles, each step"
    )
    left.plot(steps, [e.solved for e in evaluated], "o-", label="held-out puzzles")
    for reasoned, label, marker in ((True, "  of these, answers with reasoning", "^"), (False, "  of these, answers without", "v")):
        points = [(e.steps, e.solved_where(reasoned)) for e in evaluated if e.solved_where(reasoned) is not None]
        left.plot(*np.reshape(points, (-1, 2)).T, marker, color="0.4", markersize=5, linestyle=":", linewidth=1, label=label)
    left.set(xlabel="steps of GRPO", ylabel="share solved at temperature 1", title="Solved puzzles", ylim=(0, 1.02))
    left.legend(frameon=False, fontsize=8, loc="center right")
    lines = right.plot(steps, [e.reasoned for e in evaluated], "s-", color="tab:green", label="share that shows its work")
    lengths = right.twinx()
    lines += lengths.plot(steps, [e.length for e in evaluated], "D--", color="tab:orange", label="mean length, tokens (right)")
    right.set(xlabel="steps of GRPO", ylabel="share of answers", title="Held-out answers", ylim=(0, 1.02))
    lengths.set(ylabel="tokens", ylim=(0, 1.3 * max(e.length for e in evaluated)))
    right.legend(handles=lines, frameon=False, loc="lower right", fontsize=8)
    fig.savefig(path, dpi=120)


def report_rl(workdir: pathlib.Path):
    records, evaluated = read_metrics(workdir), evaluations(workdir)
    if not records or "held_out_after" not in records[-1] or not evaluated:
        raise ValueError(f"{workdir} holds no finished run: let experiments.rl finish first")
    rl_figure(records, evaluated, workdir / "rl.png")
    first, last = evaluated[0], evaluated[-1]
    before, after = example(first.answers, last.answers)
    print(f"A held-out puzzle:\n\n{before['prompt'].strip()}\n")
    for evaluation, answer in ((first, before), (last, after)):
        verdict = "right" if answer["reward"] == 1 else "wrong"
        print(f"After {evaluation.steps} steps of reinforcement learning ({verdict}):\n{answer['output'].strip()}\n")
    for evaluation in (first, last):
        print(
            f"held-out puzzles after {evaluation.steps:2} steps of reinforcement learning: {evaluation.solved:.1%} solved; "
            f"{evaluation.reasoned:.1%} of the answers show their work; {evaluation.length:.1f} tokens on average"
        )
    print(f"figure: {workdir / 'rl.png'}\nmore:   experiments/notebooks/rl.ipynb")


def example(before: list[dict], after: list[dict]) -> tuple[dict, dict]:
    """Two answers to the same puzzle: a wrong one before and a right one after, if there are such."""
    pairs = list(zip(before, after, strict=True))
    return next((pair for pair in pairs if pair[0]["reward"] < 1 == pair[1]["reward"]), pairs[0])


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
