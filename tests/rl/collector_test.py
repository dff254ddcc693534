"""Rollouts of what an engine is made to write: how each ends and what it is worth, by the true
parser and the true verifiers; and which groups a step gets.
"""

import itertools

import numpy as np
import pytest

from data.tokenizer import train_tokenizer
from glm_jax import bubblewrap
from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.worker import RolloutWorker
from glm_jax.rl.config import RolloutConfig
from glm_jax.rl.groups import Collector
from glm_jax.rollouts.rollout import Group, RolloutStatus
from glm_jax.rollouts.task import Task
from tests.rl.scripted import CUT, MALFORMED, RIGHT, TAKEN_BACK, WRONG, ScriptedEngine

ENDS = {
    RIGHT: (RolloutStatus.COMPLETED, 1.0),
    WRONG: (RolloutStatus.COMPLETED, 0.0),
    MALFORMED: (RolloutStatus.FORMAT_ERROR, 0.0),
    CUT: (RolloutStatus.TRUNCATED, 0.0),
    TAKEN_BACK: (RolloutStatus.ABORTED, 0.0),
}
# Of groups of two, by what `counts` calls them.
KINDS = {
    "mixed": (WRONG, RIGHT),
    "solved": (RIGHT, RIGHT),
    "unsolved": (CUT, MALFORMED),
    "failed": (RIGHT, TAKEN_BACK),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["so it is \\boxed{A} or \\boxed{B}\n"] * 20, 300)


def choice(name: str) -> Task:
    message = {"role": "user", "content": f"Which, {name}?"}
    return Task(name, "letters", "choice", (message,), {"letter": "A", "options": 4})


def spec(group_size=2, **changes) -> SamplingSpec:
    given = {"max_new_tokens": 30, "temperature": 0.8, "seed": 3, "thinking": True}
    return SamplingSpec(group_size=group_size, **given | changes)


# --- a rollout ---


def test_every_output_ends_as_the_parser_and_the_verifier_say(tokenizer):
    """Groups come in the order of their tasks, whatever finishes first."""
    outputs = [output for output in ENDS for _ in range(2)]
    outputs = outputs[1:] + outputs[:1]  # a group of two has two kinds
    engine = ScriptedEngine(tokenizer, outputs)
    tasks, seen = [choice(str(i)) for i in range(len(ENDS))], []
    groups = RolloutWorker(engine, tokenizer).rollouts(tasks, spec(), 0, seen.append)
    assert [g.task for g in groups] == tasks and sum(seen) == len(outputs)
    rollouts = [r for g in groups for r in g.rollouts]
    assert [(r.status, r.reward.value) for r in rollouts] == [ENDS[output] for output in outputs]
    assert [r.task for r in rollouts] == [task for task in tasks for _ in range(2)]
    for request, rollout in zip(engine.requests, rollouts, strict=True):
        given, drawn = len(request.prompt), len(request.tokens)
        assert list(rollout.tokens) == request.prompt + request.tokens
        assert list(rollout.mask) == [False] * given + [True] * drawn
        assert list(rollout.logprobs) == [0.0] * given + request.logprobs
        assert list(rollout.versions) == [-1] * given + request.versions
        assert rollout.num_sampled == drawn and rollout.experts is None
        assert rollout.status.is_models == (rollout.status is not RolloutStatus.ABORTED)
    assert rollouts[1].reward.parts == {"correct": 0.0, "answered": 1.0}
    assert not rollouts[-3].reward.parts  # nobody judged what was cut off


def test_what_the_environment_breaks_is_not_the_models_fault(tokenizer, monkeypatch):
    """The true verifier of code, in a sandbox that cannot start. Only what can be read gets there,
    and its neighbours are judged as ever.
    """
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: "/bin/false")
    answer = {"entry_point": "f", "cases": [{"expected": 1}]}
    code = Task("code", "c", "code", ({"role": "user", "content": "f"},), answer)
    outputs = [RIGHT, MALFORMED, RIGHT, CUT, WRONG, RIGHT]
    tasks = [choice("a"), code, choice("b")]
    groups = RolloutWorker(ScriptedEngine(tokenizer, outputs), tokenizer).rollouts(tasks, spec(), 0)
    found = [[r.status.value for r in g.rollouts] for g in groups]
    assert found == [
        ["completed", "format_error"],
        ["environment_error", "truncated"],
        ["completed", "completed"],
    ]
    broken = groups[1].rollouts[0]
    assert broken.reward.parts["environment_error"] == 1.0
    assert groups[1].learnable == groups[1].rollouts[1:]
    assert [r.reward.value for r in groups[2].rollouts] == [0.0, 1.0]


