"""experiments.convert: a folder through a work directory and back has the same bytes; errors are one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tokenizers

from experiments import convert
from glm_jax import hf
from glm_jax.hf_config import RUNTIME_FIELDS
from glm_jax.train.checkpoint import load_weights
from tests.model.oracle import RUNTIME, random_state, tiny_config

CONFIG = tiny_config(mtp_embeddings="own")


@pytest.fixture
def folder(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens([hf.END_OF_TEXT])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return hf.export_checkpoint(tmp_path / "theirs", CONFIG, random_state(CONFIG), dtype="float32", tokenizer=tmp_path / "tokenizer.json")


def test_folder_through_a_work_directory_comes_back_byte_for_byte(folder, tmp_path):
    convert.from_hf(folder, tmp_path / "run", RUNTIME)
    assert load_weights(tmp_path / "run")[0] == CONFIG
    convert.to_hf(tmp_path / "run", tmp_path / "again", step=None, dtype="float32", max_shard_bytes=10**9)
    files = sorted(f.name for f in folder.iterdir())
    assert files == sorted(f.name for f in (tmp_path / "again").iterdir())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_work_directory_in_use_is_left_alone(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="run' exists and is not an empty folder"):
        convert.from_hf(folder, tmp_path / "run", RUNTIME)
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["config.json"]


def test_flags_cover_the_fields_that_no_folder_knows():
    assert convert.RUNTIME.keys() == set(RUNTIME_FIELDS)


def test_a_bad_folder_is_one_line_and_exit_code_1(tmp_path):
    command = [sys.executable, "-m", "experiments.convert", f"--from_hf={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(lines) == 1 and "no config.json in" in lines[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
