"""A tiny corpus, curated once: 60 Python files and 12 text files, some longer than a row, some not
ASCII.
"""

import numpy as np
import pytest

from data.curation import CurateConfig, curate
from data.pipeline import DataConfig

CURATE = dict(
    source="files",
    files_glob="**/*",
    code_suffixes=(".py",),
    held_out_fraction=0.2,
    seed=0,
    tokenizer_path="",
    vocab_size=500,
    tokenizer_train_bytes=1_000_000,
    max_document_bytes=0,
    train_shards=3,
    held_out_shards=2,
)

DATA = dict(
    weights=(1.0,),
    batch_size=8,
    sequence_length=32,
    packing="concat_then_split",
    num_packing_bins=4,
    virtual_shards=4,
    seed=3,
    fim_rate=0.5,
    fim_psm_fraction=0.5,
    fim_level="character",
    epochs=0,
    verify_checksums=True,
)


def write_corpus(root, seed, most_lines):
    rng = np.random.default_rng(seed)
    words = [
        "def",
        "return",
        "self.x",
        "größe",
        "変数",
        "😀",
        "<|user|>",
        "/nothink",
        "a + b",
        "    ",
        "\r\n",
        "[1]",
        "\t# ok",
    ]
    (root / "pkg").mkdir(parents=True)
    for number in range(72):
        lines = [
            " ".join(rng.choice(words, rng.integers(1, 7)))
            for _ in range(rng.integers(1, most_lines))
        ]
        suffix = "py" if number < 60 else "txt"
        (root / "pkg" / f"file{number}.{suffix}").write_bytes(
            ("\n".join(lines) + f"\n# {number}").encode()
        )
    (root / "empty.py").write_bytes(b"")
    (root / "latin.py").write_bytes(b"# \xe9t\xe9\n")


@pytest.fixture(scope="session")
def make_corpus():
    """write_corpus(root, seed, most_lines)."""
    return write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder of source files."""
    root = tmp_path_factory.mktemp("corpus") / "root"
    write_corpus(root, seed=0, most_lines=25)
    return root


@pytest.fixture(scope="session")
def curate_config(corpus):
    return CurateConfig(files_root=str(corpus), **CURATE)


@pytest.fixture(scope="session")
def dataset(curate_config, tmp_path_factory):
    """Folder of the curated corpus; tests do not change it."""
    output = tmp_path_factory.mktemp("dataset") / "tiny"
    curate(curate_config, output, progress=False)
    return output


@pytest.fixture(scope="session")
def data_config(dataset):
    return DataConfig(paths=(str(dataset),), **DATA)
