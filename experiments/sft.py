"""Supervised fine-tuning on conversations, or its continuation: run the same command again.

python -m experiments.sft --config=configs/sft_tiny.py --workdir=W \
    --config.start.workdir=PRETRAINED --config.data.paths='("chat.jsonl",)'
"""

from __future__ import annotations

from absl import flags

from experiments import entry, flag_groups
from glm_jax.sft.conversations import SOURCE
from glm_jax.train import loop

RUN = flag_groups.RunFlags.define()


def main():
    config, workdir = RUN.begin(entry.sft_config)
    steps = loop.train(
        config,
        workdir,
        config_json=RUN.config.value.to_json(indent=2),
        progress=RUN.progress.value,
        source=SOURCE,
    )
    print(f"{steps} steps done; metrics, samples and checkpoints are in {workdir}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    entry.run(main)
