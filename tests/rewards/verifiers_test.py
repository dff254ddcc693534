"""Tasks of several kinds, each judged by its own verifier, in order; puzzles among them."""

import dataclasses

import pytest

from glm_jax import sandbox
from glm_jax.rewards import puzzles, verifiers
from glm_jax.rewards.sources import load_sources
from glm_jax.rollouts.task import Reward, Task

CHOICE = Task(
    "c",
    "science",
    "choice",
    ({"role": "user", "content": "Which?"},),
    {"letter": "B", "options": 4},
)
MATH = Task("m", "algebra", "math", ({"role": "user", "content": "1/2?"},), "\\frac{1}{2}")


def answer(text):
    return {"role": "assistant", "reasoning_content": "", "content": f"\\boxed{{{text}}}"}


@pytest.mark.parametrize("generator", sorted(puzzles.SETTINGS))
def test_puzzles_become_tasks_that_their_verifier_takes(generator):
    tasks = puzzles.tasks(generator, "train", 5)
    verifiers.check(tasks)
    group = next(name for name, generators in puzzles.GROUPS.items() if generator in generators)
    assert {(t.group, t.verifier) for t in tasks} == {(f"{group}/{generator}", "puzzle")}
    assert [t.id for t in tasks] == [f"{generator}/{t.answer['seed']}" for t in tasks]
    right = [puzzles.puzzle_of(**t.answer).answer for t in tasks]
    assert [r.value for r in verifiers.score(tasks, [answer(text) for text in right])] == [1.0] * 5
    for junk in ("", "x", "9" * 5000, "1/0", "\x00"):
        for reward in verifiers.score(tasks, [answer(junk)] * 5):
            assert reward.value == reward.parts["solved"] == 0 <= reward.parts["partial"] < 1
            assert reward.parts["answered"] == float(bool(junk.strip()))


def test_a_part_of_an_answer_is_no_reward():
    task = puzzles.tasks("gcd", "train", 1)[0]
    right = puzzles.puzzle_of(**task.answer).answer
    reward = verifiers.score([task], [answer(f"the answer is {right}")])[0]
    assert reward.value == reward.parts["solved"] == 0 < reward.parts["partial"]
    assert verifiers.score([task], [{"content": right}])[0] == Reward(
        0.0, {"solved": 0.0, "partial": 0.0, "answered": 0.0}
    )


def test_tasks_go_on_where_they_stopped():
    whole = puzzles.tasks("family_relationships", "held_out", 6)
    first = whole[2].answer["seed"] - puzzles.SEEDS["held_out"][0] + 1
    assert puzzles.tasks("family_relationships", "held_out", 3, first) == whole[3:]


def test_a_source_of_puzzles_gives_as_many_as_it_says():
    for count in (1, 3):
        found = load_sources([f"puzzle:gcd:{count}"], "train")
        assert found == puzzles.tasks("gcd", "train", count)
    both = load_sources(["puzzle:gcd:1", "puzzle:lcm:2"], "held_out")
    assert [task.group for task in both] == ["arithmetic/gcd", *["arithmetic/lcm"] * 2]
    for source in ("puzzle:gcd", "puzzle:gcd:0", "puzzle:gcd:-1", "puzzle:gcd:x", "puzzle:gcd:1:2"):
        with pytest.raises(ValueError, match=f"'{source}' must read puzzle:GENERATOR:COUNT"):
            load_sources(["puzzle:lcm:1", source], "train")
    with pytest.raises(ValueError, match="comes twice in puzzle:gcd:1, puzzle:gcd:2"):
        load_sources(["puzzle:gcd:1", "puzzle:gcd:2"], "train")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"generator": "gcd"}, "must be"),
        (5, "must be"),
        ({"generator": "gcds", "seed": 1}, "generator='gcds' is not one of"),
        ({"generator": "gcd", "seed": "1"}, "seed='1' is not a number"),
        ({"generator": "gcd", "seed": True}, "seed=True"),
        ({"generator": "gcd", "seed": -1}, "seed=-1"),
        ({"generator": "gcd", "seed": 2**32}, "seed=4294967296"),
        ({"generator": "gcd", "seed": 12345}, "does not ask the question of gcd, seed 12345"),
    ],
)
def test_answers_that_are_not_their_puzzle_are_refused(answer, problem):
    good = puzzles.tasks("gcd", "train", 1)[0]
    with pytest.raises(ValueError, match=f"task 'bad': .*{problem}"):
        verifiers.check([good, dataclasses.replace(good, id="bad", answer=answer)])


def test_each_task_is_judged_by_its_verifier_in_order():
    puzzle = puzzles.tasks("gcd", "train", 1)[0]
    right = {"choice": "B", "math": "0.5", "puzzle": puzzles.puzzle_of(**puzzle.answer).answer}
    tasks = [MATH, CHOICE, puzzle, CHOICE, MATH]
    verifiers.check(tasks)
    for wrong in range(len(tasks)):
        found = verifiers.score(
            tasks,
            [answer("Z") if i == wrong else answer(right[t.verifier]) for i, t in enumerate(tasks)],
        )
        assert [r.value for r in found] == [float(i != wrong) for i in range(len(tasks))]
    assert verifiers.score([], []) == []  # a step whose outputs are all malformed


def test_errors_name_the_task_and_what_is_valid():
    with pytest.raises(
        ValueError, match="task 'm': verifier 'maths' is not one of puzzle, math, choice, code"
    ):
        verifiers.check([CHOICE, dataclasses.replace(MATH, verifier="maths")])
    with pytest.raises(ValueError, match="task 'm': math-verify cannot use its answer"):
        verifiers.check([CHOICE, dataclasses.replace(MATH, answer="?")])
    with pytest.raises(ValueError, match="2 tasks, but 1 messages"):
        verifiers.score([CHOICE, MATH], [answer("B")])


@pytest.mark.parametrize("name", verifiers.VERIFIERS)
@pytest.mark.parametrize("answer", [5.5, {"letter": 1}, [MATH.answer]])
def test_every_verifier_refuses_answers_of_another_kind_and_names_their_task(
    name, answer, monkeypatch
):
    monkeypatch.setattr(sandbox, "check", lambda: None)  # no code is run
    odd = Task("odd", "g", name, MATH.messages, answer)
    with pytest.raises(ValueError, match="task 'odd': .*answer"):
        verifiers.check([CHOICE, odd])
