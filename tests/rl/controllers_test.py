"""What steers a run: difficulty, temperature, output length, and the order of tasks."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from glm_jax.rewards.sources import TaskOrder, with_wrong_answers
from glm_jax.rl.curriculum import Curriculum, Difficulty, pass_at_k, read_difficulties, split_pools
from glm_jax.rl.output_length import output_length
from glm_jax.rl.temperature import TemperatureControl, choose_temperature, has_plateaued
from glm_jax.rollouts.task import Task


def tasks(count, group="g"):
    return [
        Task(f"{group}{i}", group, "math", ({"role": "user", "content": str(i)},), i)
        for i in range(count)
    ]


# --- difficulty ---


def test_pass_at_k_is_the_share_of_draws_with_a_success():
    for solved, tried, k in itertools.product(range(7), [6], range(1, 7)):
        draws = list(itertools.combinations([True] * solved + [False] * (tried - solved), k))
        assert math.isclose(pass_at_k(solved, tried, k), sum(map(any, draws)) / len(draws))


def test_pools_by_difficulty():
    known = [
        Difficulty(8, 8),
        Difficulty(4, 8),
        Difficulty(1, 8),
        Difficulty(3, 512),
        Difficulty(0, 512),
        Difficulty(64, 512),
    ]
    pools = split_pools(tasks(6), {f"g{i}": d for i, d in enumerate(known)}, few=8, many=512)
    assert pools == {"moderate": [1, 2, 5], "hard": [3]}
    with pytest.raises(ValueError, match="lacks task 'g6'"):
        split_pools(tasks(7), {f"g{i}": d for i, d in enumerate(known)}, few=8, many=512)


def test_two_stages_turn_to_the_hard_pool_when_the_reward_stops_rising():
    curriculum = Curriculum("two_stage", 5, {"moderate": [0, 1], "hard": [2]}, window=2, gain=0.04)
    seen = []
    for reward in (0.1, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5):
        curriculum.observe(reward)
        seen.append(curriculum.pool)
    # means of two: .15 -> .45, .3 -> .5, .45 -> .5, .5 -> .5
    assert seen == ["moderate"] * 6 + ["hard"] * 2
    other = Curriculum("two_stage", 5, {"moderate": [0, 1], "hard": [2]}, window=2, gain=0.05)
    other.set_state(json.loads(json.dumps(curriculum.get_state())))
    assert other.pool == "hard"
    only = Curriculum("moderate", 5, {"moderate": [0, 1], "hard": []}, window=2, gain=0.05)
    for _ in range(9):
        only.observe(0.5)
    assert only.pool == "moderate"
    assert Curriculum("none", 5, None, window=2, gain=0.05).pools["all"] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no task is hard"):
        Curriculum("two_stage", 5, {"moderate": [0], "hard": []}, window=2, gain=0.05)


def test_a_difficulty_file_names_its_bad_line(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"id": "a", "solved": 1, "tried": 8}\n')
    assert read_difficulties(file) == {"a": Difficulty(1, 8)}
    for line, problem in (
        ("{", "is no difficulty"),
        ('{"id": "b"}', "solved"),
        ("[1]", "is no difficulty"),
        ('{"id": "b", "solved": null, "tried": 8}', "is no difficulty"),
        ('{"id": "b", "solved": 9, "tried": 8}', "solved=9 of tried=8"),
    ):
        file.write_text('{"id": "a", "solved": 1, "tried": 8}\n' + line + "\n")
        with pytest.raises(ValueError, match=f"jsonl:2: .*{problem}"):
            read_difficulties(file)
    with pytest.raises(ValueError, match=r"experiments\.difficulty writes one"):
        read_difficulties(tmp_path / "none")


def test_a_task_tried_once_has_a_difficulty(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"id": "a", "solved": 1, "tried": 1}\n{"id": "b", "solved": 0, "tried": 1}\n')
    assert read_difficulties(file) == {"a": Difficulty(1, 1), "b": Difficulty(0, 1)}
    file.write_text('{"id": "a", "solved": 0, "tried": 0}\n')
    with pytest.raises(ValueError, match="solved=0 of tried=0"):
        read_difficulties(file)


def test_a_curriculum_remembers_two_windows_and_begins_anew_with_the_hard_pool():
    curriculum = Curriculum("two_stage", 2, {"moderate": [0], "hard": [1]}, window=2, gain=0.05)
    for reward in range(7):
        curriculum.observe(float(reward))
        assert curriculum.get_state()["rewards"] == [*map(float, range(reward + 1))][-4:]
    for reward in (5.5, 5.5):  # after 5 and 6
        curriculum.observe(reward)
    assert curriculum.get_state() == {"pool": "hard", "rewards": []}


# --- temperature ---


def test_a_plateau_is_a_mean_that_hardly_rises():
    assert not has_plateaued([0.5] * 5, window=3, gain=0.01)  # too few to tell
    assert has_plateaued([0.5] * 6, window=3, gain=0.01)
    assert not has_plateaued([0.1, 0.1, 0.1, 0.2, 0.2, 0.2], window=3, gain=0.01)
    assert has_plateaued([0.9, 0.9, 0.9, 0.2, 0.2, 0.2], window=3, gain=0.01)  # a fall is no rise


@pytest.mark.parametrize("window", [1, 2, 5])
def test_gain_is_of_the_mean_over_the_last_two_windows_alone(window):
    for rise, expected in ((0.009, True), (0.011, False)):
        history = [9.0, 0.0, 9.0]  # what lies before them does not count
        rewards = [*history, *[0.5] * window, *[0.5 + rise] * window]
        assert has_plateaued(rewards, window, gain=0.01) is expected
        assert has_plateaued([*history, *rewards[3:][::-1]], window, gain=0.01)  # a fall


def test_the_highest_temperature_within_one_percent_of_the_best():
    assert choose_temperature({0.6: 0.790, 0.8: 0.800, 1.0: 0.793, 1.2: 0.791}, 0.01) == 1.0
    # exactly 1% counts
    assert choose_temperature({0.6: 0.790, 0.8: 0.800, 1.0: 0.793, 1.2: 0.792}, 0.01) == 1.2
    assert choose_temperature({0.6: 0.0, 0.8: 0.0}, 0.01) == 0.8


def test_a_fixed_temperature_is_never_swept_and_a_controlled_one_after_each_plateau():
    fixed = TemperatureControl((0.7,), 0.01, window=1, gain=0.01)
    assert not any(fixed.observe(0.5) for _ in range(5))
    control = TemperatureControl((0.7, 1.0), 0.01, window=2, gain=0.01)
    assert [control.observe(r) for r in (0.5, 0.5, 0.5, 0.5)] == [False, False, False, True]
    control.choose({0.7: 0.5, 1.0: 0.5})
    assert control.temperature == 1.0
    assert not control.observe(0.5)  # the next plateau is measured anew
    other = TemperatureControl((0.7, 1.0), 0.01, window=2, gain=0.01)
    other.set_state(json.loads(json.dumps(control.get_state())))
    assert (other.temperature, other.rewards) == (1.0, [0.5])


def test_a_controller_remembers_two_windows():
    control = TemperatureControl((0.7, 1.0), 0.01, window=2, gain=0.01)
    for reward in range(7):
        assert not control.observe(float(reward))
        assert control.get_state()["rewards"] == [*map(float, range(reward + 1))][-4:]
    assert [control.observe(5.5) for _ in range(2)] == [False, True]  # 5.5 after 5.5


# --- output length ---


def test_output_length_follows_its_stages():
    assert [output_length(((0, 16), (3, 64)), step) for step in range(5)] == [16, 16, 16, 64, 64]
    assert output_length(((0, 64),), 1000) == 64


# --- order ---


def test_every_epoch_asks_every_task_once_in_another_order():
    order = TaskOrder(tasks(7), seed=3)
    asked = [t.id for count in (3, 5, 1, 5, 7) for t in order.take(count, "all", range(7))]
    epochs = [asked[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == [f"g{i}" for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {t.id for t in order.take(6, "hard", [2, 4])} == {"g2", "g4"}
    assert order.get_state() == {"all": 21, "hard": 6}


def test_an_order_goes_on_where_its_state_was_taken():
    order, resumed = TaskOrder(tasks(7), seed=3), TaskOrder(tasks(7), seed=3)
    order.take(9, "all", range(7))
    state = order.get_state()
    asked = order.take(5, "all", range(7))
    resumed.set_state(state)  # which what was taken since has not moved
    assert resumed.take(5, "all", range(7)) == asked


def test_wrong_answers_are_other_tasks_answers():
    clean = [*tasks(20, "a"), *tasks(20, "b")]
    noisy = with_wrong_answers(clean, 0.5, seed=0)
    wrong = [i for i in range(40) if noisy[i].answer != clean[i].answer]
    assert len(wrong) == 20 and sum(i < 20 for i in wrong) == 10
    assert [t.messages for t in noisy] == [t.messages for t in clean]
    assert with_wrong_answers(clean, 0.0, seed=0) == clean
    assert [t.answer for t in with_wrong_answers(clean, 0.5, seed=0)] == [t.answer for t in noisy]
    assert np.all([noisy[i].answer in range(20) for i in wrong])
    kinds = [
        dataclasses.replace(t, verifier="choice", answer="A") if i % 2 else t
        for i, t in enumerate(clean)
    ]
    assert all(
        (t.answer == "A") == (t.verifier == "choice")
        for t in with_wrong_answers(kinds, 1.0, seed=0)
    )
