"""The loop on tasks of an environment: read from files, played, learnt from, measured."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from data import chat_template
from experiments import calculator_start, entry
from glm_jax.envs import worker
from glm_jax.infer.sampling import SamplingParams
from glm_jax.rl import loop
from glm_jax.rollouts.rollout import RolloutStatus
from glm_jax.run.recorder import read_metrics
from tests import glossary

ANSWER = 12  # of all the tasks here


def write(path, tasks) -> str:
    path.write_text("".join(json.dumps(dataclasses.asdict(t)) + "\n" for t in tasks))
    return str(path)


@pytest.fixture
def config(rl_config, tmp_path, monkeypatch):
    """For the toy, whose tokens are letters: a short block of tools, and turns of two tokens, whose
    sum says whether they are a call, the right answer or a wrong one.
    """
    monkeypatch.setattr(chat_template, "TOOLS_BEFORE", "<|system|>\n")
    monkeypatch.setattr(chat_template, "TOOLS_AFTER", "")

    def read(self, tools, request):
        assert [tool["function"]["name"] for tool in tools] == ["calculator"]
        # A turn of a toy ends by its length, not by a stop token.
        self.stops = collections.defaultdict(lambda: "<|observation|>", self.stops)
        lot = sum(request.tokens)
        call = {"name": "calculator", "arguments": json.dumps({"expression": "3*4"})}
        message = {"role": "assistant", "content": str(ANSWER * (lot % 2))}
        calls = {"tool_calls": [{"type": "function", "function": call}]} if lot % 3 else {}
        return RolloutStatus.COMPLETED, message | calls

    def two_tokens(max_new_tokens, **rest):
        return SamplingParams(max_new_tokens=min(max_new_tokens, 2), **rest)

    monkeypatch.setattr(worker.RolloutWorker, "read", read)
    monkeypatch.setattr(worker, "SamplingParams", two_tokens)
    rl_config.tasks.train = (
        write(tmp_path / "train.jsonl", of_answer(calculator_start.tasks("train"))),
    )
    rl_config.tasks.held_out = (
        write(tmp_path / "held.jsonl", of_answer(calculator_start.tasks("held_out"))[:2]),
    )
    rl_config.tasks.thinking = False
    rl_config.model.max_length = rl_config.engine.context = rl_config.grpo.row_length = 256
    rl_config.engine.num_pages = 512
    rl_config.loop.update(steps=2, eval_every=2)
    return rl_config


def of_answer(tasks):
    return [task for task in tasks if task.answer == ANSWER]


def test_a_run_on_an_environment_learns_and_counts_its_turns(config, tmp_path):
    rl, start = entry.rl_config(config)
    assert loop.train(rl, start, tmp_path / "run", config_json="{}", progress=False) == 2
    records = read_metrics(tmp_path / "run")
    assert not glossary.unknown(records, "rl")
    assert any(r["updates"] for r in records)
    assert all(0 < r["reward"] < 1 and 1.5 < r["reward_part/turns"] < 3 for r in records)
    assert all(r["status/completed"] == 1 for r in records)
    lines = (tmp_path / "run" / "held_out" / "0000002.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines]
    assert records[-1]["held_out_after"] == pytest.approx(np.mean([x["reward"] for x in held_out]))
    assert {line["parts"]["turns"] for line in held_out} <= {1.0, 2.0, 3.0}
    assert all(line["output"].count("\n12\n") == line["parts"]["turns"] - 1 for line in held_out)


def test_a_bad_task_stops_the_run_before_it_begins(config, tmp_path):
    bad = dataclasses.replace(of_answer(calculator_start.tasks("train"))[0], answer=ANSWER + 1)
    config.tasks.train = (write(tmp_path / "train.jsonl", [bad]),)
    rl, start = entry.rl_config(config)
    with pytest.raises(ValueError, match=f"task '.*': answer={ANSWER + 1} must be {ANSWER}"):
        loop.train(rl, start, tmp_path / "run", config_json="{}", progress=False)
    assert not (tmp_path / "run").exists()