def test_a_spec_decides_how_the_engine_samples(tokenizer):
    """The seed of a rollout comes from the run's, the task's number and its place in the group:
    nobody else's.
    """

    def params(first, count, **changes):
        engine = ScriptedEngine(tokenizer, [RIGHT] * 99)
        tasks = [choice(str(i)) for i in range(count)]
        RolloutWorker(engine, tokenizer).rollouts(tasks, spec(3, **changes), first)
        return [request.params for request in engine.requests]

    asked = params(5, 4)
    assert len({p.seed for p in asked}) == len(asked) == 12
    assert params(7, 2) == asked[6:]  # drawn elsewhere, the same numbers
    assert not {p.seed for p in params(5, 4, seed=4)} & {p.seed for p in asked}
    stops = {tokenizer.special(n) for n in ("<|endoftext|>", "<|user|>", "<|observation|>")}
    for p in asked:
        assert (p.temperature, p.logprob_temperature, p.max_new_tokens) == (0.8, 0.8, 30)
        assert set(p.stop_tokens) == stops


def test_thinking_is_asked_for_or_not(tokenizer):
    for thinking in (True, False):
        engine = ScriptedEngine(tokenizer, [RIGHT] * 2)
        RolloutWorker(engine, tokenizer).rollouts([choice("a")], spec(thinking=thinking), 0)
        prompt = tokenizer.decode(engine.requests[0].prompt)
        assert ("/nothink" in prompt) == (not thinking) and "Which, a?" in prompt


def test_experts_are_those_of_the_trunks_layers(tokenizer):
    """Those of the MTP block, which drafts, come after them."""
    engine = ScriptedEngine(tokenizer, [RIGHT] * 2, num_layers=2)

    def finish(request):
        shape = (len(request.sequence) - 1, 3, 2)
        request.experts = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)

    engine.finish = finish
    (group,) = RolloutWorker(engine, tokenizer).rollouts([choice("a")], spec(), 0)
    for request, rollout in zip(engine.requests, group.rollouts, strict=True):
        np.testing.assert_array_equal(rollout.experts, request.experts[:, :2])


# --- a step's groups ---


class Source:
    """Tasks whose groups come out as told: `kinds` in order, then `mixed` for ever."""

    def __init__(self, tokenizer, *kinds: str, **config):
        self.kinds = itertools.chain(kinds, itertools.repeat("mixed"))
        self.engine = ScriptedEngine(tokenizer, ())
        self.asked: list[int] = []  # tasks at a time
        given = {
            "group_size": 2,
            "over_sampling": 1.0,
            "asynchronous": False,
            "workers": 0,
            "worker_resources": (),
        }
        given |= {"dynamic_sampling": True, "max_waves": 9}
        staleness = config.pop("max_staleness", 0)
        config = RolloutConfig(**given | {"mask_truncated": False} | config)
        self.collector = Collector(RolloutWorker(self.engine, tokenizer), config, staleness)

    def take(self, count: int) -> list[Task]:
        first = sum(self.asked)
        self.asked.append(count)
        kinds = list(itertools.islice(self.kinds, count))
        self.engine.outputs.extend(output for kind in kinds for output in KINDS[kind])
        return [choice(f"{first + i} {kind}") for i, kind in enumerate(kinds)]

    def collect(self, version: int):
        self.engine.version = version
        return self.collector.collect(self.take, spec(), version)


def names(groups: list[Group]) -> list[str]:
    return [g.task.id for g in groups]


def counted(collected) -> dict:
    """What is not zero."""
    return {name: count for name, count in collected.counts.items() if count}


def test_waves_go_on_until_enough_groups_teach(tokenizer):
    """Each asks for what is missing, times over_sampling, rounded up."""
    kinds = ["solved", "unsolved", "mixed", "failed", "mixed"]
    source = Source(tokenizer, *kinds, prompts_per_step=2, over_sampling=1.5)
    step = source.collect(0)
    assert source.asked == [3, 2]
    assert names(step.groups) == ["2 mixed", "4 mixed"]
    assert names(step.all_groups) == [f"{i} {kind}" for i, kind in enumerate(kinds)]
    assert counted(step) == {
        "waves": 2,
        "groups_mixed": 2,
        "groups_solved": 1,
        "groups_unsolved": 1,
        "groups_failed": 1,
    }
    seeds = [request.params.seed for request in source.engine.requests]
    source.collect(1)  # a later wave, and a later step, repeat no draw
    seeds = [request.params.seed for request in source.engine.requests]
    assert len(set(seeds)) == len(seeds) == 2 * (5 + 3)


