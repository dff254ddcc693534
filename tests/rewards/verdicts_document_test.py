"""docs/results/verdicts.md counts the tables of inputs that the tests judge."""

import pathlib
import re

from glm_jax.rewards import puzzles
from tests.data import argument_types_test
from tests.rewards import choice_test, code_verdicts_test, mathematics_test, unwrapping_test

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "results" / "verdicts.md"


def counts() -> dict[str, tuple[int, int]]:
    """By kind: the inputs whose right verdict is right, and those whose right verdict is wrong."""
    letters = [letter == "B" for _, letter in choice_test.BOXES]
    generators, marks = len(puzzles.SETTINGS), len(unwrapping_test.MARKS)
    return {
        "mathematics": (len(mathematics_test.SAME), len(mathematics_test.DIFFERENT)),
        "puzzles": (generators * (marks + 2), generators * len(unwrapping_test.HEDGES)),
        "choice": (
            marks + sum(letters),
            len(unwrapping_test.CHOICE_HEDGES) + len(letters) - sum(letters),
        ),
        "code": tuple(len(code_verdicts_test.inputs(right)) for right in (True, False)),
        "arguments of tool calls": (len(argument_types_test.CASES), 0),
    }


def test_the_document_counts_what_is_judged():
    rows = re.findall(
        r"^\| ([a-z ]+) \| (\d+) \| (\d+) \| 0 \|", DOCUMENT.read_text(), re.MULTILINE
    )
    found = {kind: (int(right), int(wrong)) for kind, right, wrong in rows}
    expected = counts()
    assert found == expected | {"all": tuple(map(sum, zip(*expected.values(), strict=True)))}


def test_no_input_is_counted_twice():
    inputs = [*mathematics_test.SAME, *mathematics_test.DIFFERENT]
    assert len(set(inputs)) == len(inputs)
