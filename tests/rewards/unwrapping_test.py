"""Marks around a whole answer say nothing, for every verifier alike; an answer that names several
is none.
"""

import pytest

from glm_jax.rewards import choice, puzzle_verifier, puzzles
from glm_jax.rollouts.task import Task

MARKS = (
    "%s", "\\text{%s}", "\\mathrm{%s}", "\\textbf{%s}", "\\mathbf{%s}", "$%s$", "\\(%s\\)",
    "**%s**", "*%s*", "`%s`", " %s ",
    "$\\text{%s}$", "**\\text{ %s }**.", "%s.", "\\text{%s.}",
)  # fmt: skip
# {0}: the right answer, {1}: another.
HEDGES = (
    "{0} or {1}", "{1} or {0}", "{0}/{1}", "{0}, {1}", "{0}; {1}", "{0} {1}", "{0} and {1}",
    "not {0}", "{0}. {1}", "{0}? {1}!",
    "\\text{{{0}}} or \\text{{{1}}}", "\\text{{{0}}}\\text{{{1}}}", "**{0}** or **{1}**",
    "**{0}** **{1}**", "${0}$ or ${1}$",
    "either {0} or {1}", "{0} ({1})", "[{0}, {1}]", "{{{0}, {1}}}", "{0}|{1}", "{1}",
)  # fmt: skip
CHOICE_HEDGES = (
    *(hedge.format("B", "C") for hedge in HEDGES),
    "A, B, C, D",
    "ABCD",
    "(A)(B)",
    "B: iron",
    "not B",
    "b",
)
OTHERS = {"True": "False", "False": "True", "Yes": "No", "No": "Yes"}


@pytest.mark.parametrize("generator", sorted(puzzles.SETTINGS))
def test_a_puzzle_takes_marks_and_letter_case_and_no_hedge(generator):
    task = puzzles.tasks(generator, "train", 1)[0]
    right = puzzles.puzzle_of(**task.answer).answer
    other = OTHERS.get(right, "7 3" if right.strip("-").isdigit() else "nobody")
    score = lambda box: (
        puzzle_verifier.score([task], [{"content": f"So \\boxed{{{box}}}"}])[0].value
    )
    right_forms = [
        *(mark.replace("%s", right.rstrip(".")) for mark in MARKS),
        right.lower(),
        right.upper(),
    ]
    assert [score(box) for box in right_forms] == [1.0] * len(right_forms), right_forms
    hedges = [hedge.format(right, other) for hedge in HEDGES]
    assert {box: score(box) for box in hedges} == dict.fromkeys(hedges, 0.0)


def test_a_choice_takes_marks_and_no_hedge():
    task = Task(
        "q",
        "science",
        "choice",
        ({"role": "user", "content": "Which?"},),
        {"letter": "B", "options": 4},
    )
    score = lambda box: choice.score([task], [{"content": f"So \\boxed{{{box}}}"}])[0].value
    assert [score(mark.replace("%s", "B")) for mark in MARKS] == [1.0] * len(MARKS)
    for hedge in CHOICE_HEDGES:
        assert score(hedge) == 0, hedge
