"""Agents that others wrote are trained: the public client, and a public harness from a package,
through the loop of reinforcement learning, which sees nothing but their calls.
"""

import dataclasses
import json

import openai
import pytest

from data import chat_template
from experiments import entry
from glm_jax.envs import registry, worker
from glm_jax.envs.environment import Kind
from glm_jax.infer.sampling import SamplingParams
from glm_jax.rl import loop
from glm_jax.rollouts.rollout import RolloutStatus
from glm_jax.rollouts.task import Reward, Task
from glm_jax.run.recorder import read_metrics
from tests import glossary
from tests.envs.doubler import double


class Client:
    """Two calls of the public client; a reward for letters of the model's own."""

    def run(self, task, address, seed):
        with openai.OpenAI(base_url=address, api_key="any", max_retries=0) as client:
            messages = list(task.messages)
            for _ in range(2):
                answer = client.chat.completions.create(model="policy", messages=messages)
                messages.append(answer.choices[0].message.model_dump(exclude_none=True))
                messages.append({"role": "user", "content": "go on"})
        return paid(messages[-2]["content"])


class Forgetful:
    """Three calls, each of a conversation of its own: three rollouts of one episode."""

    def run(self, task, address, seed):
        text = ""
        with openai.OpenAI(base_url=address, api_key="any", max_retries=0) as client:
            for number in range(3):
                messages = [{"role": "user", "content": f"{task.id} {number} " + "x" * 300}]
                answer = client.chat.completions.create(model="policy", messages=messages)
                text += answer.choices[0].message.content
        return paid(text)


class Harness:
    async def run(self, task, address, seed):
        return paid(await double(task.messages[-1]["content"], address))


def paid(text: str) -> Reward:
    return Reward(float(sum(map(ord, text)) % 2), {"letters": float(len(text))})


@pytest.fixture
def config(rl_config, tmp_path, monkeypatch):
    """For the toy, whose tokens are letters: a short block of tools, and turns of two tokens."""
    monkeypatch.setattr(chat_template, "TOOLS_BEFORE", "<|system|>\n")
    monkeypatch.setattr(chat_template, "TOOLS_AFTER", "")

    def read(self, tools, request):
        request.finish_reason = "stop"
        request.tokens[-1] = self.stop_tokens[1]  # a turn of a toy ends by its length
        content = self.tokenizer.decode(request.text_tokens)
        return RolloutStatus.COMPLETED, {"role": "assistant", "content": content}

    def two_tokens(max_new_tokens, **rest):
        return SamplingParams(max_new_tokens=min(max_new_tokens, 2), **rest)

    monkeypatch.setattr(worker.RolloutWorker, "read", read)
    monkeypatch.setattr(worker, "SamplingParams", two_tokens)
    for name, count in (("train", 8), ("held_out", 2)):
        path = tmp_path / f"{name}.jsonl"
        names = [f"{name} {i}" for i in range(count)]
        tasks = [Task(n, "g", "agent", ({"role": "user", "content": n},), "any") for n in names]
        path.write_text("".join(json.dumps(dataclasses.asdict(task)) + "\n" for task in tasks))
        rl_config.tasks[name] = (str(path),)
    rl_config.tasks.thinking = False
    rl_config.model.max_length = rl_config.engine.context = rl_config.grpo.row_length = 512
    rl_config.engine.num_pages = 1024
    rl_config.loop.update(steps=2, eval_every=2)
    return rl_config


@pytest.mark.parametrize(("agent", "turns"), [(Client, 2), (Harness, 1), (Forgetful, 1)])
def test_an_agent_of_others_is_trained(config, tmp_path, monkeypatch, agent, turns):
    monkeypatch.setitem(registry.ENVIRONMENTS, "agent", Kind(agent, lambda tasks: None))
    rl, start = entry.rl_config(config)
    assert loop.train(rl, start, tmp_path / "run", config_json="{}", progress=False) == 2
    records = read_metrics(tmp_path / "run")
    assert not glossary.unknown(records, "rl")
    assert any(r["updates"] and r["grad_norm"] > 0 for r in records)
    assert all(0 < r["reward"] < 1 and r["status/completed"] == 1 for r in records)
    assert all(r["length"] == 2 * turns for r in records)
    line = json.loads((tmp_path / "run" / "held_out" / "0000002.jsonl").read_text().splitlines()[0])
    assert line["status"] == "completed"
