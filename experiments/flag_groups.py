"""Flags that several entry points have, each group defined once."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TypeVar

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import entry
from glm_jax.envs.episode import SamplingSpec
from glm_jax.sharding import one_process

_Config = TypeVar("_Config")
flags.disclaim_key_flags()  # what is defined here is the caller's, so that its --help shows it


@dataclasses.dataclass(frozen=True)
class Processes:
    """The flags of a run of several processes, one a host."""

    distributed: flags.FlagHolder
    coordinator: flags.FlagHolder
    num_processes: flags.FlagHolder
    process_index: flags.FlagHolder

    @classmethod
    def define(cls) -> Processes:
        """Defines the flags as those of the calling module, so that its --help shows them."""
        unset = "By default the cluster manager says it (TPU, GKE, Slurm, Open MPI)."
        return cls(
            flags.DEFINE_bool(
                "distributed",
                False,
                "Starts jax.distributed first, one process on each host of a pod.",
            ),
            flags.DEFINE_string(
                "coordinator", None, f"With --distributed, HOST:PORT of process 0. {unset}"
            ),
            flags.DEFINE_integer(
                "num_processes", None, f"With --distributed, the number of processes. {unset}"
            ),
            flags.DEFINE_integer(
                "process_index", None, f"With --distributed, the index of this process. {unset}"
            ),
        )

    def start(self):
        """Joins the other processes, where the flags say that there are any. To be called before
        JAX's first use.
        """
        given = self.coordinator.value, self.num_processes.value, self.process_index.value
        missing = [value is None for value in given]
        if (any(missing) and not all(missing)) or (not all(missing) and not self.distributed.value):
            raise ValueError(
                "--coordinator, --num_processes and --process_index go together, with --distributed"
            )
        if self.distributed.value:
            jax.distributed.initialize(*given)


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """The flags of a training run: of experiments.train, sft and rl."""

    config: flags.FlagHolder
    workdir: flags.FlagHolder
    progress: flags.FlagHolder
    processes: Processes

    @classmethod
    def define(cls) -> RunFlags:
        """Defines the flags as those of the calling module, so that its --help shows them."""
        return cls(
            config_flags.DEFINE_config_file(
                "config",
                None,
                "The config of the run: a file of configs/. Override any key with"
                " --config.a.b=value.",
            ),
            flags.DEFINE_string(
                "workdir",
                None,
                "The folder of the run, for config, checkpoints, metrics, samples and log.",
            ),
            flags.DEFINE_bool("progress", True, "Shows a progress bar."),
            Processes.define(),
        )

    def begin(
        self, read: Callable[[ConfigDict], _Config], *, alone: str = ""
    ) -> tuple[_Config, pathlib.Path]:
        """Joins the other processes, reads the config, and opens the log of the work directory.
        Gives both. alone: name of what cannot run in several processes; raises ValueError where
        there are.

        Whatever is wrong comes after the joining, as the others would wait for this process.
        """
        self.processes.start()
        if alone:
            one_process(alone)
        config = read(self.config.value)
        workdir = pathlib.Path(self.workdir.value)
        entry.log_to(workdir)
        return config, workdir


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """The flags of what samples rollouts with a finished run: of experiments.difficulty and
    distill.
    """

    workdir: flags.FlagHolder
    tasks: flags.FlagHolder
    output: flags.FlagHolder
    num_rows: flags.FlagHolder
    max_new_tokens: flags.FlagHolder
    temperature: flags.FlagHolder
    thinking: flags.FlagHolder
    seed: flags.FlagHolder

    @classmethod
    def define(cls) -> SamplingFlags:
        """Defines the flags as those of the calling module, so that its --help shows them."""
        return cls(
            flags.DEFINE_string("workdir", None, "The work directory of the run that answers."),
            flags.DEFINE_list(
                "tasks",
                None,
                "The sources of tasks as in config.tasks.train: puzzle:GENERATOR:COUNT or task"
                " files.",
            ),
            flags.DEFINE_string("output", None, "The JSONL file to write."),
            flags.DEFINE_integer(
                "num_rows",
                64,
                "The number of rollouts that the engine samples at a time.",
                lower_bound=1,
            ),
            flags.DEFINE_integer(
                "max_new_tokens", 64, "The maximum number of tokens of an output.", lower_bound=1
            ),
            flags.DEFINE_float("temperature", 1.0, "The sampling temperature.", lower_bound=0.0),
            flags.DEFINE_bool("thinking", True, "Asks the model to reason."),
            flags.DEFINE_integer("seed", 0, "Seeds everything that is sampled.", lower_bound=0),
        )

    def spec(self, group_size: int) -> SamplingSpec:
        """group_size: rollouts of a task."""
        return SamplingSpec(
            group_size,
            self.max_new_tokens.value,
            self.temperature.value,
            self.seed.value,
            self.thinking.value,
        )
