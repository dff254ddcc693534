"""Where the time of a reinforcement-learning step goes: generate, score, train, swap, by group size
and output length.

    python -m experiments.measure_rl --workdir=SFT

SFT: a run of experiments.sft with configs/sft_tiny.py. The step is that of configs/rl_math_tiny.py,
but outputs do not stop: every one has the whole length; half of each group is rewarded. Prints
medians of a few steps, without the first, which compiles.
"""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import rl_math_tiny
from experiments import entry
from glm_jax.envs.episode import SamplingSpec
from glm_jax.rewards import verifiers
from glm_jax.rl import loop
from glm_jax.rl.source import InProcess
from glm_jax.rollouts.task import Reward

WORKDIR = flags.DEFINE_string("workdir", None, "The work directory of the run to start from.")
STEPS = flags.DEFINE_integer(
    "steps", 3, "The number of steps to time for each size.", lower_bound=1
)
SIZES = flags.DEFINE_list(
    "sizes",
    ["4x16", "8x16", "16x16", "32x16", "8x32", "8x64"],
    "The sizes to time as GROUPxLENGTH: rollouts of a task, and tokens of each.",
)
PHASES = ("generate", "score", "train", "swap")


def step(run: loop.Run, spec: SamplingSpec, number: int) -> dict[str, float]:
    """Seconds of each phase."""
    tasks = run.controllers.take(run.config.rollout.prompts_per_step)
    groups = run.source.rollouts(tasks, spec, number)
    asked = [task for task in tasks for _ in range(spec.group_size)]
    with run.timed("score"):
        verifiers.score(asked, [{"role": "assistant", "content": r"\boxed{5}"}] * len(asked))
    for group in groups:
        for place, rollout in enumerate(group.rollouts):
            rollout.reward = Reward(float(place % 2), {})
    with run.timed("train"):
        run.learner.learn(groups, spec.temperature, number)
    with run.timed("swap"):
        run.source.set_weights(run.learner.weights(), run.learner.version)
    return run.phases()


def measure(config: ConfigDict, group_size: int, length: int) -> dict[str, float]:
    """Median seconds of each phase."""
    engine = entry.rl_config(config)[0].engine
    context = engine.context + length
    pages = engine.num_rows * -(-context // engine.page_size)
    config.update(
        start={"workdir": entry.given(WORKDIR)},
        engine={"context": context, "num_pages": pages},
        grpo={"row_length": 2 * -(-context // 16) * 16},
        rollout={"group_size": group_size},
        control={"length_stages": ((0, length),)},
    )
    rl, start = entry.rl_config(config)
    spec = SamplingSpec(group_size, length, 1.0, rl.loop.seed, rl.tasks.thinking)
    with tempfile.TemporaryDirectory() as folder:
        run = loop.open_run(
            rl, start, pathlib.Path(folder), config_json=config.to_json(), progress=False
        )
        assert isinstance(run.source, InProcess)
        run.source.worker.stop_tokens = ()
        found = [step(run, spec, i * rl.rollout.prompts_per_step) for i in range(STEPS.value + 1)][
            1:
        ]
        run.close()
    return {phase: float(np.median([seconds[phase] for seconds in found])) for phase in PHASES}


def main():
    sizes = [size.split("x") for size in SIZES.value]
    if not all(
        len(size) == 2 and all(n.isdecimal() and int(n) > 1 for n in size) for size in sizes
    ):
        raise ValueError(f"--sizes={','.join(SIZES.value)}: must be GROUPxLENGTH, such as 8x16")
    print(
        "| rollouts of a task | tokens of each | "
        + " | ".join(f"{phase}, s" for phase in PHASES)
        + " | generate |\n"
        + "|"
        + " --- |" * 7
    )
    for group_size, length in (map(int, size) for size in sizes):
        seconds = measure(rl_math_tiny.get_config(), group_size, length)
        share = seconds["generate"] / sum(seconds.values())
        print(
            f"| {group_size} | {length} | "
            + " | ".join(f"{seconds[phase]:.2f}" for phase in PHASES)
            + f" | {share:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    entry.run(main)
