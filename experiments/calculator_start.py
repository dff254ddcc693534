"""Tasks and cold start of the environment `calculator`."""

from __future__ import annotations

import itertools

import numpy as np

from glm_jax.envs import calculator
from glm_jax.envs.scripted import play
from glm_jax.rewards.puzzles import split_of
from glm_jax.rollouts.task import Task


def tasks(split: str) -> list[Task]:
    """A product of two digits and a third one added or subtracted, but for results below 0: all
    questions of a split, by the hash of their text.
    """
    found = []
    for a, b, sign, c in itertools.product(range(2, 10), range(2, 10), "+-", range(1, 10)):
        question, answer = f"What is {a}*{b}{sign}{c}?", calculator.OPERATIONS[sign](a * b, c)
        if answer >= 0 and split_of(question) == split:
            prompt = ({"role": "user", "content": question},)
            found.append(Task(question, "calculator", "calculator", prompt, answer))
    return found


def conversations(count: int, worked_share: float, lots: np.random.Generator) -> list[dict]:
    """`count` episodes on training tasks, which come more than once: the expert's, or of one who
    guesses at once, with another task's answer.
    """
    pool, found = tasks("train"), []
    asked, others = lots.integers(len(pool), size=(2, count))
    for mine, other, works in zip(asked, others, lots.random(count) < worked_share, strict=True):
        guess = {"role": "assistant", "content": str(pool[other].answer)}
        agent = calculator.expert if works else lambda messages, guess=guess: guess
        played = play(calculator.Calculator(), pool[mine], agent)
        found.append({"messages": played.messages, "tools": played.tools, "thinking": False})
    return found
