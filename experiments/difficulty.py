"""Measures tasks with a fine-tuned run, for the curriculum of experiments.rl: solved in how many of
how many rollouts.

python -m experiments.difficulty --workdir=SFT --tasks=puzzle:chain_sum:2000 \
    --output=difficulty.jsonl
"""

from __future__ import annotations

import pathlib

from absl import flags
from tqdm import tqdm

from experiments import entry
from glm_jax.envs.worker import SamplingSpec
from glm_jax.evaluation import run_worker
from glm_jax.rl.difficulty import measure, write_difficulties

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The work directory of the run that reinforcement learning will start from."
)
TASKS = flags.DEFINE_list(
    "tasks",
    None,
    "The sources of tasks as in config.tasks.train: puzzle:GENERATOR:COUNT or task files.",
)
OUTPUT = flags.DEFINE_string("output", None, "The JSONL file to write.")
FEW = flags.DEFINE_integer("few", 8, "The number of rollouts of every task.", lower_bound=1)
MANY = flags.DEFINE_integer(
    "many",
    512,
    "The maximum number of rollouts of a task that has not been solved before.",
    lower_bound=1,
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 64, "The maximum number of tokens of an output.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "The sampling temperature.", lower_bound=0.0)
THINKING = flags.DEFINE_bool("thinking", True, "Asks the model to reason.")
NUM_ROWS = flags.DEFINE_integer(
    "num_rows", 64, "The number of rollouts that the engine samples at a time.", lower_bound=1
)
SEED = flags.DEFINE_integer("seed", 0, "Seeds everything that is sampled.", lower_bound=0)


def main(argv: list[str]):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; flags start with --")
    spec = SamplingSpec(
        FEW.value, MAX_NEW_TOKENS.value, TEMPERATURE.value, SEED.value, THINKING.value
    )
    tasks, worker = run_worker.open_worker(WORKDIR.value, TASKS.value, spec, NUM_ROWS.value)
    with tqdm(unit="rollout", desc="difficulty") as bar:
        found = measure(worker, tasks, spec, MANY.value, bar.update)
    write_difficulties(pathlib.Path(OUTPUT.value), found)
    never = sum(d.solved == 0 for d in found.values())
    always = sum(d.solved == d.tried for d in found.values())
    print(
        f"{len(found)} tasks: {always} always solved, {len(found) - always - never} sometimes,"
        f" {never} never; {OUTPUT.value}"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "tasks", "output"])
    entry.run(main)
