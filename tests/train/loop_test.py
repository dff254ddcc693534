"""The loop: resume, signals, bad losses, records; and what must stop before anything is written."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import records

from experiments.entry import run_config
from glm_jax.run.checkpoints import finished_steps, newest_step
from glm_jax.run.recorder import NonFinite, check_finite
from glm_jax.sharding import make_mesh
from glm_jax.train import loop
from glm_jax.train.start import load_weights
from glm_jax.train.state import TrainSpec
from glm_jax.train.step import update


def train(config, workdir: pathlib.Path) -> int:
    config = config.copy_and_resolve_references()
    config.mesh.data = 8
    return loop.train(run_config(config), workdir, config_json=config.to_json(), progress=False)


@pytest.fixture(scope="module")
def whole_run(corpus_folder, tmp_path_factory):
    """One run of all six steps for all tests of this file."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train(toy.small_config(corpus_folder), workdir) == 6
    return workdir


@pytest.fixture
def undisturbed(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "undisturbed")


def test_a_run_writes_what_the_design_says_and_resumes_bit_for_bit(
    toy_config, undisturbed, tmp_path, monkeypatch
):
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
    assert np.array_equal(
        load_weights(killed)[1]["norm"]["weight"], load_weights(undisturbed)[1]["norm"]["weight"]
    )

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


# Orbax leaves its unread arrays behind
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(toy_config, undisturbed):
    files = sorted(
        (p for p in (undisturbed / "checkpoints" / "6").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    files[-1].write_bytes(files[-1].read_bytes()[:1000])
    before = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match=r"checkpoint .*checkpoints/6 does not fit this config or is damaged"
    ):
        train(toy_config, undisturbed)
    assert {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()} == before


def test_a_run_continues_only_with_its_own_model(toy_config, undisturbed):
    toy_config.model.expert_ffn_size = 24
    with pytest.raises(
        ValueError,
        match=r"was started with model.expert_ffn_size=16, not 24; use another --workdir",
    ):
        train(toy_config, undisturbed)


def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_good_checkpoint(
    toy_config, tmp_path, monkeypatch
):
    point = loop.Schedule.__getitem__

    def exploding(self, step):
        return dataclasses.replace(
            point(self, step), learning_rate=float("inf") if step == 2 else 1e-3
        )

    monkeypatch.setattr(loop.Schedule, "__getitem__", exploding)
    message = (
        r"update_rms/.* is .* at step 2; its batch is in .*nonfinite_step_2.*last good checkpoint"
        r" is of step 2"
    )
    with pytest.raises(NonFinite, match=message):
        train(toy_config, tmp_path)
    assert newest_step(tmp_path) == 2
    batch = np.load(tmp_path / "nonfinite_step_2_process_0.npz")
    assert batch["tokens_0"].shape == (8, 64)
    assert [r["step"] for r in records(tmp_path)] == [0, 1]


def test_an_update_that_overflows_is_never_saved(toy_config, tmp_path):
    """The loss of the step is finite: it was computed before the update."""
    toy_config.schedule.update(learning_rate=1e38, warmup_tokens=1)
    toy_config.loop.update(checkpoint_every=1, keep_checkpoints=1)
    with pytest.raises(NonFinite, match=r"is (inf|nan) at step 0; .*there is no checkpoint yet"):
        train(toy_config, tmp_path)
    assert finished_steps(tmp_path) == []


def test_one_bad_element_of_a_gradient_is_seen_in_the_metrics(toy_config, tmp_path):
    config = run_config(toy_config)
    spec = TrainSpec.create(config.model, config.optimizer)
    state = jax.jit(spec.initial_state)(jax.random.key(0))
    with jax.set_mesh(make_mesh(dataclasses.replace(config.mesh, data=1), jax.devices()[:1])):
        step = jax.jit(lambda grads: update(spec, state, grads, None, 1e-3, 1e-3)[1])
        good = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), state.params)
        check = functools.partial(
            check_finite, step=0, workdir=tmp_path, batch=dict, good=lambda: None
        )
        check(step(good))
        for place, value in itertools.product(
            ("embed_tokens", "lm_head", "norm", "moe_layers"), (np.inf, -np.inf, np.nan)
        ):
            leaves, treedef = jax.tree.flatten(good[place])
            leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].set(value)
            with pytest.raises(NonFinite, match="grad_norm is"):
                check(step(good | {place: treedef.unflatten(leaves)}))


def test_a_held_out_loss_that_is_not_finite_stops_before_the_save(
    toy_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        loop.Evaluator, "__call__", lambda self, state: {"held_out_loss": float("nan")}
    )
    toy_config.loop.update(eval_every=4, checkpoint_every=2, keep_checkpoints=1)
    with pytest.raises(
        NonFinite, match="held_out_loss is nan at step 3; .*last good checkpoint is of step 2"
    ):
        train(toy_config, tmp_path)
    assert finished_steps(tmp_path) == [2]


