"""Verifier `choice`: the boxed answer is the letter of the right option.

A task's answer is {"letter": "B", "options": 4}: the right letter, and how many there are, from A
on.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from glm_jax.rewards.answer_format import boxed_answer
from glm_jax.rollouts.task import Reward, Task

MAX_OPTIONS = len(string.ascii_uppercase)
# B, (B) or B). Nothing else beside the letter; marks around the answer and a final full stop are
# gone by then.
_LETTER = re.compile(r"\((?P<inside>[A-Z])\)|(?P<bare>[A-Z])\)?")


def check(tasks: Sequence[Task]) -> None:
    """Raises ValueError naming the first task whose answer is not a letter of its options."""
    for task in tasks:
        answer = task.answer
        if not isinstance(answer, dict) or answer.keys() != {"letter", "options"}:
            raise ValueError(
                f'task {task.id!r}: its answer must be {{"letter": ..., "options": ...}}, not'
                f" {answer!r}"
            )
        if type(answer["options"]) is not int or not 2 <= answer["options"] <= MAX_OPTIONS:
            raise ValueError(
                f"task {task.id!r}: options={answer['options']!r} must be a number from 2 to"
                f" {MAX_OPTIONS}"
            )
        letters = list(string.ascii_uppercase[: answer["options"]])
        if answer["letter"] not in letters:
            raise ValueError(
                f"task {task.id!r}: letter={answer['letter']!r} is not one of {', '.join(letters)}"
            )


def score(tasks: Sequence[Task], messages: Sequence[Mapping]) -> list[Reward]:
    """1 for the right letter in the last box of the content. Parts: `correct`; `answered`, it is
    one of the options' letters.
    """
    return [
        _score(task.answer, message["content"])
        for task, message in zip(tasks, messages, strict=True)
    ]


def _score(answer: Mapping, content: str) -> Reward:
    letter = chosen_letter(content)
    correct = float(letter == answer["letter"])
    return Reward(
        correct,
        {
            "correct": correct,
            "answered": float(letter in set(string.ascii_uppercase[: answer["options"]])),
        },
    )


def chosen_letter(content: str) -> str | None:
    """The one letter in the last box; None where anything else stands there."""
    match = _LETTER.fullmatch(boxed_answer(content) or "")
    return match and (match["inside"] or match["bare"])
