"""The whole loop on a toy: what it writes, kill and resume, dynamic sampling and the buffer, and what it refuses."""

import json
import shutil

import jax
import pytest
import toy
from toy import records

from experiments import entry
from glm_jax.rl import collector as collecting
from glm_jax.rl import loop
from glm_jax.train.checkpoint import load_weights


@pytest.fixture
def easy(monkeypatch):
    """Any output can be read, and is judged by its parity."""
    monkeypatch.setattr(collecting.verifiers, "score", toy.parity)
    monkeypatch.setattr(collecting.Roller, "read", toy.read_anything)


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
    assert {"held_out", "reward", "reward/g0", "entropy", "clip_share", "groups_mixed", "groups_buffered"} <= found[1].keys() | found[
        0
    ].keys()
    assert not all((a == b).all() for a, b in zip(weights(whole, 2), weights(whole, 4), strict=True))
    lines = [json.loads(line) for line in (whole / "rollouts" / "0000002.jsonl").read_text().splitlines()]
    assert {"task", "status", "reward", "prompt", "output"} <= lines[0].keys() and lines[0]["status"] == "completed"

    # Killed behind step 3: the newest checkpoint is that of step 2, and metrics go beyond it.
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "4")
    assert run(rl_config, killed) == 4
    assert records(killed) == found
    assert all((a == b).all() for a, b in zip(weights(killed), weights(whole), strict=True))


def test_on_policy_is_asserted(rl_config, tmp_path, easy, monkeypatch):
    monkeypatch.setattr(collecting.Engine, "set_weights", lambda self, state, **_: None)  # an engine that keeps its old weights
    with pytest.raises(RuntimeError, match="version 0 to train version 1, max_staleness=0"):
        run(rl_config, tmp_path / "w")
