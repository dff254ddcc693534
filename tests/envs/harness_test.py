"""Agents that others wrote, on a real engine through the address of their session: what is recorded
equals a replay through the training forward, whatever they do to their history.
"""

import dataclasses
import re
import subprocess
import sys
import threading
import time

import numpy as np
import openai
import pytest

from data.tokenizer import Tokenizer
from glm_jax.envs import registry
from glm_jax.envs.environment import Kind
from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.worker import RolloutWorker
from glm_jax.rl.advantages import advantages
from glm_jax.rollouts.rollout import Group, RolloutStatus, pack_groups, unpack_groups
from glm_jax.rollouts.task import Reward, Task
from tests.envs.doubler import double
from tests.envs.talking import assert_equal_to_a_replay, talking_model, talking_worker
from tests.rl.scripted import ScriptedEngine

SPEC = SamplingSpec(
    group_size=2, max_new_tokens=120, temperature=1.0, seed=5, thinking=False, max_turns=4,
    step_seconds=20.0,
)  # fmt: skip
QUESTION = {"role": "user", "content": "hello"}
GO_ON = {"role": "user", "content": "go on"}


@pytest.fixture(scope="module")
def tokenizer(corpus_folder):
    return Tokenizer.load(corpus_folder / "tokenizer.json")


@pytest.fixture(scope="module")
def model(tokenizer):
    return talking_model(tokenizer)


@pytest.fixture(scope="module")
def worker(model, tokenizer):
    return talking_worker(model, tokenizer)


def chat(address: str, messages, **options):
    """A call by the public client."""
    with openai.OpenAI(base_url=address, api_key="any", max_retries=0) as client:
        answer = client.chat.completions.create(model="any", messages=messages, **options)
        return list(answer) if options.get("stream") else answer


def said(answer) -> dict:
    return answer.choices[0].message.model_dump(exclude_none=True)


@dataclasses.dataclass
class Agent:
    """Runs a function of (address, task)."""

    play: object

    def run(self, task, address, seed):
        self.play(address, task)
        return Reward(0.5, {"played": 1.0})


def episodes(worker, monkeypatch, play, spec=SPEC) -> list:
    kind = Kind(lambda: Agent(play), lambda tasks: None)
    monkeypatch.setitem(registry.ENVIRONMENTS, "agent", kind)
    task = Task("t", "g", "agent", (QUESTION,), "hello")
    [group] = worker.rollouts([task], spec, 0)
    assert worker.idle and worker.engine.idle
    return group.rollouts


def goes_on(address, task):
    messages = list(task.messages)
    for _ in range(3):
        messages += [said(chat(address, messages)), GO_ON]


def streams(address, task):
    messages = list(task.messages)
    for _ in range(3):
        text = ""
        for chunk in chat(address, messages, stream=True):
            text += chunk.choices[0].delta.content or ""
        messages += [{"role": "assistant", "content": text}, GO_ON]


def forgets(address, task):
    """Drops all but the last message."""
    for number in range(3):
        chat(address, [{"role": "user", "content": f"{task.answer} {number}"}])


def edits(address, task):
    """Changes what the model has written first, and goes on from there."""
    messages = [*task.messages, said(chat(address, task.messages)), GO_ON]
    chat(address, messages)
    messages[1] = {"role": "assistant", "content": "something else"}
    chat(address, messages)


def asks_twice(address, task):
    """Takes the second of two answers, and both go on."""
    first, second = (said(chat(address, task.messages)) for _ in range(2))
    for answer in (first, second):
        chat(address, [*task.messages, answer, GO_ON])