def test_a_run_that_goes_on_with_other_microbatches_counts_from_its_own_tokens(
    toy_config, tmp_path
):
    toy_config.schedule.update(total_tokens=2048)
    assert train(toy_config, tmp_path) == 4
    toy_config.schedule.update(total_tokens=4096, first_microbatches=2, last_microbatches=2)
    assert train(toy_config, tmp_path) == 6
    rows = records(tmp_path)
    assert [r["tokens"] for r in rows] == [512, 1024, 1536, 2048, 3072, 4096]
    assert [r["microbatches"] for r in rows] == [1, 1, 1, 1, 2, 2]
    toy_config.schedule.update(total_tokens=4000)
    with pytest.raises(
        ValueError,
        match="schedule.total_tokens=4000 is less than the 4096 tokens that the run has seen",
    ):
        train(toy_config, tmp_path)
    toy_config.schedule.update(total_tokens=8192)
    toy_config.loop.seed = 7
    with pytest.raises(ValueError, match="was started with loop.seed=0, not 7"):
        train(toy_config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["schedule"]["total_tokens"] == 4096


def test_steps_that_are_not_finished_are_passed_over_and_named(toy_config, undisturbed, caplog):
    """Neither resuming nor reading takes them, and they do not push a good one out of those
    kept.
    """
    for step, names in {
        "7": (),
        "9": ("_CHECKPOINT_METADATA",),
        "11": ("state/d/0", "data/metadata"),
    }.items():
        folder = undisturbed / "checkpoints" / step
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
    assert newest_step(undisturbed) == 6
    for step in (7, 9, 11):
        assert f"checkpoints/{step} is not finished: it is passed over" in caplog.text
        with pytest.raises(
            ValueError, match=f"holds no finished checkpoint of step {step}; it has 4, 6"
        ):
            load_weights(undisturbed, step)
    toy_config.schedule.update(total_tokens=8 * 512)
    assert train(toy_config, undisturbed) == 8
    assert finished_steps(undisturbed) == [6, 8]
    assert (undisturbed / "checkpoints" / "9.unfinished").is_dir()


def test_what_other_libraries_log_or_raise_in_threads_is_not_for_the_terminal():
    """A full disk made Orbax and TensorBoard print 1,500 lines around the one that said so."""
    program = """if True:
        import logging, threading
        from absl import logging as absl_logging
        from experiments import entry

        def main():
            absl_logging.error("from Orbax")
            logging.getLogger("asyncio").error("from asyncio")
            logging.getLogger("glm_jax.train").warning("our warning")
            thread = threading.Thread(target=lambda: 1 / 0)
            thread.start()
            thread.join()
            raise OSError("cannot write /full/disk")

        entry.run(main)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120
    )
    first, last = done.stderr.splitlines()
    assert (
        done.returncode == 1 and "our warning" in first and last == "error: cannot write /full/disk"
    )


def test_a_batch_ramp_counts_its_microbatches_and_tokens(toy_config, tmp_path):
    toy_config.schedule.update(
        first_microbatches=1, last_microbatches=2, batch_ramp_tokens=1024, total_tokens=5 * 512
    )
    assert train(toy_config, tmp_path) == 3  # 1 + 2 + 2 microbatches of 512 tokens
    rows = records(tmp_path)
    assert [r["microbatches"] for r in rows] == [1, 2, 2]
    assert [r["tokens"] for r in rows] == [512, 1536, 2560]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.num_experts": 12},
            r"experts\.down_proj: 'experts' of size 12 cannot be split over 'expert', 8",
        ),
        ({"model.vocab_size": 304}, "the data's tokenizer has 3.. tokens, model.vocab_size=304"),
        ({"data.paths": ("/nowhere",)}, r"no dataset at '/nowhere' \(manifest\.json is missing\)"),
        (
            {"data.batch_size": 80000, "data.virtual_shards": 80000},
            "fewer than one batch of 80000 x 64 = 5120000",
        ),
        (
            {"model.remat": "fulll"},
            "remat='fulll' is not one of none, full, dots, context. Did you mean 'full'",
        ),
        ({"schedule.learning_rate": "fast"}, "learning_rate='fast'"),
        ({"optimizer.adam_eps": 0.0}, "optimizer.adam_eps=0.0 must be positive"),
        ({"optimizer.adam_b2": 1.0}, r"optimizer.adam_b2=1.0 must be in \[0, 1\)"),
        ({"optimizer.max_grad_norm": -1.0}, "optimizer.max_grad_norm=-1.0 must be at least 0"),
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


@pytest.mark.parametrize(("every", "sampled"), [(0, []), (2, [2, 4, 5]), (9, [5])])
def test_samples_are_written_every_so_often_and_at_the_end(
    toy_config, tmp_path, monkeypatch, every, sampled
):
    monkeypatch.setattr(loop, "Sampler", lambda *_: lambda state: f"after {state.step}")
    monkeypatch.setattr(loop, "one_process", lambda *_: None)
    toy_config.loop.sample_every = every
    toy_config.schedule.total_tokens = 5 * 512
    assert train(toy_config, tmp_path) == 5
    written = {path.name: path.read_text() for path in tmp_path.glob("samples/*")}
    assert written == {f"{step:07d}.txt": f"after {step}" for step in sampled}


def test_samples_on_several_processes_are_refused(toy_config, tmp_path, monkeypatch):
    """They are drawn from weights that no process has whole."""
    devices = np.array([types.SimpleNamespace(process_index=i) for i in range(2)])
    mesh = types.SimpleNamespace(devices=devices)
    monkeypatch.setattr(loop, "make_mesh", lambda config: mesh)
    toy_config.loop.sample_every = 5
    with pytest.raises(ValueError, match="loop.sample_every=5: sampling runs in one process"):
        train(toy_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_names_the_nearest(toy_config):
    toy_config.model.hiden_size = 3
    with pytest.raises(
        ValueError,
        match=r"config.model key='hiden_size' is not one of .* Did you mean 'hidden_size'",
    ):
        run_config(toy_config)
    del toy_config.model.hiden_size
    del toy_config.model.qk_norm
    with pytest.raises(ValueError, match="config.model lacks qk_norm"):
        run_config(toy_config)
