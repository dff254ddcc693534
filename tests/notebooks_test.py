"""The notebooks run from top to bottom on a tiny run, and are committed without outputs. And
`glm_jax.load`, which they start with.
"""

import json
import pathlib
import subprocess
import sys

import chatting
import jax
import nbformat
import numpy as np
import pytest
import toy
from flax import nnx
from nbclient import NotebookClient

from data.tokenizer import Tokenizer
from experiments import entry
from glm_jax import hf, load
from glm_jax.rl import loop as rl_loop
from glm_jax.sharding import make_mesh
from glm_jax.train.start import load_weights

NOTEBOOKS = sorted(pathlib.Path("experiments/notebooks").glob("*.ipynb"))


OVERRIDES = {f"model.{key}": value for key, value in toy.MODEL.items()} | {
    "model.num_layers": 3, "data.batch_size": 4, "data.virtual_shards": 4,
    "data.sequence_length": 64, "schedule.total_tokens": 6 * 256,
    "schedule.decay_tokens": 6 * 256, "schedule.warmup_tokens": 256, "loop.checkpoint_every": 4,
    "loop.eval_every": 2,
    "loop.eval_batches": 1, "loop.sample_every": 1000, "loop.sample_length": 8,
    "loop.sample_prompts": ("def f(",), "loop.fim_prompts": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    """Work directory of a run of 6 steps, made in a process of its own: one device, as on a
    laptop.
    """
    workdir = tmp_path_factory.mktemp("run")
    flags = [
        f"--config.{key}={value}"
        for key, value in (OVERRIDES | {"data.paths": (str(corpus_folder),)}).items()
    ]
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        "--noprogress",
        *flags,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def rl_run(corpus_folder, tmp_path_factory):
    """Work directory of 6 steps of reinforcement learning, on one device, from a toy that chats."""
    from configs import rl_math_tiny

    folder = tmp_path_factory.mktemp("rl")
    chatting.fine_tune(
        folder / "sft",
        [chatting.write_guesses(folder / "guesses.jsonl")],
        corpus_folder,
        start="",
        steps=80,
    )
    train = toy.write_tasks(folder / "train.jsonl", 0, chatting.NUM_TASKS)
    held_out = toy.write_tasks(folder / "held_out.jsonl", chatting.NUM_TASKS, 3)
    config = rl_math_tiny.get_config()
    config.update_from_flattened_dict(toy.RL | {
        "start.workdir": str(folder / "sft"), "tasks.train": (train,),
        "tasks.held_out": (held_out,), "engine.context": 48,
        "control.length_stages": ((0, 16), (3, 24)), "grpo.updates_per_step": 2, "loop.steps": 6,
        "loop.eval_every": 2,
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        rl, start = entry.rl_config(config)
        rl_loop.train(rl, start, folder / "run", config_json=config.to_json(), progress=False)
    return folder / "run"


# Notebook -> the run that it opens, figures at least, what its last output says.
SHOWN = {
    "checkpoint": ("run", 6, "def read(path):"),
    "rl": ("rl_run", 8, "BEST: reward 1 (correct 1, answered 1), completed"),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, request, monkeypatch):
    workdir, figures, last = SHOWN[path.stem]
    monkeypatch.setenv("GLM_WORKDIR", str(request.getfixturevalue(workdir)))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [
        o.text
        for o in outputs
        if o.output_type == "stream" and o.name == "stderr" and "Warning" in o.text
    ]
    assert sum("image/png" in o["data"] for o in outputs if "data" in o) >= figures
    assert last in outputs[-1].text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(
        not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code"
    )


def test_load_opens_a_run_and_what_it_exports(run, tmp_path):
    model, tokenizer = load(run)
    config, params, _ = load_weights(run)
    assert tokenizer.decode(tokenizer.encode("def größe(): pass")) == "def größe(): pass"
    np.testing.assert_array_equal(model.lm_head.weight[...], params["lm_head"]["weight"])
    assert model.config == config

    state = jax.tree.map(np.asarray, nnx.state(model))
    folder = hf.export_checkpoint(
        tmp_path / "hf", config, state, dtype="float32", tokenizer=run / "tokenizer.json"
    )
    imported, same_tokenizer = load(folder)
    tokens = np.arange(1, 13, dtype=np.int32)[None]
    np.testing.assert_allclose(imported(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert isinstance(same_tokenizer, Tokenizer) and same_tokenizer.to_json() == tokenizer.to_json()
    (folder / "tokenizer.json").unlink()
    assert load(folder)[1] is None


def test_load_refuses_anything_else_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hello": 1}))
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*neither"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm4_moe"}))
    with pytest.raises(ValueError, match=f"model.safetensors.*{tmp_path.name}"):
        load(tmp_path)
