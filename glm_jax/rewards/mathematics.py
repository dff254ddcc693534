"""Verifier `math`: the boxed answer is mathematically the reference, as math-verify judges it.

A task's answer is the reference in LaTeX, without box or dollars: `\\frac{1}{2}`, `x = 3`, `\\{1,
2\\}`. What has the same value is the same answer, so that a sum that is not worked out counts as
its result. The rules, also inside tuples, sets, intervals and matrices:

- Numbers must be equal exactly, whatever their size: integers, fractions and decimals as rationals,
  others to 300 digits. An approximation of an exact reference is wrong (`\\pi` is not 3.14159265;
  1/2 is 0.5). Only a decimal reference of at least three significant digits (two with a power of
  ten) also takes what rounds to it: 3.14159 is right for 3.14, 0.51 is wrong for 0.5.
- A reference with a unit needs that unit, in any spelling and not converted; only degrees and
  dollars may be left out. A unit beyond the reference's is ignored. 50% is 0.5 and not 50. Numbers
  in another base than 10 need the reference's base.
- A chain (`1/2 = 0.5`, `x = \\pi \\approx 3.14`) counts only if all its numbers are equal, or round
to one another.
- Values of several names (`x=2, y=3`) may come in any order with their names, without names in the
reference's order.
- Inequalities in one variable are the set that solves them. For everything else the verdict is
math-verify's.

math-verify runs in processes of its own (`math_judge`): its limits need the main thread, do not
stop everything, and an answer must not stop or fill the process that trains.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from glm_jax.rewards.answer_format import boxed_answer
from glm_jax.rollouts.task import Reward, Task

MAX_LENGTH = 1_000  # characters of an answer; nobody asks for more
MAX_JUDGES = 8
# a wrong answer: a reference that is no number to compute with cannot be compared with it
_UNLIKELY = "1729.125"


def check(tasks: Sequence[Task]) -> None:
    """Raises ValueError naming the first task whose reference math-verify cannot read, does not
    find equal to itself, or cannot compare within its limits.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("verifier 'math' needs math-verify: pip install -r requirements.txt")
    for task in tasks:
        if not isinstance(task.answer, str) or len(task.answer) > MAX_LENGTH:
            raise ValueError(
                f"task {task.id!r}: its answer must be LaTeX of at most {MAX_LENGTH} characters,"
                f" not {task.answer!r:.100}"
            )
    for other, wrong in ((None, ("different", "failed")), (_UNLIKELY, ("failed",))):
        verdicts = _judge_all([(task.answer, other or task.answer) for task in tasks])
        for task, verdict in zip(tasks, verdicts, strict=True):
            if verdict in wrong:
                raise ValueError(
                    f"task {task.id!r}: math-verify cannot use its answer {task.answer!r}"
                    f" ({verdict})"
                )


def score(tasks: Sequence[Task], messages: Sequence[Mapping]) -> list[Reward]:
    """1 for the right answer in the last box of the content. Parts: `correct`; `answered`, there is
    a box; `judged`, 0 where the judgement took too much time or memory; `environment_error`, 1
    where a judge died.
    """
    answers = [boxed_answer(message["content"]) for message in messages]
    usable = [a if a is not None and len(a) <= MAX_LENGTH else None for a in answers]
    asked = [(task.answer, a) for task, a in zip(tasks, usable, strict=True) if a is not None]
    verdicts = iter(_judge_all(asked))
    return [
        _reward(answer, "different" if use is None else next(verdicts))
        for answer, use in zip(answers, usable, strict=True)
    ]


def _reward(answer: str | None, verdict: str) -> Reward:
    correct = float(verdict == "same")
    parts = {
        "correct": correct,
        "answered": float(answer is not None),
        "judged": float(verdict in ("same", "different")),
    }
    return Reward(correct, parts | ({"environment_error": 1.0} if verdict == "died" else {}))


# --- judges ---


class _Judge:
    """A process of `math_judge`. It ends with us: its questions come through a pipe of ours."""

    def __init__(self):
        # -P: our folder must not shadow the standard library. The seed: the order of a set must not
        # decide a verdict.
        command = [sys.executable, "-P", str(pathlib.Path(__file__).with_name("math_judge.py"))]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        if self._stdout.readline() != "ready\n":
            raise RuntimeError(
                f"the judge of mathematical answers does not start; see {' '.join(command)}"
            )

    def ask(self, reference: str, answer: str) -> str:
        """same, different or failed; died: and so will every question after it."""
        try:
            self._stdin.write(json.dumps([reference, answer]) + "\n")
            self._stdin.flush()
        except BrokenPipeError:
            return "died"
        return self._stdout.readline().strip() or "died"


_idle: queue.SimpleQueue[_Judge] = queue.SimpleQueue()


def _judge_all(questions: Sequence[tuple[str, str]]) -> list[str]:
    """Verdicts in order; no question is asked twice."""
    asked = list(dict.fromkeys(questions))
    with ThreadPoolExecutor(min(MAX_JUDGES, os.cpu_count() or 1)) as threads:
        verdicts = dict(zip(asked, threads.map(_judge_one, asked), strict=True))
    return [verdicts[question] for question in questions]


def _judge_one(question: tuple[str, str]) -> str:
    try:
        judge = _idle.get_nowait()
    except queue.Empty:
        judge = _Judge()
    verdict = judge.ask(*question)
    if verdict != "died":
        _idle.put(judge)
    return verdict
