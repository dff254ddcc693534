"""Curation: a source becomes a dataset folder (tokenizer.json, ArrayRecord shards, manifest.json),
all of it or none.

The corpus is held in memory, so this serves corpora of a few gigabytes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from data.manifest import MANIFEST, Manifest, Shard, Split, describe_file, load_manifest
from data.shards import TokenizedDocument, token_dtype, write_shard
from data.sources import Document, file_documents, stdlib_documents
from data.tokenizer import Tokenizer, train_tokenizer

# name -> the documents of a CurateConfig
SOURCES = {
    "stdlib": lambda config: stdlib_documents(),
    "files": lambda config: file_documents(
        config.files_root, config.files_glob, config.code_suffixes
    ),
}
# Documents tokenized at a time: enough to keep all cores busy, few enough for a lively progress
# bar.
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    """What to curate. The same config on the same corpus gives the same dataset.

    source: a name of SOURCES: 'stdlib' (this interpreter's standard library) or 'files'.
    files_root, files_glob: folder and pattern of 'files'; unread by 'stdlib'.
    code_suffixes: names of 'files' that end so are code.
    held_out_fraction: share of the files, by a hash of seed and path, that training never sees.
    seed: of that hash, which is also the order of documents on disk.
    tokenizer_path: a tokenizer.json to use, or '' to train one on the train split.
    vocab_size: of a trained tokenizer, special tokens included.
    tokenizer_train_bytes: train the tokenizer on about so much text of the train split.
    max_document_bytes: longer files of the train split become several documents, cut at line ends;
    0: whole files. Packing
        reads a document in one go, so where a corpus is small against its longest files, batches
        would be all of a few files.
    train_shards, held_out_shards: number of files of each split.
    """

    source: str
    files_root: str
    files_glob: str
    code_suffixes: tuple[str, ...]
    held_out_fraction: float
    seed: int
    tokenizer_path: str
    vocab_size: int
    tokenizer_train_bytes: int
    max_document_bytes: int
    train_shards: int
    held_out_shards: int

    def __post_init__(self):
        object.__setattr__(self, "code_suffixes", tuple(self.code_suffixes))
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r}; valid: {list(SOURCES)}")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"held_out_fraction={self.held_out_fraction}; valid: above 0 and below 1"
            )
        for name in ("tokenizer_train_bytes", "train_shards", "held_out_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; valid: 1 or more")
        if self.max_document_bytes < 0:
            raise ValueError(
                f"max_document_bytes={self.max_document_bytes}; valid: 0 (whole files) or more"
            )


def curate(config: CurateConfig, output: str | pathlib.Path, progress: bool) -> Manifest:
    """Makes the dataset folder `output`, or returns the manifest of the one that is already there
    and matches.

    Everything is written to a folder beside `output` that is renamed at the end, so `output` is
    either finished or absent, after a kill or a full disk too. Raises ValueError, and changes
    nothing, where `output` holds anything else: another config's or another corpus's dataset, or
    files of another kind.
    """
    output = pathlib.Path(output).absolute()
    documents, skipped = _read_corpus(config)
    corpus_sha256 = _corpus_digest(documents)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _existing(config, corpus_sha256, output)
    train, held_out = _split(documents, config)
    with _folder_in_one_piece(output) as folder:
        tokenizer = _make_tokenizer(config, train)
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
        train = [
            piece for document in train for piece in _in_pieces(document, config.max_document_bytes)
        ]
        num_bytes = sum(len(document.content) for document in documents)
        with tqdm(
            total=num_bytes, unit="B", unit_scale=True, desc="tokenize", disable=not progress
        ) as bar:
            train_split = Split(
                _write_shards(folder, "train", train, config.train_shards, tokenizer, bar)
            )
            held_out_split = Split(
                _write_shards(folder, "held_out", held_out, config.held_out_shards, tokenizer, bar)
            )
        manifest = Manifest(
            config=_plain(config),
            corpus_sha256=corpus_sha256,
            skipped=skipped,
            vocab_size=tokenizer.vocab_size,
            tokenizer=describe_file(folder, "tokenizer.json"),
            train=train_split,
            held_out=held_out_split,
        )
        manifest.save(folder)
    return manifest


def _plain(config: CurateConfig) -> dict:
    """The config as JSON gives it back."""
    fields = dataclasses.asdict(config)
    return {**fields, "code_suffixes": list(config.code_suffixes)}


def _read_corpus(config: CurateConfig) -> tuple[list[Document], dict[str, int]]:
    """All documents that have text, in hash order, and the number of those left out by reason."""
    documents, skipped = [], {"empty": 0, "undecodable": 0}
    for document in SOURCES[config.source](config):
        if not document.content:
            skipped["empty"] += 1
        elif not document.is_text():
            skipped["undecodable"] += 1
        else:
            documents.append(document)
    # Hash order makes every prefix of a split a fair sample of it, for a short evaluation or for
    # the tokenizer.
    return (
        sorted(documents, key=lambda document: (_hash(config.seed, document.path), document.path)),
        skipped,
    )


def _hash(seed: int, path: str) -> float:
    """A number in [0, 1) that depends on the seed and the relative path alone."""
    digest = hashlib.sha256(f"{seed}:{path}".encode("utf-8", "surrogateescape")).digest()
    # 53 bits: what a double holds exactly, so that the result cannot round up to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _split(
    documents: Sequence[Document], config: CurateConfig
) -> tuple[list[Document], list[Document]]:
    """Train and held-out documents, by file. Raises ValueError where either has fewer documents
    than shards.
    """
    held_out = [d for d in documents if _hash(config.seed, d.path) < config.held_out_fraction]
    train = documents[len(held_out) :]
    for name, part, num_shards in (
        ("train", train, config.train_shards),
        ("held_out", held_out, config.held_out_shards),
    ):
        if len(part) < num_shards:
            raise ValueError(
                f"of {len(documents)} documents {len(part)} fall to {name}"
                f" (held_out_fraction={config.held_out_fraction}), fewer than its {num_shards}"
                " shards"
            )
    return list(train), held_out


def _in_pieces(document: Document, max_bytes: int) -> list[Document]:
    """The document, or pieces of at most max_bytes cut at line ends (a longer line is a piece of
    its own), as path:1, path:2, ...
    """
    if not max_bytes or len(document.content) <= max_bytes:
        return [document]
    pieces = [b""]
    for line in document.content.splitlines(keepends=True):
        if pieces[-1] and len(pieces[-1]) + len(line) > max_bytes:
            pieces.append(b"")
        pieces[-1] += line
    return [
        dataclasses.replace(document, path=f"{document.path}:{i}", content=piece)
        for i, piece in enumerate(pieces, 1)
    ]


def _corpus_digest(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(
            f"{document.path}\0{len(document.content)}\0".encode("utf-8", "surrogateescape")
        )
        digest.update(document.content)
    return digest.hexdigest()


def _existing(config: CurateConfig, corpus_sha256: str, output: pathlib.Path) -> Manifest:
    """The manifest of the finished dataset at `output` if it is what would be made, else
    ValueError.
    """
    if not (output / MANIFEST).is_file():
        raise ValueError(
            f"{str(output)!r} exists, is not empty and is no dataset; nothing was written"
        )
    manifest = load_manifest(output, verify_checksums=True)
    expected = _plain(config)
    differing = [
        key
        for key in sorted(expected | manifest.config)
        if expected.get(key) != manifest.config.get(key)
    ]
    if differing:
        changes = ", ".join(
            f"{key}: {manifest.config.get(key)!r} there, {expected.get(key)!r} now"
            for key in differing
        )
        raise ValueError(
            f"{str(output)!r} holds a dataset of another config ({changes}); choose another"
            " --output"
        )
    if config.tokenizer_path:
        digest = hashlib.sha256(
            Tokenizer.load(config.tokenizer_path).to_json().encode("utf-8")
        ).hexdigest()
        if digest != manifest.tokenizer.sha256:
            raise ValueError(
                f"{config.tokenizer_path!r} was another tokenizer when {str(output)!r} was made;"
                " choose another --output"
            )
    if manifest.corpus_sha256 != corpus_sha256:
        raise ValueError(
            f"{str(output)!r} holds a dataset of the same config but another corpus (this is Python"
            f" {platform.python_version()}; were files changed?); choose another --output"
        )
    return manifest


def _make_tokenizer(config: CurateConfig, train: Sequence[Document]) -> Tokenizer:
    if config.tokenizer_path:
        return Tokenizer.load(config.tokenizer_path)

    def sample() -> Iterator[str]:
        num_bytes = 0
        for document in train:
            if num_bytes >= config.tokenizer_train_bytes:
                return
            num_bytes += len(document.content)
            yield document.text()

    return train_tokenizer(sample(), config.vocab_size)


def _write_shards(
    folder: pathlib.Path,
    name: str,
    documents: list[Document],
    num_shards: int,
    tokenizer: Tokenizer,
    bar: tqdm,
) -> tuple[Shard, ...]:
    """Writes `documents` as `num_shards` files of nearly equal numbers of documents."""
    dtype = token_dtype(tokenizer.vocab_size)
    shards = []
    for index in range(num_shards):
        part = documents[
            index * len(documents) // num_shards : (index + 1) * len(documents) // num_shards
        ]
        file = f"{name}-{index:05d}-of-{num_shards:05d}.array_record"
        shards.append(write_shard(folder, file, list(_tokenize(part, tokenizer, bar)), dtype))
    return tuple(shards)


def _tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, bar: tqdm
) -> Iterator[TokenizedDocument]:
    for start in range(0, len(documents), _BATCH):
        batch = documents[start : start + _BATCH]
        for document, ids in zip(
            batch, tokenizer.encode_batch([d.text() for d in batch]), strict=True
        ):
            yield TokenizedDocument(
                document.path, len(document.content), document.is_code, np.asarray(ids, np.int32)
            )
            bar.update(len(document.content))


@contextlib.contextmanager
def _folder_in_one_piece(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A fresh folder beside `output` that becomes `output` when the block ends well and is removed
    when it raises.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=_partial_prefix(output), dir=output.parent))
    # Held as long as this process lives, so that a later run can tell a killed run's folder from a
    # running one's.
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        folder.chmod(0o755)  # mkdtemp's is 0o700
        for path in folder.iterdir():
            _sync(path)
        _sync(folder)
        try:
            os.rename(folder, output)  # takes the place of an empty folder, and of no other
        except OSError as error:
            raise ValueError(f"{str(output)!r} was made by another process meanwhile") from error
        _sync(output.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _partial_prefix(output: pathlib.Path) -> str:
    return f".{output.name}.partial-"


def _remove_abandoned(output: pathlib.Path) -> None:
    """Removes what killed runs left beside `output`."""
    for folder in output.parent.glob(_partial_prefix(output) + "*"):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder)
        finally:
            os.close(lock)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