def test_a_step_without_enough_goes_on_with_what_it_has(tokenizer):
    source = Source(tokenizer, "solved", "mixed", *["solved"] * 9, prompts_per_step=2, max_waves=3)
    step = source.collect(0)
    assert source.asked == [2, 1, 1] and names(step.groups) == ["1 mixed"]
    assert counted(step) == {"waves": 3, "groups_mixed": 1, "groups_solved": 3}


def test_without_dynamic_sampling_every_group_is_taken(tokenizer):
    kinds = ["solved", "failed", "mixed"]
    source = Source(tokenizer, *kinds, prompts_per_step=3, dynamic_sampling=False)
    step = source.collect(0)
    assert source.asked == [3] and names(step.groups) == names(step.all_groups)
    assert counted(step) == {"waves": 1, "groups_mixed": 1, "groups_solved": 1, "groups_failed": 1}


def test_on_policy_what_is_left_over_is_dropped_and_counted(tokenizer):
    source = Source(tokenizer, prompts_per_step=2, over_sampling=2.0)
    step = source.collect(7)
    assert names(step.groups) == ["0 mixed", "1 mixed"] and len(step.all_groups) == 4
    assert counted(step) == {"waves": 1, "groups_mixed": 4, "groups_surplus": 2}
    assert names(source.collect(8).groups) == ["4 mixed", "5 mixed"]


def test_what_is_left_over_waits_and_is_taken_first_while_it_is_young_enough(tokenizer):
    source = Source(tokenizer, prompts_per_step=2, over_sampling=2.5, max_staleness=2)
    first = source.collect(5)  # draws five
    assert counted(first) == {"waves": 1, "groups_mixed": 5, "groups_buffered": 3}
    second = source.collect(6)
    assert names(second.groups) == ["2 mixed", "3 mixed"] and second.all_groups == []
    assert counted(second) == {"groups_from_buffer": 3, "groups_buffered": 1}
    third = source.collect(7)  # as old as may be; one is missing, ceil(1 x 2.5) are drawn
    assert names(third.groups) == ["4 mixed", "5 mixed"] and source.asked == [5, 3]
    assert counted(third) == {
        "groups_from_buffer": 1,
        "waves": 1,
        "groups_mixed": 3,
        "groups_buffered": 2,
    }
    late = source.collect(10)  # those of version 7 are three updates old
    assert names(late.groups) == ["8 mixed", "9 mixed"]
    assert counted(late) == {
        "groups_stale": 2,
        "waves": 1,
        "groups_mixed": 5,
        "groups_buffered": 3,
    }


def test_a_group_is_as_old_as_its_oldest_token(tokenizer):
    source = Source(tokenizer, prompts_per_step=1, over_sampling=2.0, max_staleness=1)

    def finish(request):
        request.versions[-2] = 4  # drawn before the weights of version 5 came

    source.engine.finish = finish
    assert counted(source.collect(5))["groups_buffered"] == 1
    source.engine.finish = lambda request: None
    assert counted(source.collect(6))["groups_stale"] == 1


@pytest.mark.parametrize(("staleness", "drawn", "trained"), [(0, 3, 4), (2, 3, 6), (2, 4, 3)])
def test_tokens_too_old_or_too_new_are_refused(tokenizer, staleness, drawn, trained):
    source = Source(tokenizer, prompts_per_step=1, max_staleness=staleness)
    source.engine.finish = lambda request: request.versions.__setitem__(-1, drawn)
    assert source.collect(drawn).groups
    message = f"version {drawn} to train version {trained}, max_staleness={staleness}"
    with pytest.raises(RuntimeError, match=message):
        source.collect(trained)


def test_a_token_without_a_version_is_refused(tokenizer):
    source = Source(tokenizer, prompts_per_step=1)
    source.engine.finish = lambda request: request.versions.pop()
    with pytest.raises(ValueError):
        source.collect(0)
