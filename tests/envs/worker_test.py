"""Episodes on a real engine: every status, and multi-turn tokens, masks, log-probabilities and
experts equal to a replay through the training forward.
"""

import asyncio
import dataclasses
import time

import numpy as np
import pytest

from data.tokenizer import Tokenizer
from glm_jax.envs import registry
from glm_jax.envs.environment import Kind, Start, Step
from glm_jax.envs.episode import SamplingSpec
from glm_jax.rollouts.rollout import RolloutStatus
from glm_jax.rollouts.task import Reward, Task
from tests.envs.talking import assert_equal_to_a_replay, talking_model, talking_worker

SPEC = SamplingSpec(
    group_size=3, max_new_tokens=100, temperature=1.0, seed=5, thinking=False, max_turns=4,
    step_seconds=20.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(corpus_folder):
    return Tokenizer.load(corpus_folder / "tokenizer.json")


@pytest.fixture(scope="module")
def model(tokenizer):
    return talking_model(tokenizer)


@pytest.fixture
def worker(model, tokenizer):
    return talking_worker(model, tokenizer)


@dataclasses.dataclass
class Talk:
    """Answers every turn, until `turns` of them; half of its calls wait."""

    turns: int
    fails_in: str = ""
    slow: bool = False
    seen: int = 0

    def reset(self, task, seed):
        if self.fails_in == "reset":
            raise OSError("no such world")
        return Start([{"role": "user", "content": f"{task.answer} {seed % 7}"}])

    async def step(self, message):
        assert message["role"] == "assistant"
        self.seen += 1
        if self.fails_in == "step":
            raise KeyError("lost")
        if self.fails_in == "exit":
            raise SystemExit(3)
        if self.slow:
            time.sleep(2.0)
        await asyncio.sleep(0.001)
        done = self.seen == self.turns
        reward = Reward(0.25, {"turns": 1.0})
        return Step(() if done else [{"role": "user", "content": "go on"}], done, reward)


def tasks(monkeypatch, count: int = 1, **fields) -> list[Task]:
    kind = Kind(lambda: Talk(**fields), lambda tasks: None)
    monkeypatch.setitem(registry.ENVIRONMENTS, "talk", kind)
    prompt = ({"role": "user", "content": "unused"},)
    return [Task(f"t{i}", "g", "talk", prompt, f"hello {i}") for i in range(count)]


def statuses(groups) -> set[RolloutStatus]:
    return {rollout.status for group in groups for rollout in group.rollouts}


def test_turns_equal_a_replay_through_the_training_forward(worker, model, tokenizer, monkeypatch):
    told = []
    groups = worker.rollouts(tasks(monkeypatch, 4, turns=3), SPEC, 0, told.append)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert sum(told) == len(rollouts) == 12
    done = [r for r in rollouts if r.status is RolloutStatus.COMPLETED]
    assert len(done) >= 3
    for rollout in done:
        assert rollout.reward == Reward(0.75, {"turns": 3.0})
        assert np.sum(np.diff(rollout.mask.astype(int)) == 1) == 3  # turns of the model
        text = tokenizer.decode(rollout.tokens.tolist())
        assert text.count("go on/nothink<|assistant|>\n<think></think>") == 2
        assert (rollout.versions[rollout.mask] == 0).all()
        assert (rollout.versions[~rollout.mask] == -1).all()
        assert len(rollout.experts) == len(rollout.tokens) - 1
    assert_equal_to_a_replay(rollouts, model)


def test_an_episode_is_the_same_whatever_runs_beside_it(worker, model, tokenizer, monkeypatch):
    asked = tasks(monkeypatch, 3, turns=2)
    together = worker.rollouts(asked, SPEC, 0)
    alone = worker.rollouts(asked[1:2], SPEC, 1)[0]
    for first, second in zip(together[1].rollouts, alone.rollouts, strict=True):
        np.testing.assert_array_equal(first.tokens, second.tokens)
        assert first.status is second.status


@dataclasses.dataclass
class Held(Talk):
    """Says when it is closed."""

    closed: list = dataclasses.field(default_factory=list)
    fails_to_close: bool = False

    async def close(self):
        self.closed.append(id(self))
        if self.fails_to_close:
            raise OSError("it stays")


@pytest.mark.parametrize(
    "fields",
    [
        {"turns": 1}, {"turns": 99}, {"turns": 2, "fails_in": "reset"},
        {"turns": 2, "fails_in": "step"}, {"turns": 2, "slow": True},
        {"turns": 1, "fails_to_close": True},
    ],
    ids=str,
)  # fmt: skip
def test_every_environment_is_closed_once_however_its_episode_ends(worker, monkeypatch, fields):
    made, closed = [], []

    def make():
        made.append(Held(**fields, closed=closed))
        return made[-1]

    kind = Kind(make, lambda tasks: None)
    monkeypatch.setitem(registry.ENVIRONMENTS, "talk", kind)
    prompt = ({"role": "user", "content": "unused"},)
    spec = dataclasses.replace(SPEC, max_turns=2, step_seconds=0.5)
    worker.rollouts([Task("t", "g", "talk", prompt, "hello")], spec, 0)
    end = time.monotonic() + 10
    while len(closed) < len(made) and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(closed) == sorted(map(id, made)) and len(made) == SPEC.group_size


def test_a_cancelled_groups_environments_are_closed(worker, monkeypatch):
    closed = []
    kind = Kind(lambda: Held(turns=99, closed=closed), lambda tasks: None)
    monkeypatch.setitem(registry.ENVIRONMENTS, "talk", kind)
    worker.begin(0, Task("t", "g", "talk", ({"role": "user", "content": ""},), "hello"), SPEC)
    worker.advance()
    worker.cancel(0)
    end = time.monotonic() + 10
    while len(closed) < SPEC.group_size and time.monotonic() < end:
        time.sleep(0.01)
    assert len(set(closed)) == len(closed) == SPEC.group_size
    assert worker.idle and worker.advance() == []


def test_an_environment_that_goes_on_ends_at_the_last_turn(worker, monkeypatch):
    groups = worker.rollouts(tasks(monkeypatch, 4, turns=99), SPEC, 0)
    assert RolloutStatus.MAX_TURNS in statuses(groups)
    assert RolloutStatus.COMPLETED not in statuses(groups)
    ended = [r for g in groups for r in g.rollouts if r.status is RolloutStatus.MAX_TURNS]
    assert all(r.reward.parts["turns"] == SPEC.max_turns for r in ended)


def test_all_turns_share_the_output_length(worker, monkeypatch):
    spec = dataclasses.replace(SPEC, max_new_tokens=12, max_turns=99)
    groups = worker.rollouts(tasks(monkeypatch, 4, turns=99), spec, 0)
    assert statuses(groups) <= {RolloutStatus.TRUNCATED, RolloutStatus.FORMAT_ERROR}
    truncated = [r for g in groups for r in g.rollouts if r.status is RolloutStatus.TRUNCATED]
    assert truncated and all(r.num_sampled == 12 for r in truncated)


def test_the_context_ends_an_episode_as_truncated(worker, monkeypatch):
    spec = dataclasses.replace(SPEC, max_new_tokens=500, max_turns=99)
    groups = worker.rollouts(tasks(monkeypatch, 4, turns=99), spec, 0)
    assert RolloutStatus.TRUNCATED in statuses(groups)
    assert max(len(r.tokens) for g in groups for r in g.rollouts) <= 192 + 20


FLOOD = [{"role": "user", "content": "x" * 1_000_000}]
ASK = [{"role": "user", "content": "go on"}]


@pytest.mark.parametrize(
    ("where", "bad"),
    [
        ("reset", Start(FLOOD)), ("reset", Start([{"role": "user", "content": "hello " * 100}])),
        ("step", Step(FLOOD, False)), ("step", Step(ASK * 10_000, False)),
        ("step", Step([{"role": "user", "content": b"bytes"}], False)), ("step", Step(None, False)),
        ("step", Step(ASK, False, Reward(float("nan"), {}))),
        ("step", Step((), True, Reward(float("inf"), {}))), ("step", None),
    ],
    ids=["flood", "beyond the context", "flood", "many messages", "bytes", "no list", "nan", "inf",
         "nothing"],
)  # fmt: skip
def test_what_an_environment_must_not_answer_ends_its_episode_without_reward(
    worker, monkeypatch, caplog, where, bad
):
    turns = iter(range(1000))

    class Bad(Talk):
        def reset(self, task, seed):
            return bad if where == "reset" else super().reset(task, seed)

        async def step(self, message):
            first = Step(ASK, False, Reward(0.25, {"turns": 1.0}))
            return bad if next(turns) >= SPEC.group_size else first

    asked = tasks(monkeypatch, 1)
    monkeypatch.setitem(registry.ENVIRONMENTS, "talk", Kind(lambda: Bad(99), lambda tasks: None))
    group = worker.rollouts(asked, SPEC, 0)[0]
    failed = [r for r in group.rollouts if r.status is RolloutStatus.ENVIRONMENT_ERROR]
    assert failed and all(r.reward == Reward(0.0, {}) for r in failed)
    assert "task 't0': its environment failed" in caplog.text and worker.engine.idle


@pytest.mark.parametrize("where", ["reset", "step", "exit"])
def test_a_failing_environment_ends_its_own_episode(worker, monkeypatch, where):
    groups = worker.rollouts(tasks(monkeypatch, 2, turns=2, fails_in=where), SPEC, 0)
    assert RolloutStatus.ENVIRONMENT_ERROR in statuses(groups)
    failed = [r for g in groups for r in g.rollouts if r.status is RolloutStatus.ENVIRONMENT_ERROR]
    assert not any(r.status.is_models for r in failed)
    assert (where == "reset") == all(len(r.tokens) == 0 for r in failed)


def test_a_slow_environment_times_out(worker, monkeypatch):
    spec = dataclasses.replace(SPEC, step_seconds=0.3)
    groups = worker.rollouts(tasks(monkeypatch, 2, turns=2, slow=True), spec, 0)
    assert RolloutStatus.TIMEOUT in statuses(groups) and worker.engine.idle


def test_a_cancelled_request_ends_its_episode_as_aborted(worker, monkeypatch):
    cancelled = []

    def cancel(ended):
        if not cancelled and worker.engine.running:
            cancelled.append(worker.engine.running[0])
            worker.engine.abort(cancelled[0])

    groups = worker.rollouts(tasks(monkeypatch, 2, turns=2), SPEC, 0, cancel)
    aborted = [r for g in groups for r in g.rollouts if r.status is RolloutStatus.ABORTED]
    assert len(aborted) == 1 and not aborted[0].status.is_models


def test_a_task_for_a_verifier_is_an_episode_of_one_turn(worker):
    prompt = ({"role": "user", "content": "A or B?"},)
    task = Task("t", "g", "choice", prompt, {"letter": "A", "options": 2})
    group = worker.rollouts([task], dataclasses.replace(SPEC, group_size=8), 0)[0]
    read = [r for r in group.rollouts if r.status is RolloutStatus.COMPLETED]
    assert read and all("answered" in r.reward.parts or r.reward.parts for r in read)
    assert all(np.sum(np.diff(r.mask.astype(int)) == 1) == 1 for r in group.rollouts)


def test_unknown_environments_are_named(monkeypatch):
    prompt = ({"role": "user", "content": "?"},)
    with pytest.raises(ValueError, match="task 'x': verifier 'nowhere' is not one of puzzle, math"):
        registry.check([Task("x", "g", "nowhere", prompt, 1)])
