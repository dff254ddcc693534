"""Trains a model, or resumes: run the same command again. SIGTERM and Ctrl-C save a checkpoint and
exit.

python -m experiments.train --config=configs/tiny.py --workdir=W \
    --config.schedule.learning_rate=5e-3
"""

from __future__ import annotations

from absl import flags

from experiments import entry, flag_groups
from glm_jax.train import loop

RUN = flag_groups.RunFlags.define()


def main():
    config, workdir = RUN.begin(entry.run_config)
    steps = loop.train(
        config,
        workdir,
        config_json=RUN.config.value.to_json(indent=2),
        progress=RUN.progress.value,
    )
    print(f"{steps} steps done; metrics, samples and checkpoints are in {workdir}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    entry.run(main)
