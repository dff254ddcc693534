"""A dataset folder is whole, true to its source and reproducible, or it is not there."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

import data.curation
from data.curation import CurateConfig, curate
from data.manifest import load_manifest
from data.pipeline import BatchIterator
from data.shards import ShardSource, token_dtype
from data.sources import stdlib_documents
from data.tokenizer import Tokenizer, train_tokenizer

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def documents_of(folder):
    manifest = load_manifest(folder, verify_checksums=True)
    return {
        split: [source[i] for i in range(len(source))]
        for split in ("train", "held_out")
        for source in [ShardSource(folder, manifest, split)]
    }


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def test_every_decodable_file_is_in_one_split_with_its_exact_bytes(dataset, corpus):
    splits = documents_of(dataset)
    found = {d.path: d for split in splits.values() for d in split}
    files = {p.relative_to(corpus).as_posix() for p in corpus.rglob("*") if p.is_file()}
    assert set(found) == files - {"empty.py", "latin.py"}
    assert sum(map(len, splits.values())) == len(found)
    tokenizer = Tokenizer.load(dataset)
    for path, document in found.items():
        content = (corpus / path).read_bytes()
        assert tokenizer.decode(document.ids).encode() == content
        assert document.num_bytes == len(content) and document.is_code == path.endswith(".py")


def test_long_train_files_are_cut_at_line_ends_and_held_out_ones_stay_whole(
    dataset, curate_config, tmp_path
):
    whole = documents_of(dataset)
    limit = 200
    curate(
        dataclasses.replace(curate_config, max_document_bytes=limit),
        tmp_path / "out",
        progress=False,
    )
    cut = documents_of(tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    texts = {}
    for piece in cut["train"]:
        text = tokenizer.decode(piece.ids)
        assert len(text.encode()) == piece.num_bytes
        assert piece.num_bytes <= limit or "\n" not in text[:-1]
        name, *number = piece.path.split(":")
        texts.setdefault(name, {})[int(number[0]) if number else 1] = text
    joined = {
        name: "".join(text for _, text in sorted(pieces.items())) for name, pieces in texts.items()
    }
    assert joined == {d.path: tokenizer.decode(d.ids) for d in whole["train"]}
    assert max(len(pieces) for pieces in texts.values()) > 2
    assert [d.path for d in cut["held_out"]] == [d.path for d in whole["held_out"]]


def test_manifest_counts_what_is_there(dataset):
    manifest = load_manifest(dataset, verify_checksums=True)
    for name, documents in documents_of(dataset).items():
        split = manifest.split(name)
        assert split.num_documents == len(documents)
        assert split.num_tokens == sum(len(d.ids) for d in documents)
        assert split.num_bytes == sum(d.num_bytes for d in documents)
    assert manifest.skipped == {"empty": 1, "undecodable": 1}
    assert manifest.vocab_size == Tokenizer.load(dataset).vocab_size
    assert {p.name for p in dataset.iterdir()} == {
        "manifest.json", "tokenizer.json",
        *(s.file.name for n in ("train", "held_out") for s in manifest.split(n).shards)
    }  # fmt: skip


def test_split_is_by_path_not_by_content_or_place(dataset, corpus, curate_config, tmp_path):
    shutil.copytree(corpus, tmp_path / "moved")
    for path in (tmp_path / "moved" / "pkg").iterdir():
        path.write_bytes(path.read_bytes() + b"# changed\n")
    config = dataclasses.replace(curate_config, files_root=str(tmp_path / "moved"))
    curate(config, tmp_path / "out", progress=False)
    held_out = [
        {d.path for d in documents_of(folder)["held_out"]} for folder in (dataset, tmp_path / "out")
    ]
    assert held_out[0] == held_out[1]
    curate(dataclasses.replace(config, seed=1), tmp_path / "reseeded", progress=False)
    assert {d.path for d in documents_of(tmp_path / "reseeded")["held_out"]} != held_out[0]


def test_tokenizer_sees_the_train_split_alone(curate_config, corpus, dataset, tmp_path):
    shutil.copytree(corpus, tmp_path / "root")
    for document in documents_of(dataset)["held_out"]:
        (tmp_path / "root" / document.path).write_text("zq zq zq zq " * 500)
    config = dataclasses.replace(curate_config, files_root=str(tmp_path / "root"))
    curate(config, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        dataset / "tokenizer.json"
    ).read_bytes()


def test_tokenizer_is_trained_on_the_first_documents_up_to_the_asked_bytes(
    curate_config, corpus, dataset, tmp_path
):
    curate(
        dataclasses.replace(curate_config, tokenizer_train_bytes=1000),
        tmp_path / "out",
        progress=False,
    )
    texts, num_bytes = [], 0
    for document in documents_of(dataset)["train"]:
        if num_bytes < 1000:
            texts.append((corpus / document.path).read_bytes().decode())
            num_bytes += document.num_bytes
    assert (tmp_path / "out" / "tokenizer.json").read_text("utf-8") == train_tokenizer(
        texts, 500
    ).to_json()


def test_curating_again_gives_the_same_bytes(curate_config, dataset, tmp_path):
    curate(curate_config, tmp_path / "again", progress=False)
    assert digests(tmp_path / "again") == digests(dataset)


def test_matching_dataset_is_left_alone_and_any_other_is_refused(curate_config, dataset, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert curate(curate_config, folder, progress=False) == load_manifest(dataset, True)
    with pytest.raises(ValueError, match="another config.*vocab_size: 500 there, 400 now"):
        curate(dataclasses.replace(curate_config, vocab_size=400), folder, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is no dataset"):
        curate(curate_config, tmp_path / "notes", progress=False)
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_changed_tokenizer_is_refused(curate_config, dataset, tmp_path):
    shutil.copy(dataset / "tokenizer.json", tmp_path / "given.json")
    config = dataclasses.replace(curate_config, tokenizer_path=str(tmp_path / "given.json"))
    made = curate(config, tmp_path / "out", progress=False)
    assert curate(config, tmp_path / "out", progress=False) == made
    smaller = dataclasses.replace(curate_config, vocab_size=400)
    curate(smaller, tmp_path / "smaller", progress=False)
    shutil.copy(tmp_path / "smaller" / "tokenizer.json", tmp_path / "given.json")
    with pytest.raises(ValueError, match="given.json.*was another"):
        curate(config, tmp_path / "out", progress=False)


def test_changed_corpus_is_refused(curate_config, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "root")
    config = dataclasses.replace(curate_config, files_root=str(tmp_path / "root"))
    curate(config, tmp_path / "out", progress=False)
    (tmp_path / "root" / "pkg" / "file0.py").write_text("changed")
    with pytest.raises(ValueError, match="another corpus"):
        curate(config, tmp_path / "out", progress=False)


def test_failure_while_writing_leaves_nothing(curate_config, tmp_path):
    """The kernel refuses to let any file grow beyond a limit, as a full disk would, in a process of
    its own.
    """
    script = (
        "import json, resource, signal, sys\nfrom data.curation import CurateConfig,"
        " curate\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nlimit ="
        " int(sys.argv[2])\nresource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\ntry:\n   "
        f" curate(CurateConfig(**json.loads(sys.argv[1])), {str(tmp_path / 'out')!r},"
        ' progress=False)\nexcept OSError as error:\n    print("OSError", error)\n'
    )
    argument = json.dumps(dataclasses.asdict(curate_config))
    command = [sys.executable, "-c", script, argument]
    # At the first limit the tokenizer does not fit, at the second only a shard (64 KiB at least)
    # does not.
    for limit, name in ((2_000, ""), (50_000, "array_record")):
        done = subprocess.run(
            [*command, str(limit)], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.stdout.startswith("OSError") and name in done.stdout and done.returncode == 0, (
            done.stderr
        )
        assert list(tmp_path.iterdir()) == []


def test_kill_leaves_no_dataset_and_the_next_run_clears_up(curate_config, dataset, tmp_path):
    script = (
        "import sys, time, json, data.curation as c\nreal = c.write_shard\ndef slow(*args):\n   "
        ' real(*args); print("shard", flush=True); time.sleep(60)\nc.write_shard ='
        f" slow\nc.curate(c.CurateConfig(**json.loads(sys.argv[1])), {str(tmp_path / 'out')!r},"
        " progress=False)\n"
    )
    argument = json.dumps(dataclasses.asdict(curate_config))
    process = subprocess.Popen(
        [sys.executable, "-c", script, argument], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"shard\n"
    # While it runs, its folder is its own: a second run to the same place neither removes nor uses
    # it.
    running = {path.name for path in tmp_path.iterdir()}
    assert len(running) == 1
    data.curation._remove_abandoned(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == running
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists() and {path.name for path in tmp_path.iterdir()} == running
    curate(curate_config, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digests(tmp_path / "out") == digests(dataset)


@pytest.mark.parametrize(
    "name",
    ["train-00001-of-00003.array_record", "tokenizer.json", "held_out-00000-of-00002.array_record"],
)
def test_damaged_or_missing_file_is_named(dataset, data_config, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    config = dataclasses.replace(data_config, paths=(str(folder),))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*damaged: SHA-256"):
        BatchIterator(config, 0, 1)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=f"{name}.*damaged: {len(content) - 1} bytes.*{len(content)}"
    ):
        BatchIterator(dataclasses.replace(config, verify_checksums=False), 0, 1)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}.*missing"):
        BatchIterator(config, 0, 1)


def test_missing_wrong_or_damaged_manifest_is_named(dataset, tmp_path):
    with pytest.raises(ValueError, match="no dataset at.*experiments.curate"):
        load_manifest(tmp_path / "nowhere", True)
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    file = folder / "manifest.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps({**tree, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99.*reads 1"):
        load_manifest(folder, True)
    for damage in (
        file.read_text()[:-20],
        "[]",
        json.dumps({k: v for k, v in tree.items() if k != "train"}),
    ):
        file.write_text(damage)
        with pytest.raises(ValueError, match="manifest.json.*damaged"):
            load_manifest(folder, True)
    file.unlink()
    with pytest.raises(ValueError, match="no dataset"):
        load_manifest(folder, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "web"}, "source='web'.*stdlib.*files"),
        ({"held_out_fraction": 1.0}, "held_out_fraction=1.0"),
        ({"train_shards": 0}, "train_shards=0"),
        ({"vocab_size": 100}, "vocab_size=100.*292"),
        ({"files_root": "/nowhere"}, "'/nowhere'"),
        ({"files_glob": "*.rs"}, r"'\*.rs'"),
        ({"tokenizer_path": "/nowhere"}, "no tokenizer at '/nowhere'"),
        ({"held_out_fraction": 0.001}, "0 fall to held_out"),
        ({"train_shards": 1000}, "fall to train.*1000 shards"),
    ],
)
def test_config_errors_name_the_value(curate_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        curate(dataclasses.replace(curate_config, **changes), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_stdlib_is_the_interpreters_own_python_files():
    documents = list(stdlib_documents())
    paths = [document.path for document in documents]
    assert paths == sorted(paths) and len(set(paths)) == len(paths)
    assert {"dataclasses.py", "json/decoder.py"} <= set(paths) and len(paths) > 500
    assert all(document.is_code for document in documents)
    assert not any(
        "site-packages" in path or "__pycache__" in path or path.startswith("/") for path in paths
    )


def test_ids_take_two_bytes_where_they_fit():
    assert token_dtype(65536).itemsize == 2 and token_dtype(65537).itemsize == 4


def test_command_makes_a_dataset_and_explains_a_bad_one(corpus, tmp_path):
    def run(*overrides):
        command = [
            sys.executable,
            "-m",
            "experiments.curate",
            "--config=configs/curate.py",
            f"--output={tmp_path / 'out'}",
        ]
        return subprocess.run(
            [*command, *overrides], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )

    small = [f"--config.files_root={corpus}", "--config.source=files", "--config.vocab_size=400"]
    small += ["--config.held_out_fraction=0.2"]
    done = run(*small)
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "out", True).vocab_size == 400
    assert "vocabulary 400" in done.stdout
    refused = run(*small, "--config.seed=5")
    assert (
        refused.returncode != 0
        and "Traceback" not in refused.stderr
        and "seed: 0 there, 5 now" in refused.stderr
    )
    unknown = run("--config.vocab_sise=5")
    assert (
        unknown.returncode != 0
        and unknown.stderr.count("\n") == 1
        and '"vocab_size" instead of "vocab_sise"' in unknown.stderr
    )
    wrong_type = run("--config.vocab_size=many")
    assert wrong_type.returncode != 0 and "many" in wrong_type.stderr


def test_curate_config_from_a_config_file_equals_one_from_code():
    from configs.curate import get_config

    config = CurateConfig(**get_config().to_dict())
    assert config.source == "stdlib" and isinstance(config.code_suffixes, tuple)
