"""Asynchronous sampling: every group ends exactly once, none is older than it may be, and a resumed
run begins again what was in flight.
"""

import collections
import dataclasses
import json
import random
import shutil
import threading

import numpy as np
import pytest
from toy import records

from configs import rl_math_tiny
from data.tokenizer import train_tokenizer
from experiments import entry
from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.worker import RolloutWorker
from glm_jax.rl import loop
from glm_jax.rl.config import RolloutConfig
from glm_jax.rl.ledger import Ledger, may_begin
from glm_jax.rl.source import InThread
from glm_jax.rl.stream import StreamCollector
from glm_jax.rollouts.rollout import Group, Rollout, RolloutStatus
from glm_jax.rollouts.task import Reward, Task
from glm_jax.run.recorder import read_metrics
from tests import glossary, toy
from tests.rl.scripted import RIGHT, WRONG, ScriptedEngine

SPEC = SamplingSpec(group_size=2, max_new_tokens=30, temperature=0.8, seed=3, thinking=True)


def task(name) -> Task:
    message = {"role": "user", "content": f"Which, {name}?"}
    return Task(str(name), "letters", "choice", (message,), {"letter": "A", "options": 4})


def rollout(of: Task, version: int, reward: float) -> Rollout:
    tokens = np.arange(4)
    mask = np.array([False, False, True, True])
    versions = np.where(mask, version, -1)
    return Rollout(
        of, tokens, mask, tokens * 0.0, versions, RolloutStatus.COMPLETED, Reward(reward, {})
    )


# --- the ledger ---


def test_a_group_ends_once():
    ledger = Ledger()
    first, second, third = (ledger.begin(task(i), 0) for i in range(3))
    ledger.arrive(first, Group(task(0), []))
    ledger.end(first, "trained")
    ledger.end(second, "cancelled")  # in flight
    for twice in (first, second, 99):
        with pytest.raises(KeyError):
            ledger.end(twice, "trained")
        with pytest.raises(KeyError):
            ledger.arrive(twice, Group(task(0), []))
    ledger.check()
    assert list(ledger.in_flight) == [third]
    assert ledger.ends == {"trained": 1, "cancelled": 1}
    del ledger.in_flight[third]
    with pytest.raises(RuntimeError, match="3 groups were begun; 0 are in flight, 0 wait"):
        ledger.check()


def test_a_ledger_survives_a_checkpoint():
    ledger = Ledger()
    numbers = [ledger.begin(task(i), i) for i in range(5)]
    group = Group(task(1), [rollout(task(1), 1, r) for r in (0.0, 1.0)])
    ledger.arrive(numbers[1], group)
    ledger.arrive(numbers[4], Group(task(4), [rollout(task(4), 2, 1.0)] * 2))
    ledger.end(numbers[0], "cancelled")
    entries, arrays = ledger.get_state()
    restored = Ledger()
    restored.set_state(json.loads(json.dumps(entries)), arrays)
    assert restored.begun == 5 and restored.in_flight == ledger.in_flight
    assert restored.ends == ledger.ends and list(restored.waiting) == [1, 4]
    for one, two in zip(restored.waiting[1].rollouts, group.rollouts, strict=True):
        np.testing.assert_array_equal(one.versions, two.versions)
        assert one.reward == two.reward and one.task == two.task
    assert restored.begin(task(5), 2) == 5  # numbers, and so seeds, go on


@pytest.mark.parametrize(
    ("in_flight", "waiting", "steps_ahead", "more"),
    [(0, 0, 0, 5), (4, 0, 0, 1), (2, 3, 0, 0), (0, 0, 2, 15), (9, 5, 2, 1), (20, 5, 2, 0)],
)
def test_as_many_groups_may_begin_as_the_next_steps_train_on(in_flight, waiting, steps_ahead, more):
    assert may_begin(in_flight, waiting, 5, steps_ahead) == more


# --- a step's groups, from a stream in which anything may happen ---


