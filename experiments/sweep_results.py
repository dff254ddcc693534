"""Results of a sweep: one table (CSV and Markdown) and one plot, from the runs' metrics.jsonl."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.sweep_runner import Run, Sweep, value_of
from glm_jax.run.recorder import read_metrics

# one a group, one shade a run
PALETTES = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")
SMOOTHING = 10  # steps that a point of the training curve is the mean of


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run left: every step's record, and those with held-out losses."""

    run: Run
    group: str
    records: list[dict]

    @property
    def evaluations(self) -> list[dict]:
        return [r for r in self.records if "held_out_loss" in r]

    def final(self, metric: str) -> float:
        """The metric after the last step that was evaluated."""
        return self.evaluations[-1][metric]

    def row(self) -> dict:
        tokens = np.diff([0] + [r["tokens"] for r in self.records])
        speeds = np.array([r["tokens_per_second"] for r in self.records])
        row = {
            "run": self.run.name,
            "group": self.group,
            "steps": self.records[-1]["step"] + 1,
            "of": self.run.num_steps,
        }
        for metric in ("held_out_loss", "held_out_bits_per_byte"):
            values = [e[metric] for e in self.evaluations] or [float("nan")]
            row |= {
                f"final_{metric}": round(values[-1], 4),
                f"best_{metric}": round(min(values), 4),
            }
        return row | {
            "training_seconds": round(float(np.sum(tokens / speeds)), 1),
            "tokens_per_second": round(float(np.median(speeds))),
        }


def write(sweep: Sweep, runs: list[Run], workdir: pathlib.Path) -> str:
    """Writes results.csv, results.md and results.png of the runs that have begun; returns the
    Markdown text.
    """
    legend = (
        f"Base: `{sweep.config}`. `steps` of `of` done; losses in nats a token; seconds of training"
        " steps."
    )
    return write_with(Curve, legend, verdict, plot, sweep, runs, workdir)


