"""What the entry points share: config flags to dataclasses, and errors that fit on a line."""

from __future__ import annotations

import logging as python_logging
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from data.pipeline import DataConfig
from glm_jax.config import ModelConfig, check_choice, from_mapping
from glm_jax.devices import choose_platforms, describe, keep_compiled_programs
from glm_jax.infer.config import EngineConfig
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.optim.schedules import ScheduleConfig
from glm_jax.rl.config import (
    ControlConfig,
    GrpoConfig,
    RlConfig,
    RlLoopConfig,
    RolloutConfig,
    TasksConfig,
)
from glm_jax.sft.conversations import ConversationConfig
from glm_jax.sharding import MeshConfig
from glm_jax.train.loop import LoopConfig, RunConfig
from glm_jax.train.start import StartConfig

PRETRAINING = {
    "model": ModelConfig,
    "mesh": MeshConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "data": DataConfig,
    "loop": LoopConfig,
    "start": StartConfig,
}


logger = python_logging.getLogger(__name__)
_Value = TypeVar("_Value")
FAREWELL_SECONDS = 10  # that a process with an error waits for the others
BACKGROUND = "background"  # logger of what other libraries' threads raise
# Loggers whose warnings the terminal shows; those of other libraries go to log.txt.
ON_TERMINAL = ("glm_jax", "data", "pallas_kernels", "experiments", "root", "jax", "uvicorn")
SFT = {**PRETRAINING, "data": ConversationConfig}
RL = {
    "model": ModelConfig,
    "mesh": MeshConfig,
    "optimizer": OptimizerConfig,
    "engine": EngineConfig,
    "tasks": TasksConfig,
    "rollout": RolloutConfig,
    "grpo": GrpoConfig,
    "control": ControlConfig,
    "loop": RlLoopConfig,
    "start": StartConfig,
}


def sections(config: ConfigDict, kinds: Mapping[str, type]) -> dict:
    """The frozen sections of a config. Raises ValueError naming a key that is unknown, missing or
    of the wrong type.
    """
    tree = config.to_dict()
    for section in tree:
        check_choice("config section", section, kinds)
    missing = [s for s in kinds if s not in tree]
    if missing:
        raise ValueError(f"config lacks the sections {', '.join(missing)}")
    return {
        section: from_mapping(cls, tree[section], f"config.{section}")
        for section, cls in kinds.items()
    }


def run_config(config: ConfigDict) -> RunConfig:
    """The configuration of experiments.train."""
    return RunConfig(**sections(config, PRETRAINING))


def sft_config(config: ConfigDict) -> RunConfig:
    """The configuration of experiments.sft: the same, but its data are conversations."""
    return RunConfig(**sections(config, SFT))


def rl_config(config: ConfigDict) -> tuple[RlConfig, StartConfig]:
    """The configuration of experiments.rl."""
    parts = sections(config, RL)
    start = parts.pop("start")
    return RlConfig(**parts), start


def log_to(workdir: pathlib.Path):
    """Everything that is logged goes to the run's log.txt, too (of further processes,
    log_process_<index>.txt). Says, there and on the terminal, which devices compute.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    index = jax.process_index()
    handler = python_logging.FileHandler(
        workdir / (f"log_process_{index}.txt" if index else "log.txt")
    )
    handler.setFormatter(
        python_logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    python_logging.getLogger().addHandler(handler)
    devices = describe()
    logger.info("devices: %s", devices)
    print(f"devices: {devices}", file=sys.stderr)


def given(flag: flags.FlagHolder[_Value | None]) -> _Value:
    """The value of a flag that is marked as required. Raises ValueError where it was not given."""
    if flag.value is None:
        raise ValueError(f"--{flag.name} is required")
    return flag.value


def positive_integers(flag: flags.FlagHolder[list[str]]) -> tuple[int, ...]:
    """Of a list flag. Raises ValueError naming the first value that is none."""
    for value in flag.value:
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--{flag.name}={value}: must be a whole number, at least 1")
    if not flag.value:
        raise ValueError(f"--{flag.name} is empty; at least one number is needed")
    return tuple(map(int, flag.value))


def run(main: Callable[[], None]):
    """app.run, with expected failures as one line on stderr and exit code 1; an argument that is
    no flag is one. The terminal gets our warnings, log.txt everything.
    """
    terminal = logging.get_absl_handler()
    terminal.setLevel("WARNING")
    terminal.addFilter(lambda record: record.name.partition(".")[0] in ON_TERMINAL)
    # a log.txt that cannot be written is no news beside the error that says so
    python_logging.raiseExceptions = False
    log_background_errors()
    choose_platforms()
    keep_compiled_programs()
    app.run(lambda argv: guarded(main, argv), flags_parser=parse_flags)


def log_background_errors():
    """What a library's own threads raise goes to log.txt: the call that waits for them raises it,
    too, and becomes the one line.
    """
    log, of_main_thread = python_logging.getLogger(BACKGROUND), sys.excepthook

    def on_exception(kind, error, trace):
        if threading.current_thread() is threading.main_thread():
            of_main_thread(kind, error, trace)
        else:
            log.error("in a background thread", exc_info=(kind, error, trace))

    sys.excepthook = on_exception
    threading.excepthook = lambda args: log.error("in a background thread", exc_info=args.exc_value)
    sys.unraisablehook = lambda args: log.error("%s", args.err_msg, exc_info=args.exc_value)


def guarded(main: Callable[[], None], argv: Sequence[str]):
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}; flags start with --")
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            # The usual exit waits minutes for the other processes, which wait for this one where
            # the error is its own. They end when they learn that it is gone. A thread could not
            # end it: that wait holds Python's lock.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(FAREWELL_SECONDS)
        sys.exit(1)


def parse_flags(argv):
    """Parses flags; a wrong config key gets the nearest valid one."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