def asks_at_once(address, task):
    threads = [
        threading.Thread(target=chat, args=(address, [{"role": "user", "content": str(number)}]))
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("play", "paths", "turns"),
    [
        (goes_on, 1, 3), (streams, 1, 3), (forgets, 3, 3), (edits, 2, 3), (asks_twice, 2, 4),
        (asks_at_once, 3, 3),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_what_is_recorded_equals_a_replay(
    worker, model, tokenizer, monkeypatch, play, paths, turns
):
    rollouts = episodes(worker, monkeypatch, play)
    completed = [r for r in rollouts if r.status is RolloutStatus.COMPLETED]
    assert completed and all(r.reward == Reward(0.5, {"played": 1.0}) for r in completed)
    for number in {r.episode for r in completed}:
        own = [r for r in completed if r.episode == number]
        if number is not None:
            assert len(own) == paths
        assert sum(r.num_turns for r in own) == (turns * len(own) if number is None else turns)
    assert {r.episode is None for r in completed} == {paths == 1}
    for rollout in rollouts:
        assert (rollout.versions[rollout.mask] == worker.engine.version).all()
    assert_equal_to_a_replay(rollouts, model)


def test_a_kept_history_is_never_tokenized_again(worker, tokenizer, monkeypatch):
    shown = []

    def play(address, task):
        messages = list(task.messages)
        for _ in range(3):
            messages += [said(chat(address, messages)), GO_ON]
        shown.append([m["content"] for m in messages if m["role"] == "assistant"])

    for rollout in episodes(worker, monkeypatch, play):
        if rollout.status is not RolloutStatus.COMPLETED:
            continue
        starts = np.flatnonzero(np.diff(rollout.mask.astype(int), prepend=0) == 1)
        ends = np.flatnonzero(np.diff(rollout.mask.astype(int), append=0) == -1)
        turns = [
            tokenizer.decode(rollout.tokens[a:b].tolist())  # without the stop token
            for a, b in zip(starts, ends, strict=True)
        ]
        assert [t.strip() for t in turns] in [[t.strip() for t in own] for own in shown]


# --- a scripted model ---

CALL = (
    "\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}  # fmt: skip


def scripted(tokenizer, *outputs) -> RolloutWorker:
    engine = ScriptedEngine(tokenizer, outputs)
    engine.config = type("Config", (), {"context": 4096})
    return RolloutWorker(engine, tokenizer)


ALONE = dataclasses.replace(SPEC, group_size=1, max_new_tokens=2000)


def test_tool_calls_come_back_with_their_answers(tokenizer, monkeypatch):
    seen = []

    def play(address, task):
        messages = list(task.messages)
        answer = chat(address, messages, tools=[ADD])
        [call] = answer.choices[0].message.tool_calls
        seen.append((call.function.name, call.function.arguments, answer.choices[0].finish_reason))
        messages += [said(answer), {"role": "tool", "tool_call_id": call.id, "content": "2"}]
        seen.append(said(chat(address, messages, tools=[ADD]))["content"])

    worker = scripted(tokenizer, (CALL, "stop"), ("\nIt is 2<|user|>", "stop"))
    [rollout] = episodes(worker, monkeypatch, play, ALONE)
    assert seen == [("add", '{"a": 1}', "tool_calls"), "It is 2"]
    assert rollout.status is RolloutStatus.COMPLETED and rollout.num_turns == 2
    text = tokenizer.decode(rollout.tokens.tolist())
    assert "\n<tool_response>\n2\n</tool_response><|assistant|>" in text.replace("/nothink", "")


@pytest.mark.parametrize("right", [True, False])
def test_a_public_harness_is_recorded_over_its_tool_calls(tokenizer, monkeypatch, right):
    class Doubler:
        async def run(self, task, address, seed):
            answer = await double(task.messages[-1]["content"], address)
            return Reward(float(answer == "42"), {})

    kind = Kind(Doubler, lambda tasks: None)
    monkeypatch.setitem(registry.ENVIRONMENTS, "agent", kind)
    call = CALL.replace("add", "double").replace(">a<", ">number<").replace(">1<", ">21<")
    worker = scripted(
        tokenizer, (call, "stop"), ("\n42<|user|>" if right else "\n4<|user|>", "stop")
    )
    [group] = worker.rollouts([Task("t", "g", "agent", (QUESTION,), "x")], ALONE, 0)
    [rollout] = group.rollouts
    assert rollout.status is RolloutStatus.COMPLETED and rollout.reward.value == right
    written = tokenizer.decode(rollout.tokens[rollout.mask].tolist())
    assert "double" in written and "<tool_response>" not in written and rollout.num_turns == 2
    assert "\n<tool_response>\n42\n</tool_response>" in tokenizer.decode(rollout.tokens.tolist())


def ends_with(error) -> str:
    return re.sub(r".*the episode has ended: (\w+).*", r"\1", str(error))


@pytest.mark.parametrize(
    ("outputs", "changes", "status"),
    [
        ([("\n<tool_call>abacus<|observation|>", "stop")], {}, "format_error"),
        ([("\nso", "length")], {}, "truncated"), ([("\nso", "abort")], {}, "aborted"),
        ([(CALL.removesuffix("<|observation|>") * 65 + "<|observation|>", "stop")], {},
         "too_many_calls"),
        ([("\nso<|user|>", "stop")] * 2, {"max_turns": 2}, "max_turns"),
        ([("\nso<|user|>", "stop")], {"max_new_tokens": 3}, "truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_agent_is_told_that_its_episode_has_ended(
    tokenizer, monkeypatch, outputs, changes, status
):
    told = []

    def play(address, task):
        for _ in range(4):
            try:
                chat(address, task.messages, tools=[ADD])
            except openai.PermissionDeniedError as error:
                told.append(ends_with(error))
                with pytest.raises(openai.NotFoundError, match="unknown, or has ended"):
                    chat(address, task.messages)
                raise

    worker = scripted(tokenizer, *outputs)
    rollouts = episodes(worker, monkeypatch, play, dataclasses.replace(ALONE, **changes))
    assert {r.status for r in rollouts} == {RolloutStatus(status)}
    assert all(r.reward.value == 0 for r in rollouts)
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told == [status]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n": 2}, "n: 2"), ({"stop": ["x"]}, "stop: ['x']"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [ADD], "tool_choice": "required"}, "tool_choice: a recorded session takes"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": []}, "messages"), ({"messages": [{"role": "boss", "content": ""}]}, "boss"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "so"}]}, "its own must be next"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "characters"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ],
)  # fmt: skip
def test_what_a_session_cannot_keep_is_refused_by_name_and_costs_no_turn(
    tokenizer, monkeypatch, changes, named
):
    told = []

    def play(address, task):
        options = {"messages": list(task.messages)} | changes
        with pytest.raises(openai.BadRequestError) as caught:
            chat(address, **options)
        told.append(str(caught.value))
        chat(address, task.messages, temperature=0.0, top_p=0.5, seed=3)

    worker = scripted(tokenizer, ("\nso<|user|>", "stop"))
    [rollout] = episodes(worker, monkeypatch, play, ALONE)
    assert rollout.status is RolloutStatus.COMPLETED and rollout.num_turns == 1
    assert named in told[0]
    assert worker.engine.requests[0].params.temperature == 1.0  # the trainer's to say


