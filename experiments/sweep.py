"""Runs a sweep: a list of config overrides, one training run each, then one table and one plot.

    python -m experiments.sweep --sweep=experiments/sweeps/muon_vs_adamw.py --workdir=W --data=DIR
    python -m experiments.sweep --sweep=... --workdir=W --index=$TASK_ID
    python -m experiments.sweep --sweep=... --workdir=W --results_only
    python -m experiments.sweep --sweep=experiments/sweeps/rl_loss.py --workdir=W \
        --set=start.workdir=SFT

--index does one run, for a cluster's array job; --results_only makes table and plot of what is
there.

Every run is `experiments.train`, or `experiments.rl`, in a process and folder of its own, W/<name>.
Running the same command again skips what is finished and resumes the rest; SIGTERM and Ctrl-C save
the run under way and stop. results.csv, results.md and results.png are in W.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from experiments import entry, sweep_results, sweep_rewards
from experiments import sweep_runner as runner

SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "The sweep to run: a file of experiments/sweeps/ with CONFIG, RUNS, METRIC and PLOT.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the sweep; each run has a folder of its own in it."
)
DATA = flags.DEFINE_string(
    "data", None, "The dataset folder of experiments.curate; it sets data.paths of every run."
)
SET = flags.DEFINE_multi_string(
    "set",
    [],
    "Sets KEY=VALUE in every run's config, for where things lie, as start.workdir=DIR; may be "
    "repeated.",
)
INDEX = flags.DEFINE_integer(
    "index",
    None,
    "Runs only this run, counted from 0; get the table with --results_only afterwards.",
    lower_bound=0,
)
RESULTS_ONLY = flags.DEFINE_bool(
    "results_only", False, "Runs nothing and writes table and plot of the runs that are there."
)


def main():
    if RESULTS_ONLY.value and INDEX.value is not None:
        raise ValueError("--results_only takes no --index")
    workdir = pathlib.Path(entry.given(WORKDIR))
    sweep = runner.load_sweep(entry.given(SWEEP))
    runs = runner.prepare(sweep, workdir, places())
    failed = []
    if not RESULTS_ONLY.value:
        for run in runs:
            runner.check_data(run)
        for run in chosen(runs, INDEX.value):
            if not execute(run):
                failed.append(run.name)
    if INDEX.value is None:
        write = sweep_rewards.write if sweep.metric in runner.REWARDS else sweep_results.write
        print(write(sweep, runs, workdir))
    if failed:
        raise ValueError(
            f"failed: {', '.join(failed)}; see log.txt in their folders under {workdir}"
        )


def places() -> dict[str, object]:
    """Of --data and --set."""
    found: dict[str, object] = {} if DATA.value is None else {"data.paths": (DATA.value,)}
    for setting in SET.value:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set={setting}: must be KEY=VALUE")
        found[key] = value
    return found


def chosen(runs: list[runner.Run], index: int | None) -> list[runner.Run]:
    if index is None:
        return runs
    if index >= len(runs):
        raise ValueError(f"--index={index}: this sweep has runs 0..{len(runs) - 1}")
    return [runs[index]]


def execute(run: runner.Run) -> bool:
    """Runs or resumes one run; False where it failed. Exits where it was stopped."""
    if run.is_finished():
        print(f"{run.name}: finished before, skipped", flush=True)
        return True
    print(f"{run.name}: {' '.join(f'{k}={v}' for k, v in run.overrides.items())}", flush=True)
    code, stopped = runner.execute(run, progress=sys.stderr.isatty())
    if stopped or (code == 0 and not run.is_finished()):
        print(f"stopped in {run.name}; the same command goes on from there", file=sys.stderr)
        sys.exit(1)
    return code == 0


if __name__ == "__main__":
    flags.mark_flags_as_required(["sweep", "workdir"])
    entry.run(main)
