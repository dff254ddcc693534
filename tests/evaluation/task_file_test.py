"""Tasks of a file: judged as reinforcement learning judges them, for each limit on turns."""

import json
import types

import pytest

from data.tokenizer import train_tokenizer
from experiments import entry
from glm_jax.envs import registry
from glm_jax.envs.environment import Kind, Start, Step
from glm_jax.evaluation import task_file
from glm_jax.evaluation.subject import Settings
from glm_jax.rollouts.task import Reward
from tests.rl.scripted import CUT, MALFORMED, RIGHT, WRONG, ScriptedEngine

SETTINGS = Settings(
    limit=None, context=None, num_rows=1, batch_tokens=256, draft_tokens=0, max_new_tokens=64,
    temperature=1.0, seed=0, num_examples=0, chat=True, thinking=True, max_turns=(1, 2, 5),
)  # fmt: skip


class Patient:
    """Pays in the turn that the task's answer names."""

    def reset(self, task, seed):
        del seed
        self.left = task.answer
        return Start(task.messages)

    def step(self, message):
        del message
        self.left -= 1
        done = not self.left
        return Step([{"role": "user", "content": "go on"}], done, Reward(float(done), {}))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["so it is \\boxed{A} or \\boxed{B}\n"] * 20, 300)


def subject(tokenizer, outputs, **changes):
    engine = ScriptedEngine(tokenizer, outputs)
    engine.config = types.SimpleNamespace(context=400)
    settings = Settings(**{**SETTINGS.__dict__, **changes})
    return types.SimpleNamespace(engine=engine, tokenizer=tokenizer, settings=settings)


def written(path, verifier, answers) -> str:
    lines = [
        {"id": str(i), "verifier": verifier, "prompt": f"x{i}", "answer": answer}
        for i, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def values(entry) -> dict[str, float]:
    return {name: pair["value"] for name, pair in entry["metrics"].items()}


def test_further_turns_are_worth_what_the_environment_pays(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.ENVIRONMENTS, "patient", Kind(Patient, lambda tasks: None))
    name = written(tmp_path / "tasks.jsonl", "patient", [1, 2, 3, 4])
    found = task_file.prepare(name, SETTINGS)(subject(tokenizer, [RIGHT] * 99))
    assert list(found) == [f"{name}/max_turns={turns}" for turns in (1, 2, 5)]
    one, two, five = map(values, found.values())
    assert (one["reward"], one["turns"], one["max_turns"]) == (0.25, 1.0, 0.75)
    assert (two["reward"], two["turns"], two["max_turns"]) == (0.5, 1.75, 0.5)
    assert (five["reward"], five["turns"], five["completed"]) == (1.0, 2.5, 1.0)
    assert "max_turns" not in five and found[f"{name}/max_turns=1"]["count"] == 4


def test_a_verifiers_tasks_are_judged_by_it_and_shares_are_of_all_tasks(tokenizer, tmp_path):
    name = written(tmp_path / "t.jsonl", "choice", [{"letter": "A", "options": 4}] * 5)
    outputs = [RIGHT, WRONG, MALFORMED, CUT, RIGHT]
    prepared = task_file.prepare(name, SETTINGS)
    found = values(prepared(subject(tokenizer, outputs, max_turns=(3,)))[name])
    assert found == {
        "reward": 0.4, "turns": 1.0, "did_not_fit": 0.0,
        "completed": 0.6, "format_error": 0.2, "truncated": 0.2,
    }  # fmt: skip
    tight = subject(tokenizer, outputs, max_turns=(3,), max_new_tokens=399)
    assert values(prepared(tight)[name]) == {"reward": 0.0, "turns": 0.0, "did_not_fit": 1.0}


def test_bad_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no task file at .*missing.jsonl"):
        task_file.prepare(str(tmp_path / "missing.jsonl"), SETTINGS)
    name = written(tmp_path / "t.jsonl", "choice", [{"letter": "Z", "options": 4}])
    with pytest.raises(ValueError, match="'0'.*Z"):
        task_file.prepare(name, SETTINGS)


@pytest.mark.parametrize(
    ("given", "message"),
    [(["1", "0"], "--turns=0: must be"), (["two"], "--turns=two: must be"), ([], "--turns is emp")],
)
def test_limits_that_are_no_numbers_are_refused(given, message):
    flag = types.SimpleNamespace(name="turns", value=given)
    with pytest.raises(ValueError, match=message):
        entry.positive_integers(flag)
    assert entry.positive_integers(types.SimpleNamespace(name="turns", value=["1", "8"])) == (1, 8)
