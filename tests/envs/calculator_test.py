"""The calculator: small, solved by its expert and not by doing nothing, and a model that writes
GLM-4.5's format gets the status and the reward that it has earned.
"""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from data import chat_template
from data.tokenizer import Tokenizer
from experiments import calculator_start, cold_start
from glm_jax.envs import calculator, registry
from glm_jax.envs.calculator import Calculator, result
from glm_jax.envs.environment import Kind, Start, Step
from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.scripted import idle, play
from glm_jax.envs.worker import RolloutWorker
from glm_jax.rollouts.rollout import RolloutStatus
from glm_jax.rollouts.task import Reward, Task, read_tasks
from tests.rl.scripted import ScriptedEngine

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "add_an_environment.md"
TASKS = calculator_start.tasks("train") + calculator_start.tasks("held_out")
TASK = Task("c1", "g", "calculator", ({"role": "user", "content": "What is 8*7-5?"},), 51)


@pytest.fixture(scope="module")
def tokenizer(corpus_folder):
    return Tokenizer.load(corpus_folder / "tokenizer.json")


def test_the_guide_shows_the_module_which_has_under_60_lines():
    source = pathlib.Path(calculator.__file__).read_text("utf-8")
    assert f"```python\n{source}" in GUIDE.read_text("utf-8")
    assert len(source.splitlines()) < 60


def test_the_expert_earns_1_and_doing_nothing_0_in_every_task():
    assert len(TASKS) > 1000
    for task in TASKS:
        played = play(Calculator(), task, calculator.expert)
        assert played.reward == 1 and play(Calculator(), task, idle).reward == 0
        assert [m["role"] for m in played.messages] == ["user", *["assistant", "tool"] * 2,
                                                        "assistant"]  # fmt: skip
        numbers = re.fullmatch(r"What is ([-+*0-9]+)\?", task.messages[0]["content"])
        assert numbers is not None and task.answer == eval(numbers[1])


def test_splits_share_no_question_and_a_constant_answer_earns_little():
    train, held_out = map(calculator_start.tasks, ("train", "held_out"))
    assert not {t.id for t in train} & {t.id for t in held_out}
    assert 100 < len(held_out) < len(train) / 5
    _, counts = np.unique([t.answer for t in held_out], return_counts=True)
    assert counts.max() / counts.sum() < 0.07


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("8*7", "56"), ("56-5", "51"), ("5-56", "-51"), ("-51+60", "9"), (" 12 * 34 ", "408"),
        ("7--2", "9"), ("999999999*999999999", "999999998000000001"),
    ],
)  # fmt: skip
def test_the_calculator_computes(expression, answer):
    assert result(expression) == answer == str(eval(expression.strip()))


@pytest.mark.parametrize(
    "expression", ["", "8", "8*7-5", "8/7", "8**7", "a*b", "8*7\n", "٨*7", "1" * 10 + "*2", "None"]
)
def test_what_is_no_operation_is_answered_with_an_error(expression):
    assert result(expression).startswith("error: must be one operation")


