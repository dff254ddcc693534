"""Sweep files: read, checked as a whole before anything runs, and run in processes of their own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Mapping

from ml_collections import ConfigDict

from data.manifest import load_manifest
from experiments import entry
from glm_jax.config import check_choice
from glm_jax.optim.schedules import Schedule

# what decides, of experiments.train and experiments.rl
LOSSES, REWARDS = ("held_out_loss", "held_out_bits_per_byte"), ("held_out",)
X_AXES = ("steps", "tokens")
NAMES = ("CONFIG", "RUNS", "METRIC", "PLOT")
PLOT_KEYS = ("x", "group", "challenger", "baseline", "claim")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file.

    title: first line of its docstring. config: path of the base config. runs: name -> {dotted key:
    value}.
    metric: what decides, a loss (smaller is better; the best run of a group counts) or a reward
    (its mean over the group's seeds does). plot: 'x' (of X_AXES) and 'group' (a dotted key; runs of
    the same value share a colour) and, if two groups shall be compared, 'challenger' and
    'baseline': values of that key; of rewards also 'claim': what the paper says of them.
    """

    title: str
    config: str
    runs: dict[str, dict]
    metric: str
    plot: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: its folder, its whole config, and the command line that makes it."""

    name: str
    folder: pathlib.Path
    config: ConfigDict
    overrides: dict
    base: str
    num_steps: int

    @property
    def module(self) -> str:
        """The entry point that makes the run."""
        return "experiments.rl" if is_rl(self.config) else "experiments.train"

    def is_finished(self) -> bool:
        return (self.folder / "checkpoints" / str(self.num_steps)).is_dir()

    def command(self, progress: bool) -> list[str]:
        flags = [
            f"--config.{key}={value if isinstance(value, str) else repr(value)}"
            for key, value in self.overrides.items()
        ]
        common = [f"--config={self.base}", f"--workdir={self.folder}", f"--progress={progress}"]
        return [sys.executable, "-m", self.module, *common, *flags]


def is_rl(config: ConfigDict) -> bool:
    return "grpo" in config


def load_sweep(path: str) -> Sweep:
    """Reads a sweep file. Raises ValueError where it is none, or for a name in capitals that means
    nothing.
    """
    module = _import(path, "sweep")
    given = {name for name in vars(module) if name.isupper() and not name.startswith("_")}
    for name in given:
        check_choice(f"{path}: name", name, NAMES)
    missing = [name for name in NAMES if name not in given]
    if missing or not module.__doc__ or not module.RUNS:
        raise ValueError(
            f"{path} is no sweep: it needs a docstring and"
            f" {', '.join(missing or ['at least one run in RUNS'])}"
        )
    for name in module.RUNS:
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise ValueError(
                f"{path}: run name {name!r} must be a folder name of letters, digits and _ . + -"
            )
    check_choice(f"{path}: METRIC", module.METRIC, LOSSES + REWARDS)
    for key in module.PLOT:
        check_choice(f"{path}: PLOT key", key, PLOT_KEYS)
    if not {"x", "group"} <= module.PLOT.keys() or ("challenger" in module.PLOT) != (
        "baseline" in module.PLOT
    ):
        raise ValueError(
            f"{path}: PLOT needs 'x' and 'group', and 'challenger' and 'baseline' both or neither"
        )
    check_choice(f"{path}: PLOT['x']", module.PLOT["x"], X_AXES)
    return Sweep(
        module.__doc__.strip().splitlines()[0].rstrip("."),
        module.CONFIG,
        dict(module.RUNS),
        module.METRIC,
        dict(module.PLOT),
    )


def prepare(sweep: Sweep, workdir: pathlib.Path, places: Mapping[str, object]) -> list[Run]:
    """Every run with its config, all checked. places: dotted key -> value, where things lie; of
    every run, and free to change.

    Raises ValueError for an unknown key (naming the nearest), a wrong type or value, or a folder
    that holds another run.
    """
    runs = []
    for name, listed in sweep.runs.items():
        overrides = listed | dict(places)
        config = _import(sweep.config, "config").get_config()
        check_choice(
            f"METRIC of {sweep.config}", sweep.metric, REWARDS if is_rl(config) else LOSSES
        )
        check_choice(f"{name}: PLOT['group']", sweep.plot["group"], keys_of(config))
        for key, value in overrides.items():
            override(config, key, value, name)
        try:
            steps = num_steps(config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        runs.append(Run(name, workdir / name, config, overrides, sweep.config, steps))
        check_unchanged(runs[-1], places)
    groups = [str(value_of(run.config, sweep.plot["group"])) for run in runs]
    for role in ("challenger", "baseline"):
        if role in sweep.plot:
            check_choice(f"PLOT[{role!r}]", sweep.plot[role], sorted(set(groups)))
    return runs


def num_steps(config: ConfigDict) -> int:
    """Of a run with this config. Raises ValueError where the config is wrong."""
    if is_rl(config):
        return entry.rl_config(config)[0].loop.steps
    frozen = entry.run_config(config)
    return Schedule(frozen.schedule, frozen.data.batch_size * frozen.data.sequence_length).num_steps


def check_data(run: Run):
    """Raises ValueError where the dataset of a run of experiments.train is not there."""
    for path in () if is_rl(run.config) else run.config.to_dict()["data"]["paths"]:
        load_manifest(path, verify_checksums=False)


def check_unchanged(run: Run, places: Mapping[str, object]):
    """Raises ValueError where the run's folder holds a run of another config; the data, `places`
    and the mesh may have moved.
    """
    file = run.folder / "config.json"
    if not file.is_file():
        return
    old = ConfigDict(json.loads(file.read_text()))
    new = ConfigDict(json.loads(run.config.to_json()))
    for key in sorted({*keys_of(old), *keys_of(new)}):
        if key == "data.paths" or key in places or key.startswith("mesh."):
            continue
        before, now = (value_of(c, key) if key in keys_of(c) else "nothing" for c in (old, new))
        if before != now:
            raise ValueError(
                f"{run.folder} was started with {key}={before!r}, not {now!r}; use another"
                " --workdir"
            )


def execute(run: Run, progress: bool) -> tuple[int, bool]:
    """Trains in a process of its own. Returns its exit code, and whether SIGTERM or SIGINT came
    meanwhile (it is handed on).
    """
    child = subprocess.Popen(run.command(progress))
    stopped = []

    def hand_on(number, _):
        stopped.append(number)
        child.send_signal(number)

    previous = {
        number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return child.wait(), bool(stopped)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def keys_of(config: ConfigDict) -> list[str]:
    """Dotted names of all values."""
    return [f"{section}.{key}" for section, keys in config.to_dict().items() for key in keys]


def value_of(config: ConfigDict, key: str):
    section, name = key.split(".")
    return config.to_dict()[section][name]


def override(config: ConfigDict, key: str, value, where: str):
    """Sets a dotted key. Raises ValueError for one that does not exist, naming the nearest, or for
    another type.
    """
    section, _, name = key.partition(".")
    check_choice(f"{where}: config section", section, list(config))
    check_choice(f"{where}: config.{section} key", name, list(config.to_dict()[section]))
    try:
        config.update({section: {name: value}})
    except TypeError as error:
        raise ValueError(f"{where}: {key}={value!r}: {error}") from error


def _import(path: str, kind: str):
    file = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location(f"{kind}_{file.stem}", file)
    if file.suffix != ".py" or not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{kind} {path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{kind} {path!r}: {error}") from error
    return module
