"""Rejection sampling and self-distillation: a finished run's rollouts on tasks, judged and
filtered, for experiments.sft to learn from.

Experts into one model: each distilled, with and without reasoning, then the base model fine-tuned
on all the files.

python -m experiments.distill --workdir=EXPERT --tasks=puzzle:chain_sum:500,code.jsonl \
    --output=W/expert.jsonl
python -m experiments.distill --workdir=EXPERT --tasks=chat.jsonl --output=W/chat.jsonl \
    --thinking=false --drop_shortest=0
python -m experiments.sft --config=configs/sft_unified.py --workdir=W/unified \
    --config.data.paths='("W/expert.jsonl","W/chat.jsonl")'

Round the loop: a reinforced run distilled in place of the cold-start set, fine-tuning from the base
again, then harder tasks.

python -m experiments.distill --workdir=W/rl --tasks=puzzle:chain_sum:500 \
    --output=W/second_start.jsonl
python -m experiments.sft --config=configs/sft_tiny.py --workdir=W/sft2 \
    --config.data.paths='("W/second_start.jsonl",)'
python -m experiments.rl --config=configs/rl_math_tiny.py --workdir=W/rl2 \
    --config.start.workdir=W/sft2
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import entry, flag_groups
from glm_jax.sft import distillation
from glm_jax.sft.rejection import RejectionConfig

SAMPLING = flag_groups.SamplingFlags.define()
SAMPLES = flags.DEFINE_integer("samples", 8, "The number of rollouts of every task.", lower_bound=1)
MIN_TOKENS = flags.DEFINE_integer(
    "min_tokens", 1, "Drops outputs with fewer tokens.", lower_bound=1
)
MIN_REWARD = flags.DEFINE_float("min_reward", 1.0, "Drops outputs whose reward is lower.")
DROP_SHORTEST = flags.DEFINE_float(
    "drop_shortest", 0.5, "Drops this share of the tasks, those whose kept outputs are shortest."
)
HARD_PASS_RATE = flags.DEFINE_float(
    "hard_pass_rate", 0.5, "Calls a task hard if at most this share of its rollouts is right."
)
HARD_RESPONSES = flags.DEFINE_integer(
    "hard_responses", 4, "The maximum number of outputs kept of a hard task.", lower_bound=1
)
EASY_RESPONSES = flags.DEFINE_integer(
    "easy_responses", 1, "The maximum number of outputs kept of any other task.", lower_bound=1
)


def main():
    config = RejectionConfig(
        min_tokens=MIN_TOKENS.value, min_reward=MIN_REWARD.value, drop_shortest=DROP_SHORTEST.value,
        hard_pass_rate=HARD_PASS_RATE.value,
        hard_responses=HARD_RESPONSES.value, easy_responses=EASY_RESPONSES.value,
        min_preference=0.0,  # of no effect: every task has a verifier
    )  # fmt: skip
    output = pathlib.Path(SAMPLING.output.value)
    counts = distillation.distill(
        SAMPLING.workdir.value, SAMPLING.tasks.value, output, SAMPLING.spec(SAMPLES.value),
        SAMPLING.num_rows.value, config, progress=True,
    )  # fmt: skip
    print(distillation.table(counts))
    print(f"{counts['kept']} conversations in {output}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "tasks", "output"])
    entry.run(main)
