"""Asynchronous beside synchronous reinforcement learning, where environments are slow: steps an
hour, and how long engine and trainer wait.

    python -m experiments.measure_async --workdir=SFT

SFT: a run of experiments.sft with configs/sft_tiny.py. Episodes of three turns; before each turn
the environment waits, log-normally: --median_seconds, and 1% longer than 60 times that. Rewards are
random, so that every group is trained on. Prints a table, a line a mode, and the ratio.
"""

from __future__ import annotations

import collections
import pathlib
import tempfile
import time

import numpy as np
from absl import flags

from configs import rl_math_tiny
from experiments import entry
from glm_jax.envs import environment
from glm_jax.envs.environment import Kind, Start, Step
from glm_jax.envs.worker import RolloutWorker
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


def read_anything(worker, tools, request):
    """For RolloutWorker.read: what the model writes is not the point."""
    del worker, tools, request
    return RolloutStatus.COMPLETED, {"role": "assistant", "content": ""}


def run(asynchronous: bool) -> dict[str, float]:
    """Seconds of the timed steps, and of what engine and trainer do in them."""
    config = rl_math_tiny.get_config()
    steps = STEPS.value + WARM
    config.start.workdir = entry.given(WORKDIR)
    config.engine.context, config.engine.num_pages = 288, 64 * 18
    config.grpo.update(row_length=288, max_staleness=STALENESS.value if asynchronous else 0)
    config.rollout.asynchronous = asynchronous
    config.control.length_stages = ((0, 48),)
    config.loop.update(steps=steps, checkpoint_every=steps, eval_every=steps, eval_samples=1)
    config.loop.save_rollouts_every = 0
    config.tasks.held_out = ("puzzle:aiw:1",)
    rl, start = entry.rl_config(config)
    with tempfile.TemporaryDirectory() as folder:
        opened = loop.open_run(
            rl, start, pathlib.Path(folder), config_json=config.to_json(), progress=False
        )
        opened.config = rl
        ends = []
        record = opened.folder.record
        opened.folder.record = lambda line: (ends.append(time.perf_counter()), record(line))
        opened.loop()
        opened.close()
        lines = read_metrics(pathlib.Path(folder))[WARM:]
    found = collections.Counter(seconds=ends[-1] - ends[WARM - 1], rollouts=0)
    for line in lines:
        found.update({k: v for k, v in line.items() if k.startswith("seconds/")})
        found["rollouts"] += line.get("groups_trained", len(lines) and 16) * 8
    return dict(found)


def main():
    environment.ENVIRONMENTS["slow"] = Kind(Slow, lambda tasks: None)
    RolloutWorker.read = read_anything
    print(MEDIAN.value, run(False), run(True))


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    entry.run(main)
