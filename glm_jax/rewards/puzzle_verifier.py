"""Verifier `puzzle`: reasoning-gym's own judgement of the boxed answer. `puzzles.tasks` makes the
tasks.

A task's answer is {"generator": name, "seed": int}, which is the whole puzzle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.chat_messages import visible_text
from glm_jax.rewards import puzzles
from glm_jax.rewards.answer_format import boxed_answer
from glm_jax.rollouts.task import Reward, Task

LAST_SEED = max(end for _, end in puzzles.SEEDS.values()) - 1


def check(tasks: Sequence[Task]) -> None:
    """Raises ValueError naming the first task that is no puzzle, or asks another question than the
    puzzle of its seed.
    """
    for task in tasks:
        answer = task.answer
        if (
            not isinstance(answer, dict)
            or answer.keys() != {"generator", "seed"}
            or not isinstance(answer["generator"], str)
        ):
            raise ValueError(
                f'task {task.id!r}: its answer must be {{"generator": ..., "seed": ...}}, not'
                f" {answer!r}"
            )
        if type(answer["seed"]) is not int or not 0 <= answer["seed"] <= LAST_SEED:
            raise ValueError(
                f"task {task.id!r}: seed={answer['seed']!r} is not a number from 0 to {LAST_SEED}"
            )
        try:
            puzzle = puzzles.puzzle_of(**answer)
        except ValueError as error:
            raise ValueError(f"task {task.id!r}: {error}") from None
        if puzzle.question not in visible_text(task.messages[-1], "messages[-1]"):
            raise ValueError(
                f"task {task.id!r}: does not ask the question of {answer['generator']}, seed"
                f" {answer['seed']}"
            )


def score(tasks: Sequence[Task], messages: Sequence[Mapping]) -> list[Reward]:
    """1 for the right answer in the last box of the content. Parts: `solved`; `partial`, what the
    generator's verifier gives, which may be more than nothing for a wrong answer; `answered`, there
    is a box.
    """
    return [
        _score(puzzles.puzzle_of(**task.answer), message["content"])
        for task, message in zip(tasks, messages, strict=True)
    ]


def _score(puzzle: puzzles.Puzzle, content: str) -> Reward:
    answer = boxed_answer(content)
    partial = puzzles.score(puzzle, answer)
    solved = float(partial == 1)
    return Reward(
        solved, {"solved": solved, "partial": partial, "answered": float(answer is not None)}
    )
