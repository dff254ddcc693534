"""The loop: resume, signals, bad losses, records; and what must stop before anything is written."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest
from toy import records

from experiments.entry import run_config
from glm_jax.train import loop
from glm_jax.train.checkpoint import load_weights, newest_step


def train(config, workdir: pathlib.Path) -> int:
    config = config.copy_and_resolve_references()
    config.mesh.data = 8
    return loop.train(run_config(config), workdir, config_json=config.to_json(), progress=False)


@pytest.fixture
def undisturbed(toy_config, tmp_path):
    workdir = tmp_path / "undisturbed"
    assert train(toy_config, workdir) == 6
    return workdir


def test_a_run_writes_what_the_design_says_and_resumes_bit_for_bit(toy_config, undisturbed, tmp_path, monkeypatch):
    for name in ("config.json", "metrics.jsonl", "tokenizer.json", "tensorboard", "checkpoints/6"):
        assert (undisturbed / name).exists(), name
    whole = records(undisturbed)
    assert [r["step"] for r in whole] == list(range(6))
    assert "held_out_bits_per_byte" in whole[-1] and len(whole[0]["max_violation"]) == 2

    # A kill after step 5, with checkpoint 4 the newest and metrics and a torn line beyond it.
    killed = tmp_path / "killed"
    shutil.copytree(undisturbed, killed)
    shutil.rmtree(killed / "checkpoints" / "6")
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    (killed / "metrics.jsonl").write_text("\n".join(lines[:5]) + '\n{"step": 5, "lo')
    half_written = killed / "checkpoints" / "6.orbax-checkpoint-tmp"
    half_written.mkdir()
    assert train(toy_config, killed) == 6
    assert records(killed) == whole
    assert not half_written.exists()
    assert np.array_equal(load_weights(killed)[1]["norm"]["weight"], load_weights(undisturbed)[1]["norm"]["weight"])

    # SIGTERM after the third step: saved there, and continued to the same end.
    stopped = tmp_path / "stopped"
    original = loop.Batches.next

    def interrupting(self, microbatches):
        if self.iterator.get_state()["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, microbatches)

    monkeypatch.setattr(loop.Batches, "next", interrupting)
    assert train(toy_config, stopped) == 3
    assert newest_step(stopped) == 3
    monkeypatch.undo()
    assert train(toy_config, stopped) == 6
    assert [r["loss"] for r in records(stopped)] == [r["loss"] for r in whole]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves its unread arrays behind
def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(toy_config, undisturbed):
    files = sorted((p for p in (undisturbed / "checkpoints" / "6").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    files[-1].write_bytes(files[-1].read_bytes()[:1000])
    before = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"checkpoint .*checkpoints/6 does not fit this config or is damaged"):
        train(toy_config, undisturbed)
    assert {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()} == before


def test_a_run_continues_only_with_its_own_model(toy_config, undisturbed):
    toy_config.model.expert_ffn_size = 24
    with pytest.raises(ValueError, match=r"was started with model.expert_ffn_size=16, not 24; use another --workdir"):
        train(toy_config, undisturbed)


def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_good_checkpoint(toy_config, tmp_path, monkeypatch):
    point = loop.Schedule.__getitem__

    def exploding(self, step):
        return dataclasses.replace(point(self, step), learning_rate=float("inf") if step == 2 else 1e-3)

    monkeypatch.setattr(loop.Schedule, "__getitem__", exploding)
    with pytest.raises(loop.NonFiniteLoss, match=r"at step 3 .*its batch is in .*nonfinite_step_3.*last good checkpoint is of step 2"):
        train(toy_config, tmp_path)
    assert newest_step(tmp_path) == 2
    batch = np.load(tmp_path / "nonfinite_step_3_process_0.npz")
    assert batch["tokens_0"].shape == (8, 64)
    assert [r["step"] for r in records(tmp_path)] == [0, 1, 2]


def test_a_batch_ramp_counts_its_microbatches_and_tokens(toy_config, tmp_path):
    toy_config.schedule.update(first_microbatches=1, last_microbatches=2, batch_ramp_tokens=1024, total_tokens=5 * 512)
    assert train(toy_config, tmp_path) == 3  # 1 + 2 + 2 microbatches of 512 tokens
    rows = records(tmp_path)
    assert [r["microbatches"] for r in rows] == [1, 2, 2]
    assert [r["tokens"] for r in rows] == [512, 1536, 2560]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.num_experts": 12}, "'experts' of size 12|num_experts_per_token|12"),
        ({"model.vocab_size": 304}, "the data's tokenizer has 3.. tokens, model.vocab_size=304"),
        ({"data.paths": ("/nowhere",)}, "/nowhere"),
        ({"data.batch_size": 80000, "data.virtual_shards": 80000}, "80000|80,000"),
        ({"model.remat": "fulll"}, "remat='fulll' is not one of none, full, dots, context. Did you mean 'full'"),
        ({"schedule.learning_rate": "fast"}, "learning_rate='fast'"),
        ({"data.sequence_length": 128}, "exceeds model.max_length=64"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_wrong_values_stop_before_anything_is_written(toy_config, tmp_path, change, message):
    for key, value in change.items():
        section, name = key.split(".")
        with toy_config[section].ignore_type():
            toy_config[section][name] = value
    if "model.num_experts" in change:
        toy_config.mesh.expert = 8
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        config = toy_config
        loop_mesh = {"data": 1} if "model.num_experts" in change else {"data": 8}
        config.mesh.update(loop_mesh)
        loop.train(run_config(config), workdir, config_json=config.to_json(), progress=False)
    assert not workdir.exists()


def test_an_unknown_key_names_the_nearest(toy_config):
    toy_config.model.hiden_size = 3
    with pytest.raises(ValueError, match=r"config.model key='hiden_size' is not one of .* Did you mean 'hidden_size'"):
        run_config(toy_config)
    del toy_config.model.hiden_size
    del toy_config.model.qk_norm
    with pytest.raises(ValueError, match="config.model lacks qk_norm"):
        run_config(toy_config)
