"""The whole loop on a toy: what it writes, kill and resume, dynamic sampling and the buffer, and
what it refuses.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import toy
from toy import records

from experiments import entry
from glm_jax.envs import worker
from glm_jax.rl import loop
from glm_jax.rl.learner import Learner
from glm_jax.run.recorder import NonFinite, read_metrics
from glm_jax.train.start import load_weights
from tests import glossary


@pytest.fixture
def easy(monkeypatch):
    """Any output can be read, and is judged by its parity."""
    monkeypatch.setattr(worker.verifiers, "score", toy.parity)
    monkeypatch.setattr(worker.RolloutWorker, "read", toy.read_anything)


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


def test_on_policy_is_asserted(rl_config, tmp_path, easy, monkeypatch):
    # an engine that keeps its old weights
    monkeypatch.setattr(worker.Engine, "set_weights", lambda self, state, **_: None)
    with pytest.raises(RuntimeError, match="version 0 to train version 1, max_staleness=0"):
        run(rl_config, tmp_path / "w")


# What only some runs have: a dropped group, groups that happen to be of one kind.
SOMETIMES = {"groups_surplus", "groups_failed", "groups_solved", "groups_unsolved"}


def test_the_glossary_has_every_metric_of_a_run_and_no_other(rl_config, tmp_path, easy):
    rl_config.grpo.update(max_staleness=4, mtp_weight=0.1)
    rl_config.control.update(temperatures=(1.0, 0.5), plateau_window=1, plateau_gain=10.0)
    rl_config.loop.steps = 2
    run(rl_config, tmp_path / "run")
    found = read_metrics(tmp_path / "run")
    assert not glossary.unknown(found, "rl")
    assert glossary.unseen(found, "rl") <= SOMETIMES
