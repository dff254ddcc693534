"""What the entry points share: config flags to dataclasses, and errors that fit on a line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, logging
from ml_collections import ConfigDict

from data.pipeline import DataConfig
from glm_jax.config import ModelConfig, check_choice, from_mapping
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.optim.schedules import ScheduleConfig
from glm_jax.sharding import MeshConfig
from glm_jax.train.loop import LoopConfig, RunConfig

SECTIONS = {
    "model": ModelConfig,
    "mesh": MeshConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "data": DataConfig,
    "loop": LoopConfig,
}


def run_config(config: ConfigDict) -> RunConfig:
    """The frozen configuration of a run. Raises ValueError naming a key that is unknown, missing or of the wrong type."""
    tree = config.to_dict()
    for section in tree:
        check_choice("config section", section, SECTIONS)
    missing = [s for s in SECTIONS if s not in tree]
    if missing:
        raise ValueError(f"config lacks the sections {', '.join(missing)}")
    return RunConfig(**{section: from_mapping(cls, tree[section], f"config.{section}") for section, cls in SECTIONS.items()})


def run(main: Callable[[list[str]], None]):
    """app.run, with expected failures as one line on stderr and exit code 1. The terminal gets warnings, log.txt everything."""
    logging.get_absl_handler().setLevel("WARNING")
    app.run(lambda argv: guarded(main, argv), flags_parser=parse_flags)


def guarded(main, argv):
    try:
        main(argv)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def parse_flags(argv):
    """Parses flags; a wrong config key gets the nearest valid one."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
