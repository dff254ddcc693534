"""What the environment `software` costs: the start of an episode's sandbox, a command, a verdict.

    python -m experiments.measure_software --tasks=runs/software/tasks.jsonl

Opens --episodes episodes, which stay open together, and prints the median time that one takes to
start; then the median time of a command in each, and of the verdict on the expert's fix of
--verdicts of them. Ends with code 1 where a fix does not earn 1.
"""

from __future__ import annotations

import statistics
import time

from absl import flags

from experiments import entry
from glm_jax.envs.scripted import play
from glm_jax.envs.software import environment
from glm_jax.envs.software.environment import Software
from glm_jax.rollouts.task import read_tasks

TASKS = flags.DEFINE_string("tasks", None, "The task file that experiments.software_tasks wrote.")
EPISODES = flags.DEFINE_integer(
    "episodes", 100, "The number of episodes that are open at once.", lower_bound=2
)
VERDICTS = flags.DEFINE_integer(
    "verdicts", 10, "The number of fixes that are judged.", lower_bound=1
)
COMMAND = {"function": {"name": "run", "arguments": {"command": "true"}}}


def main():
    tasks = read_tasks(entry.given(TASKS))
    environment.check(tasks)
    opened = [Software() for _ in range(EPISODES.value)]
    try:
        starts, commands = [], []
        for number, episode in enumerate(opened):
            task = tasks[number % len(tasks)]
            starts.append(timed(lambda episode=episode, task=task: episode.reset(task, 0)))
        for episode in opened:
            commands.append(timed(lambda e=episode: e.step({"tool_calls": [COMMAND]})))
    finally:
        for episode in opened:
            episode.close()
    print(f"{len(opened)} episodes at once, medians: start {middle(starts)}, a command "
          f"{middle(commands)}")  # fmt: skip
    verdicts = []
    for task in tasks[:: -(-len(tasks) // VERDICTS.value)]:
        started = time.perf_counter()
        if play(Software(), task, environment.expert_of(task)).reward != 1:
            raise ValueError(f"task {task.id!r}: its fix does not earn 1")
        verdicts.append(time.perf_counter() - started)
    print(f"{len(verdicts)} episodes of the expert, median: {middle(verdicts)}")


def timed(work) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def middle(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.0f} ms"


if __name__ == "__main__":
    flags.mark_flags_as_required(["tasks"])
    entry.run(main)
