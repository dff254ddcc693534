"""Puzzles: the same everywhere, held-out questions never in training, verifiers that know right
from wrong.
"""

import hashlib
import itertools
import math
import os
import re
import subprocess
import sys

import pytest

from glm_jax.rewards import puzzles

GENERATORS = sorted(puzzles.SETTINGS)
JUNK = [
    "",
    " ",
    "x",
    "1/0",
    "-",
    "nan",
    "inf",
    "1e999",
    "9" * 5000,
    "Yes No",
    "\x00",
    "½",
    "٣",
    "(1)",
    "__import__('os')",
    "\\boxed{1}",
]


# of the questions of the first hundred seeds
DIGESTS = {
    "aiw": "48cb8a1f", "basic_arithmetic": "fc9246bc", "chain_sum": "6434746e",
    "color_cube_rotation": "c167cbc7", "count_bits": "4ae82e9a", "course_schedule": "42669ca6",
    "family_relationships": "011be394", "gcd": "98bde150", "knights_knaves": "0e5e2a5c",
    "lcm": "82945ca3", "leg_counting": "df77a1df", "products": "6bc064f3",
    "simple_equations": "3af4dce7", "syllogism": "2c78d3e2",
}  # fmt: skip


def some(generator: str, split: str, count: int, first: int = 0) -> list[puzzles.Puzzle]:
    return list(itertools.islice(puzzles.puzzles(generator, split, first), count))


@pytest.mark.parametrize("generator", GENERATORS)
def test_held_out_questions_are_never_training_questions(generator):
    held_out, train = puzzles.distinct(generator, "held_out", 40), some(generator, "train", 400)
    assert len({p.question for p in held_out}) == 40
    assert not {p.question for p in held_out} & {p.question for p in train}
    assert all(0 <= p.seed < 2**31 for p in train) and all(
        2**31 <= p.seed < 2**32 for p in held_out
    )
    # Without the wall of texts the seeds alone would let small puzzles through: about one question
    # in eight is left out.
    seeds = train[-1].seed + 1
    assert 0.8 < len(train) / seeds < 0.95


@pytest.mark.parametrize("generator", GENERATORS)
def test_verifiers_know_their_answer_and_are_not_fooled_by_junk(generator):
    for puzzle in some(generator, "held_out", 20):
        assert puzzles.score(puzzle, puzzle.answer) == 1
        assert puzzles.score(puzzle, None) == 0
        assert "\n" not in puzzle.answer
        assert max(puzzles.score(puzzle, junk) for junk in JUNK if junk != puzzle.answer) <= 0.5


def test_a_walk_goes_on_where_it_stopped():
    whole = some("products", "train", 20)
    assert some("products", "train", 10, first=whole[9].seed + 1) == whole[10:]
    late = some("products", "held_out", 3)[-1]
    assert some("products", "held_out", 1, first=late.seed - puzzles.SEEDS["held_out"][0]) == [late]


def test_questions_do_not_depend_on_the_process():
    code = (
        "from glm_jax.rewards import puzzles\nprint([p.question for g in puzzles.SETTINGS for p in"
        " puzzles.distinct(g, 'held_out', 5)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # ours is random
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    here = [p.question for g in puzzles.SETTINGS for p in puzzles.distinct(g, "held_out", 5)]
    assert there == f"{here}\n"


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_questions_are_those_that_scores_were_published_for(generator):
    """Where this fails on purpose, scores from before cannot be compared with those from now on."""
    questions = "\n".join(puzzles.puzzle_of(generator, seed).question for seed in range(100))
    assert hashlib.sha256(questions.encode()).hexdigest()[:8] == DIGESTS[generator]


def test_answers_are_right():
    """By arithmetic of our own on the numbers in the question."""
    number = lambda puzzle: list(map(int, re.findall(r"\d+", puzzle.question)))
    for puzzle in some("products", "held_out", 50):
        assert int(puzzle.answer) == math.prod(number(puzzle))
    for puzzle in some("gcd", "held_out", 50):
        assert int(puzzle.answer) == math.gcd(*number(puzzle))
    for puzzle in some("count_bits", "held_out", 50):
        assert int(puzzle.answer) == number(puzzle)[-1].bit_count()


def test_a_generator_gives_all_it_has_and_stops(monkeypatch):
    monkeypatch.setitem(puzzles.SETTINGS, "count_bits", {"max_n": 63})
    puzzles._dataset.cache_clear()
    try:
        assert 1 <= len(puzzles.distinct("count_bits", "held_out", 1000)) < 40
    finally:
        puzzles._dataset.cache_clear()


def test_a_completion_is_answered_on_its_first_line():
    assert puzzles.completion_answer(" 42\nQuestion: 3 + 4") == "42"
    assert (
        puzzles.completion_answer(" Ann is a knight, and Bob is a fool.")
        == "Ann is a knight, and Bob is a fool."
    )
    assert puzzles.completion_answer("\n42") is None
    assert puzzles.completion_answer("") is None


def test_prompts_show_solved_examples_and_end_where_the_answer_begins():
    example, puzzle = some("gcd", "train", 1)[0], some("gcd", "held_out", 1)[0]
    text = puzzles.completion_prompt(puzzle, [example])
    assert (
        text == f"Question: {example.question}\nAnswer: {example.answer}\n\nQuestion:"
        f" {puzzle.question}\nAnswer:"
    )
    assert puzzle.question in puzzles.chat_request(puzzle) and r"\boxed{}" in puzzles.chat_request(
        puzzle
    )


def test_errors_name_what_is_valid(monkeypatch):
    with pytest.raises(ValueError, match="generator='gcds' is not one of .*gcd"):
        some("gcds", "train", 1)
    with pytest.raises(ValueError, match="split='test' is not one of train, held_out"):
        some("gcd", "test", 1)
    monkeypatch.setattr(puzzles.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="reasoning-gym: pip install -r requirements.txt"):
        puzzles._dataset.__wrapped__("gcd")
