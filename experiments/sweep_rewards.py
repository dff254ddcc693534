"""Results of a sweep of experiments.rl: seeds of a group are averaged; one table (CSV and Markdown)
and one plot.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
from matplotlib.figure import Figure

from experiments.sweep_results import SMOOTHING, write_with
from experiments.sweep_runner import Run, Sweep
from glm_jax.rl.measures import held_out_scores

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red", "tab:gray")


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run left."""

    run: Run
    group: str
    records: list[dict]

    @property
    def held_out(self) -> list[tuple[int, float]]:
        return held_out_scores(self.records)

    @property
    def reward(self) -> np.ndarray:
        """Mean reward of each step's rollouts, smoothed; NaN before there are enough of them."""
        rewards = np.array([r["reward"] for r in self.records])
        width = min(SMOOTHING, len(rewards))
        return np.concatenate(
            [np.full(width - 1, np.nan), np.convolve(rewards, np.ones(width) / width, "valid")]
        )

    def row(self) -> dict:
        seconds = sum(v for r in self.records for k, v in r.items() if k.startswith("seconds/"))
        held_out = [value for _, value in self.held_out]
        return {
            "run": self.run.name, "group": self.group, "steps": self.records[-1]["step"] + 1,
            "of": self.run.num_steps,
            "first_held_out": round(held_out[0], 4), "final_held_out": round(held_out[-1], 4),
            "best_held_out": round(max(held_out), 4),
            "final_reward": round(float(self.reward[-1]), 4), "seconds": round(seconds, 1),
        }  # fmt: skip


def write(sweep: Sweep, runs: list[Run], workdir: pathlib.Path) -> str:
    """Writes results.csv, results.md and results.png of the runs that have begun; returns the
    Markdown text.
    """
    legend = (
        f"Base: `{sweep.config}`; groups by `{sweep.plot['group']}`. Held-out: share solved;"
        f" reward: mean of {SMOOTHING} steps."
    )
    return write_with(Curve, legend, verdict, plot, sweep, runs, workdir)


def verdict(sweep: Sweep, curves: list[Curve]) -> str:
    """Challenger against baseline at the end, in standard errors of their seeds, beside the paper's
    claim.
    """
    if "challenger" not in sweep.plot:
        return ""
    finals = {}
    for role in ("challenger", "baseline"):
        finals[role] = [
            c.held_out[-1][1] for c in curves if c.group == sweep.plot[role] and c.run.is_finished()
        ]
        if len(finals[role]) < 2:
            return (
                "No comparison: it takes two finished runs of"
                f" {sweep.plot['group']}={sweep.plot[role]}."
            )
    (a, b), (error_a, error_b) = (
        [f(v) for v in finals.values()] for f in (np.mean, standard_error)
    )
    error = float(np.hypot(error_a, error_b))
    seen = (
        "agrees"
        if a - b > 2 * error
        else "disagrees"
        if b - a > 2 * error
        else "shows no difference beyond two standard errors"
    )
    numbers = (
        f"{sweep.plot['group']}={sweep.plot['challenger']} ends at {a:.3f} ± {error_a:.3f} and"
        f" {sweep.plot['baseline']} at {b:.3f} ± {error_b:.3f} (mean and standard error of"
        f" {len(finals['challenger'])} and {len(finals['baseline'])} seeds), a difference of"
        f" {a - b:+.3f} ± {error:.3f}"
    )
    claim = f"The paper: {sweep.plot['claim']}. " if "claim" in sweep.plot else ""
    return f"{claim}Here {numbers}: **this run of the experiment {seen}**."


def standard_error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def plot(sweep: Sweep, curves: list[Curve]) -> Figure:
    """Held-out pass@1 and training reward, side by side: a colour a group, thin lines its seeds,
    the thick one their mean.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    held_out, training = figure.subplots(1, 2)
    for number, group in enumerate(dict.fromkeys(c.group for c in curves)):
        color, members = COLORS[number % len(COLORS)], [c for c in curves if c.group == group]
        for axis, lines in ((held_out, [tuple(zip(*c.held_out, strict=True)) for c in members]),
                            (training,
                             [(range(1, len(c.reward) + 1),
                               c.reward) for c in members])):  # fmt: skip
            for x, y in lines:
                axis.plot(x, y, color=color, lw=0.8, alpha=0.45)
            shortest = min((x for x, _ in lines), key=len)
            mean = np.mean([y[: len(shortest)] for _, y in lines], axis=0)
            label = f"{sweep.plot['group']} = {group}" + (
                f", mean of {len(lines)}" if len(lines) > 1 else ""
            )
            axis.plot(shortest, mean, color=color, lw=2.2, label=label)
    held_out.set(title="pass@1 on held-out tasks", xlabel="steps")
    training.set(title=f"training reward, mean of {SMOOTHING} steps", xlabel="steps")
    for axis in (held_out, training):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    held_out.legend(frameon=False, fontsize=9)
    figure.suptitle(sweep.title, fontsize=12)
    return figure
