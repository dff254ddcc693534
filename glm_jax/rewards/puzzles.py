"""Procedural puzzles of reasoning-gym with its own verifiers: the same questions and scores for
evaluation and for RL.

Two walls stand between what is trained on and what is measured. Seeds below 2**31 are for training,
those from there on are held out. And because small puzzles repeat (two seeds may ask for 7 * 8),
every question belongs to one split by the hash of its text, and a split leaves out what its seeds
give of the other: no held-out question is ever met in training, however many seeds are sampled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence

from glm_jax.rollouts.task import Task

SEEDS = {"train": (0, 2**31), "held_out": (2**31, 2**32)}  # the first, and the one after the last
HELD_OUT_ONE_IN = 8  # questions, by the hash of their text
MAX_REPEATS = 2_000  # seeds without a new question, after which a generator counts as exhausted

# Group -> generator -> its settings: sizes that a small model can learn, answers of one line,
# verifiers that junk does not fool.
GROUPS: dict[str, dict[str, dict]] = {
    "arithmetic": {
        "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        "gcd": {"max_value": 100},
        "lcm": {"max_value": 50},
        "count_bits": {"max_n": 4095},
        "leg_counting": {"min_animals": 1, "max_animals": 3, "max_instances": 5},
        "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 20},
    },
    "logic": {
        "syllogism": {},
        "knights_knaves": {"n_people": 2, "depth_constraint": 2, "width_constraint": 2},
        "aiw": {"max_entities": 9, "task_type_weights": (0.5, 0.5, 0.0)},
        "family_relationships": {"min_family_size": 3, "max_family_size": 5},
        "color_cube_rotation": {"min_rotations": 1, "max_rotations": 1},
        "course_schedule": {"min_num_courses": 3, "max_num_courses": 4},
    },
}
SETTINGS = {
    generator: settings for group in GROUPS.values() for generator, settings in group.items()
}
_STATEMENTS = re.compile(r"\w+ is an? \w+(?:(?:, and|,| and) \w+ is an? \w+)*\.?", re.IGNORECASE)
_IS = re.compile(r" is an? ", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """A question with one right answer. `entry` is what the generator's verifier wants to see
    again.
    """

    generator: str
    seed: int
    question: str
    answer: str
    entry: dict


def puzzles(generator: str, split: str, first: int = 0) -> Iterator[Puzzle]:
    """The generator's puzzles of a split ('train' or 'held_out') in the order of their seeds, from
    the split's seed number `first` on.

    The same wherever and whenever it is called; to go on after a puzzle, first = puzzle.seed -
    SEEDS[split][0] + 1. Questions may come again. Raises ValueError for an unknown generator or
    split, or where reasoning-gym is not installed.
    """
    if split not in SEEDS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SEEDS)}")
    start, end = SEEDS[split]
    for seed in range(start + first, end):
        puzzle = puzzle_of(generator, seed)
        if split_of(puzzle.question) == split:
            yield puzzle


def puzzle_of(generator: str, seed: int) -> Puzzle:
    """The generator's puzzle of a seed, whichever split its question belongs to. Errors as for
    `puzzles`.
    """
    entry = _dataset(generator)[seed]
    return Puzzle(generator, seed, entry["question"].strip(), entry["answer"], entry)


def task_of(puzzle: Puzzle) -> Task:
    """The puzzle as a task of verifier `puzzle`, asked as a chat."""
    generator = puzzle.generator
    group = next((name for name, generators in GROUPS.items() if generator in generators), "")
    return Task(
        id=f"{generator}/{puzzle.seed}", group=f"{group}/{generator}", verifier="puzzle",
        messages=({"role": "user", "content": chat_request(puzzle)},),
        answer={"generator": generator, "seed": puzzle.seed},
    )  # fmt: skip


def tasks(generator: str, split: str, count: int, first: int = 0) -> list[Task]:
    """`distinct(generator, split, count, first)` as tasks. Errors as there."""
    return [task_of(puzzle) for puzzle in distinct(generator, split, count, first)]


def distinct(generator: str, split: str, count: int, first: int = 0) -> list[Puzzle]:
    """The first `count` different ones of `puzzles(generator, split, first)`; all there are where a
    generator has fewer.
    """
    found: dict[str, Puzzle] = {}
    newest = SEEDS[split][0] + first if split in SEEDS else 0
    for puzzle in puzzles(generator, split, first):
        if len(found) == count or puzzle.seed - newest > MAX_REPEATS * HELD_OUT_ONE_IN:
            break
        if puzzle.question not in found:
            found[puzzle.question], newest = puzzle, puzzle.seed
    return list(found.values())


def split_of(question: str) -> str:
    """The split that a question belongs to, by its text alone."""
    digest = hashlib.sha256(question.strip().encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def score(puzzle: Puzzle, answer: str | None) -> float:
    """0 to 1 by the generator's own verifier, 1 for the right answer; 0 where no answer was
    extracted.

    Letter case and a final full stop decide nothing where the answer is in words. Verifiers may
    give a part for an answer that holds the right one, and some 0.01 for any answer at all.
    """
    if answer is None:
        return 0.0
    if answer.rstrip(".").casefold() == puzzle.answer.rstrip(
        "."
    ).casefold() and not answer.endswith(".."):
        answer = puzzle.answer
    if puzzle.generator == "knights_knaves" and not _is_statements(answer, puzzle.answer):
        return 0.0
    return float(_dataset(puzzle.generator).score_answer(answer, puzzle.entry))


def _is_statements(answer: str, right: str) -> bool:
    """One statement a person and nothing else: the generator's verifier passes over other words."""
    return bool(_STATEMENTS.fullmatch(answer)) and len(_IS.findall(answer)) == len(
        _IS.findall(right)
    )


def completion_prompt(puzzle: Puzzle, examples: Sequence[Puzzle] = ()) -> str:
    """Text for a base model to continue, `examples` solved in front of it."""
    solved = "".join(
        f"Question: {example.question}\nAnswer: {example.answer}\n\n" for example in examples
    )
    return f"{solved}Question: {puzzle.question}\nAnswer:"


def completion_answer(text: str) -> str | None:
    """The answer in a base model's continuation: its first line; None where that is empty."""
    return text.partition("\n")[0].strip() or None


def chat_request(puzzle: Puzzle) -> str:
    """What the user says to a chat model."""
    return f"{puzzle.question}\n\nPut the final answer into \\boxed{{}}."


@functools.cache
def _dataset(generator: str):
    """The generator, as a sequence whose item i is made from seed i alone."""
    if generator not in SETTINGS:
        raise ValueError(f"generator={generator!r} is not one of {', '.join(SETTINGS)}")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("puzzles need reasoning-gym: pip install -r requirements.txt")
    import reasoning_gym

    return reasoning_gym.create_dataset(generator, seed=0, size=2**32, **SETTINGS[generator])
