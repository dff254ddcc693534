"""ArrayRecord shards: one record a document, read by index.

A record is the length of a header (4 bytes, little-endian), the header as JSON (path, num_bytes,
is_code) and the token ids, little-endian, 2 bytes each where the vocabulary allows it, else 4.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import grain
import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs
)

from data.manifest import Manifest, Shard, describe_file

# One record a chunk: grain reads by index, and a larger group would decompress neighbours for
# nothing.
_WRITER_OPTIONS = "group_size:1,zstd:3"


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
    """ids: int32 [n], the text's tokens alone. num_bytes: length of the text in UTF-8."""

    path: str
    num_bytes: int
    is_code: bool
    ids: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """The stored type of ids below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def to_record(document: TokenizedDocument, dtype: np.dtype) -> bytes:
    """The bytes of one record."""
    fields = {"path": document.path, "num_bytes": document.num_bytes, "is_code": document.is_code}
    header = json.dumps(fields).encode("utf-8")
    return len(header).to_bytes(4, "little") + header + document.ids.astype(dtype).tobytes()


def from_record(record: bytes, dtype: np.dtype) -> TokenizedDocument:
    """The document of one record."""
    start = 4 + int.from_bytes(record[:4], "little")
    return TokenizedDocument(
        **json.loads(record[4:start]),
        ids=np.frombuffer(record, dtype, offset=start).astype(np.int32),
    )


def write_shard(
    folder: pathlib.Path, name: str, documents: Sequence[TokenizedDocument], dtype: np.dtype
) -> Shard:
    """Writes `documents` to one file and reads its length back. Raises OSError where the disk did
    not take them all.
    """
    records = [to_record(document, dtype) for document in documents]
    try:
        writer = array_record_module.ArrayRecordWriter(str(folder / name), _WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        reader = array_record_module.ArrayRecordReader(str(folder / name))
        stored = reader.num_records()
        reader.close()
    except RuntimeError as error:  # array_record's form of any failure of the file system
        raise OSError(str(error)) from error
    if stored != len(documents):
        raise OSError(
            f"{str(folder / name)!r} holds {stored} of {len(documents)} documents after writing; is"
            " the disk full?"
        )
    return Shard(
        file=describe_file(folder, name),
        num_documents=len(documents),
        num_tokens=sum(len(document.ids) for document in documents),
        num_bytes=sum(document.num_bytes for document in documents),
    )


@dataclasses.dataclass
class _WholeFile:
    """A shard as grain's reader asks for it; with the number of records known, it opens no file
    before the first read.
    """

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class ShardSource:
    """Random access to the documents of one split, across its shards: a source for
    `grain.MapDataset`.
    """

    def __init__(self, folder: str | pathlib.Path, manifest: Manifest, split: str):
        files = [
            _WholeFile(
                str(pathlib.Path(folder, shard.file.name)), shard.num_documents, shard.num_documents
            )
            for shard in manifest.split(split).shards
        ]
        self._records = grain.sources.ArrayRecordDataSource(files)
        self._num_documents = sum(file.take for file in files)
        self._dtype = token_dtype(manifest.vocab_size)

    def __len__(self) -> int:
        return self._num_documents

    def __getitem__(self, index: int) -> TokenizedDocument:
        return from_record(self._records[index], self._dtype)
