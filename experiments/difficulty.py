"""Measures tasks with a fine-tuned run, for the curriculum of experiments.rl: solved in how many of
how many rollouts.

python -m experiments.difficulty --workdir=SFT --tasks=puzzle:chain_sum:2000 \
    --output=difficulty.jsonl
"""

from __future__ import annotations

import pathlib

from absl import flags
from tqdm import tqdm

from experiments import entry, flag_groups
from glm_jax.evaluation import run_worker
from glm_jax.rl.difficulty import measure, write_difficulties

SAMPLING = flag_groups.SamplingFlags.define()
FEW = flags.DEFINE_integer("few", 8, "The number of rollouts of every task.", lower_bound=1)
MANY = flags.DEFINE_integer(
    "many",
    512,
    "The maximum number of rollouts of a task that has not been solved before.",
    lower_bound=1,
)


def main():
    spec = SAMPLING.spec(FEW.value)
    tasks, worker = run_worker.open_worker(
        SAMPLING.workdir.value, SAMPLING.tasks.value, spec, SAMPLING.num_rows.value
    )
    with tqdm(unit="rollout", desc="difficulty") as bar:
        found = measure(worker, tasks, spec, MANY.value, bar.update)
    output = pathlib.Path(SAMPLING.output.value)
    write_difficulties(output, found)
    never = sum(d.solved == 0 for d in found.values())
    always = sum(d.solved == d.tried for d in found.values())
    print(
        f"{len(found)} tasks: {always} always solved, {len(found) - always - never} sometimes,"
        f" {never} never; {output}"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "tasks", "output"])
    entry.run(main)
