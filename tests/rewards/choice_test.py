"""Multiple choice: one letter in the box, exactly."""

import pytest

from glm_jax.rewards import choice
from glm_jax.rollouts.task import Task


def task(answer):
    return Task("q7", "science", "choice", ({"role": "user", "content": "Which?"},), answer)


BOXES = [
    ("B", "B"), (" B ", "B"), ("(B)", "B"), ("B.", "B"), ("B)", "B"), ("\\text{B}", "B"),
    ("\\text{(B)}", "B"), ("\\mathbf{B}", "B"),
    ("A", "A"), ("b", None), ("AB", None), ("A, B", None), ("(B", None), ("B or C", None),
    ("B: iron", None), ("B:", None),
    ("\\text{B", None), ("(B).", "B"), ("**B**", "B"), ("$B$", "B"), ("\\textbf{(B)}.", "B"),
    ("", None), ("2", None), ("Β", None),
]  # fmt: skip


@pytest.mark.parametrize(("box", "letter"), BOXES)
def test_only_one_letter_is_an_answer(box, letter):
    content = f"A looks wrong. \\boxed{{{box}}}"
    assert choice.chosen_letter(content) == letter
    reward = choice.score([task({"letter": "B", "options": 4})], [{"content": content}])[0]
    assert reward.value == reward.parts["correct"] == float(letter == "B")
    assert reward.parts["answered"] == float(letter is not None)


def test_a_letter_beyond_the_options_is_no_answer():
    scores = choice.score(
        [task({"letter": "B", "options": n}) for n in (3, 4)], [{"content": "\\boxed{D}"}] * 2
    )
    assert [s.parts["answered"] for s in scores] == [0, 1]
    assert choice.score([task({"letter": "B", "options": 4})], [{"content": "B"}])[0].value == 0


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("B", "must be"),
        ({"letter": "B"}, "must be"),
        ({"letter": "E", "options": 4}, "letter='E' is not one of A, B, C, D"),
        ({"letter": "b", "options": 4}, "letter='b'"),
        ({"letter": None, "options": 4}, "letter=None"),
        ({"letter": "A", "options": 1}, "options=1 must be a number from 2 to 26"),
        ({"letter": "A", "options": 27}, "options=27"),
        ({"letter": "A", "options": "4"}, "options='4'"),
        ({"letter": "A", "options": True}, "options=True"),
    ],
)
def test_wrong_answers_are_refused(answer, problem):
    choice.check([task({"letter": "D", "options": 4})])
    with pytest.raises(ValueError, match=f"task 'q7': .*{problem}"):
        choice.check([task({"letter": "A", "options": 2}), task(answer)])
