"""manifest.json: what a dataset folder holds. Written last, so a folder without one is not a
dataset.
"""

import dataclasses
import hashlib
import json
import pathlib

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class File:
    """A file of the dataset: name relative to its folder, size in bytes, SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file. num_tokens counts text tokens (no start or end tokens), num_bytes the
    UTF-8 text.
    """

    file: File
    num_documents: int
    num_tokens: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of `train` or `held_out`, in order."""

    shards: tuple[Shard, ...]

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A finished dataset.

    config: curation's settings as plain values. corpus_sha256: over the paths and contents of all
    documents read.
    skipped: documents left out, by reason. vocab_size: special tokens included; a model's must be
    at least this.
    """

    config: dict
    corpus_sha256: str
    skipped: dict[str, int]
    vocab_size: int
    tokenizer: File
    train: Split
    held_out: Split

    def split(self, name: str) -> Split:
        """The split of that name, or ValueError with the valid ones."""
        if name not in SPLITS:
            raise ValueError(f"split {name!r}; valid: {list(SPLITS)}")
        return getattr(self, name)

    def save(self, folder: pathlib.Path) -> None:
        """Writes manifest.json; totals are repeated in it for the reader's eye."""
        tree = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        for name in SPLITS:
            split = self.split(name)
            totals = {
                key: getattr(split, key) for key in ("num_documents", "num_tokens", "num_bytes")
            }
            tree[name] = {**totals, **tree[name]}
        (folder / MANIFEST).write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


def describe_file(folder: pathlib.Path, name: str) -> File:
    """Size and digest of a file as it lies on disk."""
    path = folder / name
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(name, path.stat().st_size, digest)


def load_manifest(path: str | pathlib.Path, verify_checksums: bool) -> Manifest:
    """Opens the dataset folder `path` and checks that its files are there.

    Sizes and the tokenizer's digest are always compared, every shard's digest with
    verify_checksums. Raises ValueError naming the folder or file: not a dataset, another format
    version, a missing or damaged file.
    """
    folder = pathlib.Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"no dataset at {str(folder)!r} ({MANIFEST} is missing); make one with: python -m"
            f" experiments.curate --config=configs/curate.py --output={folder}"
        )
    try:
        tree = json.loads(file.read_text("utf-8"))
        version = tree["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{str(file)!r} has format_version {version!r}; this code reads {FORMAT_VERSION}"
            )
        manifest = _parse(tree)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from error
    _check(folder, manifest.tokenizer, checksum=True)
    for name in SPLITS:
        for shard in manifest.split(name).shards:
            _check(folder, shard.file, checksum=verify_checksums)
    return manifest


def _parse(tree: dict) -> Manifest:
    def split(name):
        shards = tree[name]["shards"]
        return Split(tuple(Shard(**{**shard, "file": File(**shard["file"])}) for shard in shards))

    fields = ("config", "corpus_sha256", "skipped", "vocab_size")
    return Manifest(
        **{name: tree[name] for name in fields},
        tokenizer=File(**tree["tokenizer"]),
        train=split("train"),
        held_out=split("held_out"),
    )


def _check(folder: pathlib.Path, file: File, checksum: bool) -> None:
    path = folder / file.name
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing, though {MANIFEST} names it")
    size = path.stat().st_size
    if size != file.size:
        raise ValueError(f"{str(path)!r} is damaged: {size} bytes, {MANIFEST} says {file.size}")
    if checksum:
        digest = describe_file(folder, file.name).sha256
        if digest != file.sha256:
            raise ValueError(
                f"{str(path)!r} is damaged: SHA-256 {digest}, {MANIFEST} says {file.sha256}"
            )
