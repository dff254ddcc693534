"""The whole loop on a toy: what it writes, kill and resume, dynamic sampling and the buffer, and
what it refuses.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import toy
from toy import records

from data.tokenizer import Tokenizer
from experiments import entry
from glm_jax import bubblewrap, sandbox
from glm_jax.envs import worker
from glm_jax.infer.engine import Engine
from glm_jax.rl import loop
from glm_jax.rl.learner import Learner
from glm_jax.run.recorder import NonFinite, read_metrics
from glm_jax.train.start import load_weights
from tests import glossary
from tests.rl.scripted import CUT, MALFORMED, RIGHT, write


@pytest.fixture
def easy(monkeypatch):
    toy.judge_by_parity(monkeypatch.setattr)


def run(config, workdir):
    rl, start = entry.rl_config(config)
    return loop.train(rl, start, workdir, config_json=config.to_json(), progress=False)


def weights(workdir, step=None):
    return jax.tree.leaves(load_weights(workdir, step)[1])


def test_a_run_learns_writes_and_resumes_bit_for_bit(rl_config, tmp_path, easy):
    rl_config.grpo.update(updates_per_step=2, max_staleness=4)
    rl_config.rollout.over_sampling = 2.0
    whole = tmp_path / "whole"
    assert run(rl_config, whole) == 4
    found = records(whole)
    assert [r["step"] for r in found] == [0, 1, 2, 3]
    assert found[-1]["version"] > found[0]["version"] and found[-1]["staleness_max"] > 0
    assert all(r["difference"] < 1e-4 for r in found if r.get("staleness_max") == 0)
    assert {
        "held_out",
        "reward",
        "reward/g0",
        "entropy",
        "clip_share",
        "groups_mixed",
        "groups_buffered",
    } <= found[1].keys() | found[0].keys()
    assert not all(
        (a == b).all() for a, b in zip(weights(whole, 2), weights(whole, 4), strict=True)
    )
    lines = [
        json.loads(line) for line in (whole / "rollouts" / "0000002.jsonl").read_text().splitlines()
    ]
    assert {"task", "status", "reward", "prompt", "output"} <= lines[0].keys() and lines[0][
        "status"
    ] == "completed"

    for steps, score in ((0, found[0]["held_out"]), (4, found[-1]["held_out_after"])):
        lines = [
            json.loads(line)
            for line in (whole / "held_out" / f"{steps:07d}.jsonl").read_text().splitlines()
        ]
        assert len(lines) == 3 * rl_config.loop.eval_samples
        assert np.mean([line["reward"] for line in lines]) == pytest.approx(score)

    # Killed behind step 3: the newest checkpoint is that of step 2, and metrics go beyond it.
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "4")
    assert run(rl_config, killed) == 4
    assert records(killed) == found
    assert all((a == b).all() for a, b in zip(weights(killed), weights(whole), strict=True))


def test_an_engine_that_is_far_off_does_not_break_the_weights(
    rl_config, tmp_path, easy, monkeypatch
):
    """One log-probability is 100 nats off: exp(100) is infinite in float32."""
    rl_config.grpo.update(old_logprobs="engine", importance_cap=0.0)
    original = Learner.batch

    def far_off(self, groups):
        batch, used = original(self, groups)
        batch.inputs.engine_logprobs[batch.inputs.loss_weights > 0] -= 100.0
        return batch, used

    monkeypatch.setattr(Learner, "batch", far_off)
    assert run(rl_config, tmp_path / "run") == 4
    assert all(np.isfinite(x).all() for x in weights(tmp_path / "run"))
    assert all(np.isfinite(r["grad_norm"]) for r in records(tmp_path / "run") if "grad_norm" in r)


def test_weights_that_are_not_finite_reach_neither_the_engine_nor_a_checkpoint(
    rl_config, tmp_path, easy, monkeypatch
):
    steps, swaps = [], []

    def noted(self, groups, temperature, step, original=Learner.learn):
        steps.append(step)
        return original(self, groups, temperature, step)

    def broken(self, groups, original=Learner.batch):
        batch, used = original(self, groups)
        if steps[-1] == 2:
            batch.inputs.advantages[batch.inputs.loss_weights > 0] = np.inf
        return batch, used

    monkeypatch.setattr(Learner, "learn", noted)
    monkeypatch.setattr(Learner, "batch", broken)
    set_weights = worker.Engine.set_weights
    monkeypatch.setattr(
        worker.Engine,
        "set_weights",
        lambda self, *a, **k: swaps.append(k["version"]) or set_weights(self, *a, **k),
    )
    rl_config.loop.update(checkpoint_every=1, keep_checkpoints=1)
    with pytest.raises(
        NonFinite,
        match=(
            r"grad_norm is nan.* at step 2; its batch is in .*nonfinite_step_2.*last good"
            r" checkpoint is of step 2"
        ),
    ):
        run(rl_config, tmp_path)
    assert swaps == [1, 2] and all(np.isfinite(x).all() for x in weights(tmp_path))
    assert np.load(tmp_path / "nonfinite_step_2_process_0.npz")["advantages"].size


def test_what_the_model_writes_is_parsed_judged_and_trained_on(rl_config, tmp_path, monkeypatch):
    """Parser, verifiers and sandbox are the true ones; only the engine's tokens are written for it.
    Of every three rollouts one can be read, one is malformed and one is cut off; the sandbox of the
    task of code cannot start, so that what can be read of it is the environment's error.
    """
    monkeypatch.setattr(sandbox, "check", lambda: None)
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: "/bin/false")
    outputs = (RIGHT, MALFORMED, CUT)

    def step(engine):
        for number, request in enumerate(engine.waiting):
            write(request, outputs[number % 3], tokenizer, engine.version)
        done = [*engine.waiting]
        engine.waiting.clear()
        return done

    taught = []
    original = Learner.batch
    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(
        Learner, "batch", lambda self, groups: taught.append(groups) or original(self, groups)
    )
    tokenizer = Tokenizer.load(pathlib.Path(rl_config.start.workdir) / "tokenizer.json")
    longest = max(len(tokenizer.encode(text, allow_special=True)) for text, _ in outputs)
    answer = {"entry_point": "f", "cases": [{"expected": 1}]}
    code = {"id": "code", "verifier": "code", "group": "code", "prompt": "f", "answer": answer}
    train = pathlib.Path(rl_config.tasks.train[0])
    choices = train.read_text().splitlines(keepends=True)[:3]
    train.write_text("".join(choices) + json.dumps(code) + "\n")  # a step asks all four
    rl_config.control.length_stages = ((0, longest),)
    rl_config.update_from_flattened_dict(
        {"engine.context": 64, "grpo.row_length": 64, "loop.steps": 2, "loop.eval_samples": 3,
         "loop.save_rollouts_every": 1, "rollout.max_waves": 1}
    )  # fmt: skip
    workdir = tmp_path / "run"
    assert run(rl_config, workdir) == 2
    for record in records(workdir):
        assert {k: v for k, v in record.items() if k.startswith(("status/", "groups_"))} == {
            "status/completed": 3 / 12, "status/format_error": 4 / 12, "status/truncated": 4 / 12,
            "status/environment_error": 1 / 12, "status/aborted": 0.0, "status/max_turns": 0.0,
            "status/timeout": 0.0, "status/too_many_calls": 0.0,
            "groups_mixed": 3, "groups_unsolved": 1,
            "groups_stale": 0, "groups_from_buffer": 0, "groups_surplus": 0,
        }  # fmt: skip
        assert record["reward"] == pytest.approx(3 / 11)  # the environment's error is nobody's
        assert record["reward/code"] == 0 and record["updates"] == 1
        assert np.isfinite(record["grad_norm"]) and record["grad_norm"] > 0
        assert record["balance"] > 0 and record["balance"] % 1  # a mean over tokens
    first = records(workdir)[0]
    assert first["held_out"] == pytest.approx(1 / 3) == first["held_out_truncated"]
    for groups in taught:
        assert [g.has_variance for g in groups] == [True] * 3
        for group in groups:
            rewards = {r.status.value: r.reward.value for r in group.rollouts}
            assert rewards == {"completed": 1.0, "format_error": 0.0, "truncated": 0.0}
    for step_number in range(2):
        file = workdir / "rollouts" / f"{step_number:07d}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        (broken,) = [line for line in lines if line["status"] == "environment_error"]
        assert broken["task"] == "code" and broken["parts"]["environment_error"] == 1
        written = {line["status"]: line["output"] for line in lines if line["group"] != "code"}
        assert written == dict(
            zip(("completed", "format_error", "truncated"), (t for t, _ in outputs), strict=True)
        )


def test_on_policy_is_asserted(rl_config, tmp_path, easy, monkeypatch):
    # an engine that keeps its old weights
    monkeypatch.setattr(worker.Engine, "set_weights", lambda self, state, **_: None)
    with pytest.raises(RuntimeError, match="version 0 to train version 1, max_staleness=0"):
        run(rl_config, tmp_path / "w")


# What only some runs have: a dropped group, groups that happen to be of one kind.
SOMETIMES = {"groups_surplus", "groups_failed", "groups_solved", "groups_unsolved"}
STREAMED = {  # with rollout.asynchronous
    "groups_in_flight", "groups_waiting", "groups_trained", "groups_cancelled",
}  # fmt: skip


def test_the_glossary_has_every_metric_of_a_run_and_no_other(rl_config, tmp_path, easy):
    rl_config.grpo.update(max_staleness=4, mtp_weight=0.1)
    rl_config.control.update(temperatures=(1.0, 0.5), plateau_window=1, plateau_gain=10.0)
    rl_config.loop.steps = 2
    run(rl_config, tmp_path / "run")
    found = read_metrics(tmp_path / "run")
    assert not glossary.unknown(found, "rl")
    assert glossary.unseen(found, "rl") <= SOMETIMES | STREAMED
