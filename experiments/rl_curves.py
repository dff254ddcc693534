"""The rewards of runs of experiments.rl beside each other, as a table and a figure: such as differ
in their seeds alone.

python -m experiments.rl_curves --workdirs=W/rl_0,W/rl_1,W/rl_2 --output=W/rl.png
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import entry
from glm_jax.rl.measures import held_out_scores
from glm_jax.run.recorder import read_metrics

WORKDIRS = flags.DEFINE_list("workdirs", None, "The work directories of runs of experiments.rl.")
OUTPUT = flags.DEFINE_string("output", None, "The PNG file to write.")


def held_out_turns(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """(steps done, mean turns of the model in a held-out episode) of each evaluation; of rollouts
    that ended by themselves, whose environment counts them.
    """
    found = []
    for file in sorted((workdir / "held_out").glob("*.jsonl")):
        parts = [json.loads(line)["parts"] for line in file.read_text("utf-8").splitlines()]
        if turns := [p["turns"] for p in parts if "turns" in p]:
            found.append((int(file.stem), float(np.mean(turns))))
    return found


def figure(runs: dict[str, list[dict]], turns: dict[str, list[tuple[int, float]]]) -> Figure:
    """Left: the held-out reward, and thin the rollouts' of every step. Right: turns."""
    made = Figure(figsize=(11, 4), layout="constrained")
    left, right = made.subplots(1, 2)
    for number, (name, records) in enumerate(runs.items()):
        color = f"C{number}"
        steps = [r["step"] + 1 for r in records]
        left.plot(steps, [r["reward"] for r in records], color=color, linewidth=0.6, alpha=0.5)
        left.plot(*zip(*held_out_scores(records), strict=True), "o-", color=color, label=name)
        right.plot(*np.reshape(turns[name], (-1, 2)).T, "o-", color=color, label=name)
    left.set(
        xlabel="steps of GRPO", ylabel="mean reward at temperature 1", ylim=(0, 1.02),
        title="Held-out reward (thin: training rollouts)",
    )  # fmt: skip
    right.set(xlabel="steps of GRPO", ylabel="turns", title="Turns of a held-out episode")
    left.legend(frameon=False, loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return made


def table(runs: dict[str, list[dict]], turns: dict[str, list[tuple[int, float]]]) -> str:
    """Held-out rewards and turns, a row for each evaluation; the last row has the minutes of the
    steps.
    """
    cells = {name: {s: f"{x:.3f}" for s, x in held_out_scores(r)} for name, r in runs.items()}
    for name, counted in turns.items():
        for step, mean in counted:
            cells[name][step] += f" in {mean:.2f} turns"
    lines = [f"| steps | {' | '.join(runs)} |", "|---|" + "---|" * len(runs)]
    for step in sorted({step for column in cells.values() for step in column}):
        lines.append(f"| {step} | {' | '.join(c.get(step, '') for c in cells.values())} |")
    seconds = (
        sum(v for r in records for k, v in r.items() if k.startswith("seconds/"))
        for records in runs.values()
    )
    return "\n".join([*lines, f"| minutes | {' | '.join(f'{s / 60:.1f}' for s in seconds)} |"])


def main():
    folders = [pathlib.Path(name) for name in entry.given(WORKDIRS)]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"--workdirs: {', '.join(names)} must be folders of unlike names")
    runs = {folder.name: read_metrics(folder) for folder in folders}
    for name, records in runs.items():
        if not held_out_scores(records):
            raise ValueError(f"--workdirs: {name} holds no evaluated step of experiments.rl")
    turns = {folder.name: held_out_turns(folder) for folder in folders}
    figure(runs, turns).savefig(entry.given(OUTPUT), dpi=120)
    print(f"{table(runs, turns)}\nfigure: {OUTPUT.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdirs", "output"])
    entry.run(main)
