"""Rollouts are arrays, and go through a checkpoint unchanged."""

import numpy as np
import pytest

from glm_jax.rollouts.rollout import Group, Rollout, RolloutStatus, pack_groups, unpack_groups
from glm_jax.rollouts.task import Reward, Task
from glm_jax.run.checkpoints import Checkpoints


def rollout(task, length, status=RolloutStatus.COMPLETED, experts=False):
    rng = np.random.default_rng(length)
    mask = np.arange(length) >= 2
    return Rollout(
        task, rng.integers(0, 99, length).tolist(), mask.tolist(), rng.normal(size=length).tolist(),
        np.where(mask, length, -1).tolist(), status, Reward(1 / length, {"part": 0.5}),
        rng.integers(0, 160, (length - 1, 5, 3)).astype(np.int16) if experts else None,
    )  # fmt: skip


def groups() -> list[Group]:
    tasks = [
        Task(str(i), "g", "math", ({"role": "user", "content": "?"},), {"a": i}) for i in range(3)
    ]
    return [
        Group(tasks[0], [rollout(tasks[0], 7, experts=True), rollout(tasks[0], 3)]),
        Group(tasks[1], []),
        Group(tasks[2], [rollout(tasks[2], 11, RolloutStatus.MAX_TURNS, experts=True)]),
    ]


@pytest.mark.parametrize("kept", [slice(0), slice(1), slice(None)])
def test_groups_come_back_from_a_checkpoint(tmp_path, kept):
    saved = groups()[kept]
    checkpoints = Checkpoints(tmp_path, keep=1)
    entries, arrays = pack_groups(saved)
    checkpoints.save(4, {"x": np.zeros(2)}, {"buffer": entries}, arrays)
    checkpoints.wait()
    _, progress, arrays = checkpoints.restore(4, {"x": np.zeros(2)})
    assert progress.keys() == {"buffer"}
    found = unpack_groups(progress["buffer"], arrays)
    checkpoints.close()
    assert [g.task for g in found] == [g.task for g in saved]
    for ours, theirs in zip(found, saved, strict=True):
        for a, b in zip(ours.rollouts, theirs.rollouts, strict=True):
            assert (a.status, a.reward, a.task) == (b.status, b.reward, b.task)
            for name in ("tokens", "mask", "logprobs", "versions"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
                assert getattr(a, name).dtype == getattr(b, name).dtype
            assert (a.experts is None) == (b.experts is None)
            assert a.experts is None or np.array_equal(a.experts, b.experts)


def test_what_lies_along_the_tokens_has_their_length():
    task = groups()[0].task
    with pytest.raises(ValueError, match=r"rollout of task '0': versions has the shape \(2,\)"):
        Rollout(
            task, [1, 2, 3], [False, True, True], [0.0] * 3, [0, 0], RolloutStatus.COMPLETED,
            Reward(0.0, {}),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "turns"),
    [([0, 1, 1, 0, 1], 2), ([1, 0, 1], 2), ([1, 1], 1), ([0, 1], 1), ([0, 0], 0), ([], 0)],
)
def test_a_turn_is_a_stretch_of_sampled_tokens(mask, turns):
    n = len(mask)
    found = Rollout(
        groups()[0].task, [1] * n, mask, [0.0] * n, [0] * n, RolloutStatus.COMPLETED, Reward(0, {})
    )
    assert found.num_turns == turns


def test_counts_are_those_of_sampled_tokens():
    found = rollout(groups()[0].task, 7)
    assert found.num_sampled == 5 and found.oldest == 7
    nothing = rollout(groups()[0].task, 2)
    assert nothing.num_sampled == 0 and nothing.oldest == np.iinfo(np.int32).max
