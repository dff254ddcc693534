"""Reinforcement learning with GRPO from a fine-tuned run, or its continuation: run the same command
again.

python -m experiments.rl --config=configs/rl_math_tiny.py --workdir=W --config.start.workdir=SFT
"""

from __future__ import annotations

from absl import flags

from experiments import entry, flag_groups
from glm_jax.rl import loop

RUN = flag_groups.RunFlags.define()


def main():
    (config, start), workdir = RUN.begin(entry.rl_config, alone="experiments.rl")
    steps = loop.train(
        config,
        start,
        workdir,
        config_json=RUN.config.value.to_json(indent=2),
        progress=RUN.progress.value,
    )
    print(f"{steps} steps done; metrics, rollouts and checkpoints are in {workdir}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    entry.run(main)