@pytest.mark.parametrize(
    ("play", "status"),
    [
        (lambda address, task: 1 / 0, "environment_error"),
        (lambda address, task: time.sleep(5), "timeout"),
        (lambda address, task: None, "completed"),  # without a call: nothing to train on
    ],
    ids=["raises", "hangs", "does nothing"],
)
def test_an_agent_that_fails_ends_its_own_episode(tokenizer, monkeypatch, play, status):
    spec = dataclasses.replace(ALONE, step_seconds=0.5)
    [rollout] = episodes(scripted(tokenizer), monkeypatch, play, spec)
    assert rollout.status.value == status and rollout.num_sampled == 0
    assert rollout.reward.value == (0.5 if status == "completed" else 0.0)


def test_an_agent_in_a_process_of_its_own(tokenizer, monkeypatch):
    program = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="any")
assert [model.id for model in client.models.list()] == ["policy"]
answer = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "?"}])
assert answer.choices[0].message.content == "so"
"""

    def play(address, task):
        subprocess.run([sys.executable, "-c", program, address], check=True, timeout=60)

    spec = dataclasses.replace(ALONE, step_seconds=60.0)
    [rollout] = episodes(scripted(tokenizer, ("\nso<|user|>", "stop")), monkeypatch, play, spec)
    assert rollout.status is RolloutStatus.COMPLETED and rollout.num_turns == 1


def test_cancelling_a_group_ends_its_sessions(worker, monkeypatch):
    told = []

    def play(address, task):
        try:
            while True:
                chat(address, [*task.messages])
        except openai.APIStatusError as error:
            told.append(error.status_code)
            raise

    kind = Kind(lambda: Agent(play), lambda tasks: None)
    monkeypatch.setitem(registry.ENVIRONMENTS, "agent", kind)
    task = Task("t", "g", "agent", (QUESTION,), "hello")
    worker.begin(0, task, dataclasses.replace(SPEC, max_turns=1000, max_new_tokens=10**6))
    deadline = time.monotonic() + 20
    while worker.engine.idle and time.monotonic() < deadline:
        worker.advance()
    worker.cancel(0)
    assert worker.idle and worker.engine.idle
    while len(told) < SPEC.group_size and time.monotonic() < deadline:
        worker.advance()
    assert set(told) <= {403, 404} and len(told) == SPEC.group_size


def test_an_episode_of_several_paths_counts_once(worker, monkeypatch):
    rewards = iter([1.0, 0.0, 0.0])

    class Pays(Agent):
        def run(self, task, address, seed):
            self.play(address, task)
            return Reward(next(rewards), {})

    turns = iter([3, 1, 1])
    play = lambda address, task: [
        chat(address, [{"role": "user", "content": f"hello {i}"}]) for i in range(next(turns))
    ]
    kind = Kind(lambda: Pays(play), lambda tasks: None)
    monkeypatch.setitem(registry.ENVIRONMENTS, "agent", kind)
    spec = dataclasses.replace(SPEC, group_size=3)
    [group] = worker.rollouts([Task("t", "g", "agent", (QUESTION,), "hello")], spec, 0)
    kept = Group(group.task, [r for r in group.rollouts if r.status is RolloutStatus.COMPLETED])
    counted = [r.reward.value for r in kept.episodes]
    for rollout, advantage in advantages(kept, normalize_std=False):
        assert advantage == pytest.approx(rollout.reward.value - np.mean(counted))
    [back] = unpack_groups(*pack_groups([group]))
    assert [r.episode for r in back.rollouts] == [r.episode for r in group.rollouts]