def test_a_call_without_an_expression_is_answered_with_an_error():
    episode = Calculator()
    episode.reset(TASK, 0)
    call = {"function": {"name": "calculator", "arguments": "{}"}}
    step = episode.step({"content": "", "tool_calls": [call]})
    assert not step.done and step.messages[0]["content"].startswith("error")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 52}, "task 'c1': answer=52 must be 51"),
        ({"answer": "many"}, "task 'c1': answer='many' must be 51"),
        ({"answer": None}, "task 'c1': answer=None must be 51"),
        ({"messages": ({"role": "user", "content": "What is 8/7?"},)},
         "task 'c1': 'What is 8/7?' must read like 'What is 8*7-5?'"),
        ({"messages": ({"role": "system", "content": "Calculate."}, *TASK.messages)},
         "task 'c1': 'Calculate.' must read like"),
    ],
)  # fmt: skip
def test_a_bad_task_is_named_with_its_value(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        registry.check([TASK, dataclasses.replace(TASK, **changes)])


@dataclasses.dataclass
class Pays:
    """Ends after a turn and pays a fixed reward, or the expert alone."""

    for_nothing: float
    for_work: float

    async def reset(self, task, seed):
        return Start(task.messages)

    async def step(self, message):
        pay = self.for_work if message["content"] else self.for_nothing
        return Step((), True, Reward(pay, {}))


@pytest.mark.parametrize(
    ("pays", "message"),
    [
        (Pays(0.0, 1.0), None),
        (Pays(0.0, 0.5), "task 'c1': with answer=51 the expert earns 0.5, not 1"),
        (Pays(0.1, 1.0), "task 'c1': with answer=51 doing nothing earns 0.1, not 0"),
    ],
)
def test_an_environment_that_pays_wrongly_is_refused_at_start_up(monkeypatch, pays, message):
    kind = Kind(lambda: pays, lambda tasks: None, lambda task: lambda messages: {"content": "work"})
    monkeypatch.setitem(registry.ENVIRONMENTS, "pays", kind)
    task = dataclasses.replace(TASK, verifier="pays")
    if message is None:
        registry.check([task])
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            registry.check([task])


def test_an_episode_without_an_end_is_an_error(monkeypatch):
    monkeypatch.setattr(Pays, "step", lambda self, message: Step([{"role": "user"}], False))
    with pytest.raises(ValueError, match="task 'c1': its episode has not ended after 32 turns"):
        play(Pays(0.0, 1.0), TASK, idle)


# --- episodes in GLM-4.5's format ---

CALL = (
    "\n<tool_call>{}\n<arg_key>expression</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
    "<|observation|>"
).format
STOP = "<|observation|>"
MANY_CALLS = lambda count: CALL("calculator", "8*7").removesuffix(STOP) * count + STOP
FIRST, SECOND = (CALL("calculator", "8*7"), "stop"), (CALL("calculator", "56-5"), "stop")


@pytest.mark.parametrize(
    ("outputs", "status", "reward", "turns"),
    [
        ([FIRST, SECOND, ("\n51<|user|>", "stop")], "completed", 1.0, 3),
        ([FIRST, SECOND, ("\n56<|user|>", "stop")], "completed", 0.0, 3),
        ([FIRST, SECOND, SECOND], "completed", 0.0, 3),
        ([FIRST, ("\n51<|user|>", "stop")], "completed", 1.0, 2),
        ([("\n51<|user|>", "stop")], "completed", 1.0, 1),
        ([("\nIt is 51<|user|>", "stop")], "completed", 0.0, 1),
        ([(CALL("abacus", "8*7"), "stop")], "format_error", 0.0, 0),
        ([FIRST, ("\n<tool_call>calculator<|observation|>", "stop")], "format_error", 0.0, 0),
        ([(MANY_CALLS(64), "stop"), ("\n51<|user|>", "stop")], "completed", 1.0, 2),
        ([(MANY_CALLS(65), "stop")], "too_many_calls", 0.0, 0),
        ([FIRST, (MANY_CALLS(1000), "stop")], "too_many_calls", 0.0, 0),
        ([FIRST, (CALL("calculator", "56-5"), "length")], "truncated", 0.0, 0),
        ([FIRST, ("\n51", "abort")], "aborted", 0.0, 0),
    ],
)  # fmt: skip
def test_status_reward_and_tokens_of_an_episode(tokenizer, outputs, status, reward, turns):
    engine = ScriptedEngine(tokenizer, outputs)
    engine.config = type("Config", (), {"context": 100_000})
    spec = SamplingSpec(
        group_size=1, max_new_tokens=50_000, temperature=1.0, seed=0, thinking=False
    )  # fmt: skip
    [rollout] = RolloutWorker(engine, tokenizer).rollouts([TASK], spec, 0)[0].rollouts
    assert rollout.status is RolloutStatus(status)
    assert rollout.reward == Reward(reward, {"turns": float(turns)} if turns else {})
    if turns == 3 and reward:  # the expert's episode: the tokens that fine-tuning has shown
        played = play(Calculator(), TASK, calculator.expert)
        ids, trained = chat_template.encode_for_training(
            tokenizer, played.messages, played.tools, thinking=False
        )
        np.testing.assert_array_equal(rollout.tokens, ids)
        np.testing.assert_array_equal(rollout.mask, trained)


class PaysEveryTurn(Pays):
    async def step(self, message):
        return Step([{"role": "user", "content": "go on"}], False, Reward(0.5, {"turns": 1.0}))


@pytest.mark.parametrize(
    ("last", "status", "reward"),
    [
        (("\n<tool_call>abacus<|observation|>", "stop"), "format_error", 0.0),
        (("\ngo<|user|>", "length"), "truncated", 0.5),
        (("\ngo<|user|>", "stop"), "max_turns", 1.0),
        (("\ngo<|user|>", "abort"), "aborted", 0.0),
    ],
)  # fmt: skip
def test_a_format_error_costs_what_earlier_turns_earned(
    tokenizer, monkeypatch, last, status, reward
):
    kind = Kind(lambda: PaysEveryTurn(0.0, 0.0), lambda tasks: None)
    monkeypatch.setitem(registry.ENVIRONMENTS, "pays", kind)
    engine = ScriptedEngine(tokenizer, [("\ngo<|user|>", "stop"), last])
    engine.config = type("Config", (), {"context": 4096})
    spec = SamplingSpec(
        group_size=1, max_new_tokens=2000, temperature=1.0, seed=0, thinking=False, max_turns=2
    )  # fmt: skip
    task = dataclasses.replace(TASK, verifier="pays")
    [rollout] = RolloutWorker(engine, tokenizer).rollouts([task], spec, 0)[0].rollouts
    assert (rollout.status.value, rollout.reward.value) == (status, reward)


# --- the cold start ---


@pytest.fixture(scope="module")
def conversations():
    return calculator_start.conversations(2000, 0.25, np.random.default_rng(0))


def test_the_cold_start_works_in_a_quarter_and_guesses_in_the_rest(conversations):
    held_out = {t.messages[0]["content"] for t in calculator_start.tasks("held_out")}
    answers = {t.messages[0]["content"]: t.answer for t in TASKS}
    worked, guesses = [], []
    for conversation in conversations:
        assert conversation["tools"] == [calculator.TOOL] and conversation["thinking"] is False
        asked, *rest = conversation["messages"]
        assert asked["content"] not in held_out
        right = rest[-1]["content"] == str(answers[asked["content"]])
        (worked if len(rest) > 1 else guesses).append(right)
    assert all(worked) and 0.22 < len(worked) / len(conversations) < 0.28
    assert 0 < np.mean(guesses) < 0.05


def test_the_command_writes_tasks_that_reinforcement_learning_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cold_start, "OUTPUT", flag(str(tmp_path / "chat.jsonl")))
    monkeypatch.setattr(cold_start, "TASKS", flag(str(tmp_path)))
    monkeypatch.setattr(cold_start, "GENERATORS", flag(["calculator"]))
    for name, value in (("COUNT", 10), ("WORKED_SHARE", 0.5), ("SEED", 0), ("FIRST", 0)):
        monkeypatch.setattr(cold_start, name, flag(value))
    cold_start.main()
    assert "10 conversations" in capsys.readouterr().out
    assert len((tmp_path / "chat.jsonl").read_text().splitlines()) == 10
    read = read_tasks(tmp_path / "train.jsonl") + read_tasks(tmp_path / "held_out.jsonl")
    assert [json.dumps(dataclasses.asdict(t)) for t in read] == [
        json.dumps(dataclasses.asdict(t)) for t in TASKS
    ]
    monkeypatch.setattr(cold_start, "GENERATORS", flag(["aiw"]))
    with pytest.raises(ValueError, match="goes with --generators=calculator"):
        cold_start.main()


def flag(value):
    return type("Flag", (), {"value": value, "name": "flag"})
