"""What a run reports about its rollouts, number by number."""

import dataclasses

import pytest

from data.tokenizer import train_tokenizer
from glm_jax.rl import measures
from glm_jax.rl.advantages import advantages
from glm_jax.rollouts.rollout import Group, Rollout, RolloutStatus
from glm_jax.rollouts.task import Reward, Task

COMPLETED, TRUNCATED = RolloutStatus.COMPLETED, RolloutStatus.TRUNCATED
BROKEN = RolloutStatus.ENVIRONMENT_ERROR


def rollout(task, status, reward, drawn, versions=(3,), **parts) -> Rollout:
    mask = [False] * 2 + [True] * drawn
    versions = [-1, -1, *versions, *[versions[-1]] * (drawn - len(versions))]
    return Rollout(
        task, list(range(len(mask))), mask, [0.0] * len(mask), versions, status,
        Reward(reward, parts),
    )  # fmt: skip


@pytest.fixture
def groups():
    easy, hard = (Task(name, name, "choice", (), "A") for name in ("easy", "hard"))
    return [
        Group(
            easy,
            [
                rollout(easy, COMPLETED, 1.0, 1, correct=1.0, answered=1.0),
                rollout(easy, TRUNCATED, 0.0, 10),
                rollout(easy, BROKEN, 0.0, 2, (1, 2), correct=0.0),  # says nothing
            ],
        ),
        Group(hard, [rollout(hard, COMPLETED, 0.5, 3, correct=0.5)]),
    ]


def test_of_groups(groups):
    assert measures.of_groups(groups) == pytest.approx(
        {
            "reward": 0.5, "reward/easy": 0.5, "reward/hard": 0.5,
            "reward_part/correct": 0.75, "reward_part/answered": 1.0,
            "rollouts": 4, "length": 4.0, "length_p90": 7.9,  # 3 + 0.7 x 7
            "status/completed": 0.5, "status/truncated": 0.25, "status/environment_error": 0.25,
            "status/format_error": 0.0, "status/aborted": 0.0, "status/max_turns": 0.0,
            "status/timeout": 0.0, "status/too_many_calls": 0.0,
        }
    )  # fmt: skip
    assert measures.of_groups([]) == {}
    broken = [Group(groups[0].task, groups[0].rollouts[2:])]
    assert measures.of_groups(broken)["reward"] == 0.0


def test_a_rollout_without_tokens_is_written_down_and_teaches_nothing(groups):
    tokenizer = type("Tokenizer", (), {"decode": lambda self, ids: str(list(ids))})()
    task, nothing = groups[0].task, ([], [], [], [])
    empty = [Rollout(task, *nothing, COMPLETED, Reward(r, {})) for r in (0.0, 1.0)]
    lines = measures.readable([Group(task, empty)], tokenizer)
    assert [(x["prompt"], x["output"], x["length"]) for x in lines] == [("[]", "[]", 0)] * 2
    assert not Group(task, empty).has_variance
    assert advantages(Group(task, empty), normalize_std=False) == []


def test_staleness_counts_updates_since_the_oldest_token(groups):
    found = measures.staleness(groups, 5)  # of versions 3, 3, 1 and 3
    assert found == {"staleness": 2.5, "staleness_max": 4}
    assert measures.staleness([], 5) == {}


def test_held_out(groups):
    groups[1].rollouts[0].reward = Reward(0.0, {})
    assert measures.held_out(groups) == pytest.approx(
        {
            "held_out": 1 / 3,
            "held_out_truncated": 0.25,
            "held_out_length": 4.0,
            "held_out/easy": 0.5,
            "held_out/hard": 0.0,
        }
    )


def test_scores_of_evaluations_stand_at_the_steps_that_were_done():
    records = [
        {"step": 0, "held_out": 0.1},
        {"step": 1},
        {"step": 3, "held_out_after": 0.4, "held_out_length_after": 9.0},
        {"step": 7, "held_out_after": 0.8},
    ]
    assert measures.held_out_scores(records) == [(0, 0.1), (4, 0.4), (8, 0.8)]


def test_readable_splits_a_rollout_where_the_model_began(groups):
    tokenizer = train_tokenizer(["ab abc abcd\n"] * 9, 300)
    drawn = groups[0].rollouts[2]
    tokens = [*tokenizer.encode("Q"), *tokenizer.encode("?"), *tokenizer.encode("ab")]
    mask = [False, False, *[True] * (len(tokens) - 2)]
    versions = [-1, -1, *range(2, len(tokens))]
    groups[0].rollouts[2] = dataclasses.replace(
        drawn, tokens=tokens, mask=mask, versions=versions, logprobs=[0.0] * len(tokens)
    )
    line = measures.readable(groups, tokenizer)[2]
    assert len(measures.readable(groups, tokenizer)) == 4
    assert line == {
        "task": "easy", "group": "easy", "status": "environment_error", "reward": 0.0,
        "parts": {"correct": 0.0}, "version": 2, "length": len(tokens) - 2,
        "prompt": "Q?", "output": "ab", "answer": "A",
    }  # fmt: skip
