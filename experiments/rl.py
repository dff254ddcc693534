"""Reinforcement learning with GRPO from a fine-tuned run, or its continuation: run the same command
again.

python -m experiments.rl --config=configs/rl_math_tiny.py --workdir=W --config.start.workdir=SFT
"""

from __future__ import annotations

import pathlib

from absl import flags
from ml_collections import config_flags

from experiments import entry
from glm_jax.rl import loop
from glm_jax.sharding import one_process

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config of the run: a file of configs/. Override any key with --config.a.b=value.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the run, for config, checkpoints, metrics, rollouts and log."
)
PROGRESS = flags.DEFINE_bool("progress", True, "Shows a progress bar.")
PROCESSES = entry.Processes.define()


def main(argv: list[str]):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; flags start with --")
    PROCESSES.start()
    one_process("experiments.rl")
    config, start = entry.rl_config(CONFIG.value)
    workdir = pathlib.Path(WORKDIR.value)
    entry.log_to(workdir)
    steps = loop.train(
        config, start, workdir, config_json=CONFIG.value.to_json(indent=2), progress=PROGRESS.value
    )
    print(f"{steps} steps done; metrics, rollouts and checkpoints are in {workdir}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    entry.run(main)
