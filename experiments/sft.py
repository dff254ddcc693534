"""Supervised fine-tuning on conversations, or its continuation: run the same command again.

python -m experiments.sft --config=configs/sft_tiny.py --workdir=W \
    --config.start.workdir=PRETRAINED --config.data.paths='("chat.jsonl",)'
"""

from __future__ import annotations

import pathlib

from absl import flags
from ml_collections import config_flags

from experiments import entry
from glm_jax.sft.conversations import SOURCE
from glm_jax.train import loop

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config of the run: a file of configs/. Override any key with --config.a.b=value.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the run, for config, checkpoints, metrics, samples and log."
)
PROGRESS = flags.DEFINE_bool("progress", True, "Shows a progress bar.")
PROCESSES = entry.Processes.define()


def main(argv: list[str]):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; flags start with --")
    PROCESSES.start()
    config = entry.sft_config(CONFIG.value)
    workdir = pathlib.Path(WORKDIR.value)
    entry.log_to(workdir)
    steps = loop.train(
        config,
        workdir,
        config_json=CONFIG.value.to_json(indent=2),
        progress=PROGRESS.value,
        source=SOURCE,
    )
    print(f"{steps} steps done; metrics, samples and checkpoints are in {workdir}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    entry.run(main)
