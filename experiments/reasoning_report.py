"""What the demo's report says of reinforcement learning: puzzles solved, answers that show their
work, an example, and a figure.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np

from glm_jax.run.recorder import read_metrics

MIN_ANSWERS = 10  # whose share solved is worth a point


@dataclasses.dataclass
class Evaluation:
    """The answers to the held-out puzzles after `steps` steps, as the run saved them: what was
    asked, what was written, the reward.
    """

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
        """Share solved of the answers with reasoning, or of those without; None for fewer than ten
        answers, which say little.
        """
        rewards = [a["reward"] for a in self.answers if bool(reasoning(a["output"])) == reasoned]
        return float(np.mean(rewards)) if len(rewards) >= MIN_ANSWERS else None


def reasoning(output: str) -> str:
    return output.partition("<think>")[2].partition("</think>")[0].strip()


def evaluations(workdir: pathlib.Path) -> list[Evaluation]:
    """Of a run of experiments.rl, in the order of their steps."""
    files = sorted((workdir / "held_out").glob("*.jsonl"))
    return [
        Evaluation(int(f.stem), list(map(json.loads, f.read_text("utf-8").splitlines())))
        for f in files
    ]


def rl_figure(records: list[dict], evaluated: list[Evaluation], path: pathlib.Path):
    """Left: solved puzzles, held out and of the rollouts. Right: share of held-out answers with
    reasoning, and their length.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [e.steps for e in evaluated]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(
        [r["step"] + 1 for r in records],
        [r["reward"] for r in records],
        color="0.75",
        linewidth=1,
        label="training puzzles, each step",
    )
    left.plot(steps, [e.solved for e in evaluated], "o-", label="held-out puzzles")
    for reasoned, label, marker in (
        (True, "  of these, answers with reasoning", "^"),
        (False, "  of these, answers without", "v"),
    ):
        solved = [(e.steps, e.solved_where(reasoned)) for e in evaluated]
        points = [(step, share) for step, share in solved if share is not None]
        left.plot(
            *np.reshape(points, (-1, 2)).T,
            marker,
            color="0.4",
            markersize=5,
            linestyle=":",
            linewidth=1,
            label=label,
        )
    left.set(
        xlabel="steps of GRPO",
        ylabel="share solved at temperature 1",
        title="Solved puzzles",
        ylim=(0, 1.02),
    )
    left.legend(frameon=False, fontsize=8, loc="center right")
    lines = right.plot(
        steps,
        [e.reasoned for e in evaluated],
        "s-",
        color="tab:green",
        label="share that shows its work",
    )
    lengths = right.twinx()
    lines += lengths.plot(
        steps,
        [e.length for e in evaluated],
        "D--",
        color="tab:orange",
        label="mean length, tokens (right)",
    )
    right.set(
        xlabel="steps of GRPO", ylabel="share of answers", title="Held-out answers", ylim=(0, 1.02)
    )
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
        print(
            f"After {evaluation.steps} steps of reinforcement learning"
            f" ({verdict}):\n{answer['output'].strip()}\n"
        )
    for evaluation in (first, last):
        print(
            f"held-out puzzles after {evaluation.steps:2} steps of reinforcement learning:"
            f" {evaluation.solved:.1%} solved; {evaluation.reasoned:.1%} of the answers show their"
            f" work; {evaluation.length:.1f} tokens on average"
        )
    print(f"figure: {workdir / 'rl.png'}\nmore:   experiments/notebooks/rl.ipynb")


def example(before: list[dict], after: list[dict]) -> tuple[dict, dict]:
    """Two answers to the same puzzle: a wrong one before and a right one after, if there are
    such.
    """
    pairs = list(zip(before, after, strict=True))
    return next((pair for pair in pairs if pair[0]["reward"] < 1 == pair[1]["reward"]), pairs[0])
