"""experiments.convert: a folder through a work directory and back has the same bytes; errors are
one line.
"""

from __future__ import annotations

import subprocess
import sys

import jax
import pytest
import tokenizers
import torch
import transformers

from experiments import convert
from glm_jax import hf
from glm_jax.hf.config import RUNTIME_FIELDS
from glm_jax.train.start import load_weights
from tests.model.oracle import RUNTIME, random_state, tiny_config

CONFIG = tiny_config(mtp_embeddings="own")


@pytest.fixture(params=["float32", "bfloat16"])
def folder(tmp_path, request):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens([hf.END_OF_TEXT])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return hf.export_checkpoint(
        tmp_path / "theirs",
        CONFIG,
        random_state(CONFIG),
        dtype=request.param,
        tokenizer=tmp_path / "tokenizer.json",
    )


def test_folder_through_a_work_directory_comes_back_byte_for_byte(folder, tmp_path):
    convert.from_hf(folder, tmp_path / "run", RUNTIME)
    assert load_weights(tmp_path / "run")[0] == CONFIG
    convert.to_hf(
        tmp_path / "run", tmp_path / "again", step=None, dtype="stored", max_shard_bytes=10**9
    )
    files = sorted(f.name for f in folder.iterdir())
    assert files == sorted(f.name for f in (tmp_path / "again").iterdir())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_weights_are_read_as_float32_and_converted_where_asked(folder, tmp_path):
    convert.from_hf(folder, tmp_path / "run", RUNTIME)
    types = {x.dtype for x in jax.tree.leaves(load_weights(tmp_path / "run")[1:])}
    assert types == {jax.numpy.dtype("float32")}
    assert (
        convert.to_hf(
            tmp_path / "run", tmp_path / "again", step=None, dtype="bfloat16", max_shard_bytes=10**9
        )
        == "bfloat16"
    )
    model = transformers.Glm4MoeForCausalLM.from_pretrained(tmp_path / "again")
    assert model.dtype == torch.bfloat16


def test_a_byte_order_mark_does_not_travel_with_the_tokenizer(folder, tmp_path):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text, "utf-8-sig")
    convert.from_hf(folder, tmp_path / "run", RUNTIME)
    assert (tmp_path / "run" / "tokenizer.json").read_text("utf-8") == text


def test_a_work_directory_in_use_is_left_alone(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="run' exists and is not an empty folder"):
        convert.from_hf(folder, tmp_path / "run", RUNTIME)
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["config.json"]


def test_flags_cover_the_fields_that_no_folder_knows():
    assert convert.RUNTIME.keys() == set(RUNTIME_FIELDS)


def test_a_bad_folder_is_one_line_and_exit_code_1(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.convert",
        f"--from_hf={tmp_path}",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(lines) == 1 and "no config.json in" in lines[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