class Stream:
    """Groups end in any order, a few of them very late; `share` of them have no variance."""

    def __init__(self, seed: int, share: float):
        self.rng, self.share = random.Random(seed), share
        self.version = 0
        self.under_way: dict[int, list] = {}  # number -> task, version, looks until it ends
        self.cancelled: list[tuple[int, Group]] = []  # come all the same
        self.begun = collections.Counter()

    def begin(self, number, of, spec):
        assert number not in self.under_way
        self.begun[number] += 1
        late = 40 if self.rng.random() < 0.05 else self.rng.randrange(3)
        self.under_way[number] = [of, self.version, late]

    def group(self, number) -> Group:
        of, version, _ = self.under_way.pop(number)
        rewards = (0.0, 0.0) if self.rng.random() < self.share else (0.0, 1.0)
        return Group(of, [rollout(of, version, reward) for reward in rewards])

    def cancel(self, number):
        if self.rng.random() < 0.5:
            self.cancelled.append((number, self.group(number)))
        else:
            del self.under_way[number]

    def finished(self, timeout):
        found, self.cancelled = self.cancelled, []
        for number, waits in list(self.under_way.items()):
            if not waits[2]:
                found.append((number, self.group(number)))
            else:
                waits[2] -= 1
        self.rng.shuffle(found)
        return found


def collector(stream, prompts=5, max_waves=99, **changes) -> StreamCollector:
    rollouts = {
        "prompts_per_step": prompts, "group_size": 2, "over_sampling": 1.0,
        "asynchronous": True, "workers": 0, "worker_resources": (), "dynamic_sampling": True,
        "max_waves": max_waves,
        "mask_truncated": False,
    }  # fmt: skip
    grpo = entry.rl_config(rl_math_tiny.get_config())[0].grpo
    return StreamCollector(stream, RolloutConfig(**rollouts), dataclasses.replace(grpo, **changes))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("staleness", "updates"), [(0, 1), (2, 1), (6, 3)])
def test_every_group_is_trained_on_or_ends_by_name_and_none_is_too_old(seed, staleness, updates):
    """check_versions raises inside `collect` for a token that is too old."""
    stream = Stream(seed, share=0.3)
    collect = collector(stream, max_staleness=staleness, updates_per_step=updates)
    names = (task(i) for i in range(10**9))
    trained, oldest = [], 0
    for _ in range(60):
        version = stream.version
        take = lambda count: [next(names) for _ in range(count)]
        step = collect.collect(take, SPEC, version)
        assert len(step.groups) == 5 and all(g.has_variance for g in step.groups)
        trained += [g.task.id for g in step.groups]
        oldest = max(oldest, *(version - r.oldest for g in step.groups for r in g.rollouts))
        open_groups = len(collect.ledger.in_flight) + len(collect.ledger.waiting)
        assert open_groups <= staleness // updates * 5
        stream.version += updates
    assert len(set(trained)) == len(trained) == collect.ledger.ends["trained"] == 300
    assert oldest <= staleness and (oldest > 0) == (staleness > 0)
    ends = collect.ledger.ends
    assert ends["unsolved"] > 30 and (ends["cancelled"] > 0) == (staleness > 0)
    assert set(stream.begun.values()) == {1} and len(stream.begun) == collect.ledger.begun


@pytest.mark.parametrize(("staleness", "updates"), [(1, 1), (4, 1), (6, 3)])
def test_nothing_that_ends_in_its_turn_grows_stale(staleness, updates):
    """As many groups begin as the steps within the bound train on, and not one more."""
    stream = Stream(0, share=0.0)
    stream.rng.random, stream.rng.randrange = lambda: 0.9, lambda _: 0  # nothing is late
    collect = collector(stream, max_staleness=staleness, updates_per_step=updates)
    oldest = []
    for _ in range(20):
        take = lambda count: [task("x")] * count
        step = collect.collect(take, SPEC, stream.version)
        oldest.append(stream.version - min(r.oldest for g in step.groups for r in g.rollouts))
        stream.version += updates
    assert collect.ledger.ends == {"trained": 100}
    assert max(oldest) == staleness // updates * updates


def test_a_step_goes_on_with_what_it_has():
    stream = Stream(0, share=1.0)
    step = collector(stream, max_waves=2).collect(lambda n: [task(i) for i in range(n)], SPEC, 0)
    assert step.groups == [] and len(step.all_groups) >= 10


def test_what_was_in_flight_begins_again_after_a_resume():
    stream = Stream(1, share=0.3)
    names = (task(i) for i in range(10**9))
    take = lambda count: [next(names) for _ in range(count)]
    collect = collector(stream, max_staleness=2)
    for version in range(4):
        stream.version = version
        collect.collect(take, SPEC, version)
    entries, arrays = collect.get_state()
    in_flight = list(collect.ledger.in_flight)
    assert in_flight
    after = Stream(2, share=0.3)
    after.version = 4
    resumed = collector(after, max_staleness=2)
    resumed.set_state(json.loads(json.dumps(entries)), arrays)
    resumed.collect(take, SPEC, 4)
    assert set(in_flight) <= set(after.begun) and set(after.begun.values()) == {1}
    assert min(set(after.begun) - set(in_flight)) == collect.ledger.begun
    resumed.ledger.check()


