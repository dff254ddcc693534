"""Asynchronous beside synchronous reinforcement learning, where environments are slow: seconds of a
step, and how long engine and trainer wait.

    python -m experiments.measure_async --workdir=SFT

SFT: a run of experiments.sft with configs/sft_tiny.py. Episodes of three turns; before each turn
the environment waits, log-normally: --median_seconds, and 1% longer than 60 times that. Rewards are
random, so that every group is trained on. Prints a table, a line a mode, and the ratio.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import tempfile
import time

import numpy as np
from absl import flags

from configs import rl_math_tiny
from experiments import entry
from glm_jax.envs import registry
from glm_jax.envs.environment import Kind, Start, Step
from glm_jax.envs.worker import RolloutWorker
from glm_jax.rewards import puzzles
from glm_jax.rl import loop
from glm_jax.rollouts.rollout import RolloutStatus
from glm_jax.rollouts.task import Reward
from glm_jax.run.recorder import read_metrics

WORKDIR = flags.DEFINE_string("workdir", None, "The work directory of the run to start from.")
STEPS = flags.DEFINE_integer("steps", 8, "The number of timed steps of each mode.", lower_bound=2)
MEDIAN = flags.DEFINE_float(
    "median_seconds", 0.05, "The median of the environment's answer.", lower_bound=0.0
)
STALENESS = flags.DEFINE_integer(
    "max_staleness", 4, "The updates that asynchronous rollouts may be older.", lower_bound=0
)
TAIL = 60.0  # times the median, the 99th percentile
TURNS, WARM = 3, 2  # of an episode; steps that compile


class Slow:
    """An episode of TURNS turns with a slow environment, whatever the model writes."""

    def reset(self, task, seed):
        self.rng, self.turns = np.random.default_rng(seed), 0
        return Start(task.messages)

    def step(self, message):
        del message
        sigma = np.log(TAIL) / 2.326  # standard normal's 99th percentile
        time.sleep(MEDIAN.value * float(np.exp(sigma * self.rng.standard_normal())))
        self.turns += 1
        done = self.turns == TURNS
        answer = [] if done else [{"role": "user", "content": "and?"}]
        return Step(answer, done, Reward(float(self.rng.integers(2)) if done else 0.0, {}))


def read_anything(self, tools, request):
    """For RolloutWorker.read: what the model writes is not the point."""
    del self, tools, request
    return RolloutStatus.COMPLETED, {"role": "assistant", "content": ""}


def run(asynchronous: bool) -> dict[str, float]:
    """Mean seconds of the timed steps: `step`, and by phase as seconds/<phase> of the metrics."""
    config = rl_math_tiny.get_config()
    steps = STEPS.value + WARM
    config.update_from_flattened_dict(
        {
            "start.workdir": entry.given(WORKDIR),
            "engine.context": 288, "engine.num_pages": 64 * 18, "grpo.row_length": 288,
            "grpo.max_staleness": STALENESS.value if asynchronous else 0,
            "rollout.asynchronous": asynchronous, "control.length_stages": ((0, 48),),
            "loop.steps": steps, "loop.checkpoint_every": steps, "loop.eval_every": steps,
            "loop.eval_samples": 1, "loop.save_rollouts_every": 0,
            "tasks.held_out": ("puzzle:aiw:1",),
        }
    )  # fmt: skip
    rl, start = entry.rl_config(config)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        opened = loop.open_run(rl, start, workdir, config_json=config.to_json(), progress=False)
        ends = []
        one_step = opened.one_step
        opened.one_step = lambda: (one_step(), ends.append(time.perf_counter()))[0]
        opened.loop()
        opened.close()
        lines = read_metrics(workdir)[WARM:]
    found = collections.Counter(step=(ends[-1] - ends[WARM - 1]) / STEPS.value)
    for line in lines:
        phases = {k.removeprefix("seconds/"): v for k, v in line.items() if "seconds/" in k}
        found.update({name: seconds / STEPS.value for name, seconds in phases.items()})
    return dict(found)


def main():
    registry.ENVIRONMENTS["slow"] = Kind(Slow, lambda tasks: None)
    original = puzzles.tasks
    puzzles.tasks = lambda *source: [
        dataclasses.replace(task, verifier="slow") for task in original(*source)
    ]
    setattr(RolloutWorker, "read", read_anything)  # noqa: B010
    found = {"synchronous": run(False), "asynchronous": run(True)}
    phases = ("step", "collect", "generate", "idle", "train", "swap")
    print("| seconds a step | " + " | ".join(phases) + " |\n|" + " --- |" * (len(phases) + 1))
    for mode, seconds in found.items():
        row = " | ".join(f"{seconds.get(phase, 0.0):.2f}" for phase in phases)
        print(f"| {mode} | {row} |")
    ratio = found["synchronous"]["step"] / found["asynchronous"]["step"]
    print(f"asynchronous / synchronous: {ratio:.2f} times the rollouts a second")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    entry.run(main)