def write_with(
    kind: type,
    legend: str,
    verdict: Callable,
    plot: Callable,
    sweep: Sweep,
    runs: list[Run],
    workdir: pathlib.Path,
) -> str:
    """The same of curves of another kind: kind(run, group, records) has a `row`; verdict and plot
    take the sweep and the curves.
    """
    curves = []
    for run in runs:
        records = read_metrics(run.folder) if (run.folder / "metrics.jsonl").is_file() else []
        if records:
            curves.append(kind(run, str(value_of(run.config, sweep.plot["group"])), records))
    if not curves:
        raise ValueError(f"{workdir}: none of the sweep's {len(runs)} runs has begun")
    rows = [curve.row() for curve in curves]
    with (workdir / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"# {sweep.title}", "", legend, ""]
    lines += [
        "| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |",
        "|" + " --- |" * len(rows[0]),
    ]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    unfinished = [c.run.name for c in curves if not c.run.is_finished()]
    if unfinished or len(curves) < len(runs):
        lines += [
            "",
            (
                f"Not finished: {', '.join(unfinished) or 'none of these'}; not begun:"
                f" {len(runs) - len(curves)}."
            ),
        ]
    text = "\n".join([*lines, "", verdict(sweep, curves)]).rstrip() + "\n"
    (workdir / "results.md").write_text(text)
    plot(sweep, curves).savefig(workdir / "results.png", dpi=150)
    return text


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The best finished run of either group; step: after which the challenger is first at the
    baseline's end, None for never.
    """

    challenger: Curve
    baseline: Curve
    goal: float
    step: int | None


def compare(sweep: Sweep, curves: list[Curve]) -> Comparison | None:
    """None where the sweep compares nothing, or a group has no finished run."""
    best = {}
    for role in ("challenger", "baseline"):
        group = [
            c
            for c in curves
            if role in sweep.plot
            and c.group == sweep.plot[role]
            and c.run.is_finished()
            and c.evaluations
        ]
        if not group:
            return None
        best[role] = min(group, key=lambda c: c.final(sweep.metric))
    goal = best["baseline"].final(sweep.metric)
    reached = [e["step"] + 1 for e in best["challenger"].evaluations if e[sweep.metric] <= goal]
    return Comparison(**best, goal=goal, step=min(reached, default=None))


def verdict(sweep: Sweep, curves: list[Curve]) -> str:
    found = compare(sweep, curves)
    if found is None:
        return (
            "No comparison: it takes a finished run of both groups."
            if "challenger" in sweep.plot
            else ""
        )
    target = f"{found.baseline.run.name}'s final {sweep.metric} of {found.goal:.4f}"
    end = f"its own final value is {found.challenger.final(sweep.metric):.4f}"
    if found.step is None:
        return f"{found.challenger.run.name} never reaches {target}; {end}."
    steps = found.baseline.run.num_steps
    when = f"at step {found.step} of {steps}: **{found.step / steps:.1%} of the steps**"
    return f"{found.challenger.run.name} first reaches {target} {when}; {end}."


def plot(sweep: Sweep, curves: list[Curve]) -> Figure:
    """Held-out metric and training loss, side by side; a colour a group, the run's name at the end
    of its curve.
    """
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    held_out, training = figure.subplots(1, 2)
    groups = sorted({c.group for c in curves})
    x_of = (lambda r: r["step"] + 1) if sweep.plot["x"] == "steps" else (lambda r: r["tokens"])
    ends = []
    for curve in curves:
        members = [c for c in curves if c.group == curve.group]
        shade = 0.45 + 0.5 * (members.index(curve) + 1) / len(members)
        color = colormaps[PALETTES[groups.index(curve.group) % len(PALETTES)]](shade)
        style = {"color": color, "lw": 1.8, "label": curve.run.name}
        points = [(x_of(e), e[sweep.metric]) for e in curve.evaluations]
        if points:
            held_out.plot(*zip(*points, strict=True), **style)
            ends.append((*points[-1], curve.run.name, color))
        losses = np.array([r["cross_entropy"] for r in curve.records])
        width = min(SMOOTHING, len(losses))
        training.plot(
            [x_of(r) for r in curve.records][width - 1 :],
            np.convolve(losses, np.ones(width) / width, "valid"),
            **style,
        )
    for axis, title in (
        (held_out, sweep.metric.replace("_", " ")),
        (training, f"training cross-entropy, mean of {SMOOTHING} steps"),
    ):
        axis.set(title=title, xlabel=sweep.plot["x"])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    zoom(held_out, [e[sweep.metric] for c in curves for e in c.evaluations])
    zoom(training, [r["cross_entropy"] for c in curves for r in c.records])
    found = compare(sweep, curves)
    if found and found.step:
        held_out.axhline(found.goal, color="0.4", lw=0.8, ls=(0, (5, 4)))
        reached = next(e for e in found.challenger.evaluations if e["step"] + 1 == found.step)
        held_out.plot([x_of(reached)], [reached[sweep.metric]], "o", color="black", ms=5, zorder=5)
        share = f"{found.step / found.baseline.run.num_steps:.0%} of the steps"
        held_out.annotate(
            share,
            (x_of(reached), reached[sweep.metric]),
            (-7, -13),
            textcoords="offset points",
            fontsize=9,
            ha="right",
        )
    label_ends(held_out, ends)
    training.legend(frameon=False, fontsize=9)
    figure.suptitle(sweep.title, fontsize=12)
    return figure


def zoom(axis, values: list[float]):
    """Leaves out the first steep fall, where all runs are alike, and the peaks of runs that
    diverge.
    """
    finite = [v for v in values if np.isfinite(v)]
    if finite:
        low, high = min(finite), float(np.quantile(finite, 0.97))
        axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 1e-3)


def label_ends(axis, ends: list[tuple]):
    """Names at the right end of the curves, moved apart where they would overlap."""
    bottom, top = axis.get_ylim()
    gap, free = (top - bottom) * 0.045, bottom
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        free = max(y, free)
        axis.annotate(
            f"{name}  {y:.3f}", (x, y), (1.02, free), textcoords=axis.get_yaxis_transform(),
            color=color, fontsize=9, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "alpha": 0.6,
                        "relpos": (0, 0.5)},
        )  # fmt: skip
        free += gap