# --- an engine in a thread ---


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["so it is \\boxed{A} or \\boxed{B}\n"] * 20, 300)


def test_groups_come_as_they_end_and_others_may_be_asked_for_in_between(tokenizer):
    source = InThread(ScriptedEngine(tokenizer, [RIGHT, WRONG] * 50), tokenizer, version=7)
    try:
        for number in range(4):
            source.begin(number, task(number), SPEC)
        held_out = source.rollouts([task("a"), task("b")], SPEC, 1000)
        assert [g.task.id for g in held_out] == ["a", "b"]
        found = {}
        while len(found) < 4:
            found |= dict(source.finished(timeout=5))
        assert {n: g.task.id for n, g in found.items()} == {n: str(n) for n in range(4)}
        assert all(g.has_variance for g in found.values())
        assert {r.oldest for g in found.values() for r in g.rollouts} == {7}
        assert source.finished(timeout=0.01) == []
        assert source.take_seconds()["generate"] > 0
    finally:
        source.close()
    assert not any(thread.name == "rollouts" for thread in threading.enumerate())


def test_what_fails_in_the_thread_is_raised_where_its_groups_are_waited_for(tokenizer):
    source = InThread(ScriptedEngine(tokenizer, [RIGHT] * 2), tokenizer, version=0)
    source.begin(0, task(0), SPEC)
    source.begin(0, task(0), SPEC)
    with pytest.raises(RuntimeError, match="has failed") as failure:
        for _ in range(100):
            source.finished(timeout=1)
    assert isinstance(failure.value.__cause__, ValueError)
    assert "group 0 is under way" in str(failure.value.__cause__)


def test_a_cancelled_group_leaves_nothing_behind(tokenizer):
    engine = ScriptedEngine(tokenizer, [RIGHT, WRONG] * 4)
    rollouts = RolloutWorker(engine, tokenizer)
    rollouts.begin(3, task("gone"), SPEC)
    rollouts.begin(4, task("stays"), SPEC)
    rollouts.cancel(3)
    rollouts.cancel(99)  # has ended long ago
    found = []
    while not rollouts.idle:
        found += rollouts.advance()
    assert [number for number, _ in found] == [4] and engine.idle
    assert [r.finish_reason for r in engine.requests] == ["abort", "abort", "stop", "stop"]


# --- the whole loop ---


@pytest.fixture
def config(rl_config, monkeypatch):
    toy.judge_by_parity(monkeypatch.setattr)
    rl_config.rollout.asynchronous = True
    rl_config.grpo.max_staleness = 2
    return rl_config


def run(config, workdir):
    rl, start = entry.rl_config(config)
    return loop.train(rl, start, workdir, config_json=config.to_json(), progress=False)


def test_a_run_learns_beside_its_sampling_and_resumes(config, tmp_path):
    whole = tmp_path / "run"
    config.loop.update(steps=6, checkpoint_every=2)
    assert run(config, whole) == 6
    found = records(whole)
    assert [r["step"] for r in found] == list(range(6))
    assert all(r["groups_trained"] <= 4 and r["staleness_max"] <= 2 for r in found)
    assert max(r["staleness_max"] for r in found) > 0  # it did run beside the training
    assert found[-1]["version"] == 5
    assert not glossary.unknown(read_metrics(whole), "rl")
    shutil.rmtree(whole / "checkpoints" / "6")
    assert run(config, whole) == 6
    again = records(whole)
    assert [r["step"] for r in again] == list(range(6)) and again[:4] == found[:4]
    assert all(r["staleness_max"] <= 2 for r in again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.over_sampling": 1.5}, r"rollout.over_sampling=1.5: must be 1.0 with"),
        ({"control.temperatures": (1.0, 0.5)}, r"control.temperatures=.*: must be one"),
        ({"grpo.importance_cap": 0.0}, r"grpo.importance_cap=0.0: must be above 0"),
    ],
)
def test_what_does_not_go_with_asynchronous_sampling_is_refused(config, tmp_path, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "run")
