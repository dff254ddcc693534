"""Hugging Face folders to our arrays: import, streaming."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from glm_jax.config import ModelConfig, check_choice
from glm_jax.hf.config import config_from_hf
from glm_jax.hf.names import (
    CHECKPOINT_TYPES,
    DISK_TYPES,
    FP8,
    IGNORED,
    INDEX,
    SCALES,
    WEIGHTS,
    Tensor,
    abstract_parameters,
    name_table,
)


class Folder:
    """A Hugging Face folder of safetensors, read slice by slice; files are mapped, not loaded.

    Raises ValueError for a folder without weights, and for damaged or missing files, naming the
    file.
    """

    def __init__(self, folder: str | os.PathLike):
        self.root = pathlib.Path(folder)
        self.config = read_json(self.root / "config.json")
        if (self.root / INDEX).is_file():
            index = read_json(self.root / INDEX)
            if "weight_map" not in index:
                raise ValueError(f"{self.root / INDEX} is damaged: no weight_map")
            self.file_of = {name: self.root / file for name, file in index["weight_map"].items()}
        else:
            self.file_of = dict.fromkeys(_open(self.root / WEIGHTS).keys(), self.root / WEIGHTS)
        self.files = {file: _open(file) for file in set(self.file_of.values())}
        names = {file: set(opened.keys()) for file, opened in self.files.items()}
        for name, file in self.file_of.items():
            if name not in names[file]:
                raise ValueError(f"{file} lacks {name!r}, which {INDEX} says is in it")

        self.file_of = {
            name: file for name, file in self.file_of.items() if not name.endswith(IGNORED)
        }
        scales = {
            name.rpartition(".")[0] + ".weight": name
            for name in self.file_of
            if name.endswith(SCALES)
        }
        self.scale_of = {name: scale for name, scale in scales.items() if name in self.file_of}

    def tensor(self, name: str):
        """Lazy slice of a tensor on disk."""
        return self.files[self.file_of[name]].get_slice(name)

    def num_mtp_layers(self, config: ModelConfig) -> int:
        """0 where config.json or the weights have no MTP block (transformers' own save_pretrained
        drops its weights).

        Weights of a block that config.json switches off (num_nextn_predict_layers=0) are ignored
        from here on.
        """
        block = {
            name for name in self.file_of if name.startswith(f"model.layers.{config.num_layers}.")
        }
        if config.num_mtp_layers and not block:
            logging.warning(
                "%s: config.json has num_nextn_predict_layers=1, but the weights have no MTP block",
                self.root,
            )
        if block and not config.num_mtp_layers:
            logging.warning(
                "%s: config.json has no MTP block (num_nextn_predict_layers=0): its weights are"
                " ignored",
                self.root,
            )
            self.file_of = {name: file for name, file in self.file_of.items() if name not in block}
        return min(config.num_mtp_layers, len(block))

    def mtp_embeddings(self, config: ModelConfig) -> str:
        """'shared' where the MTP block has no embedding and head, 'copied' where they equal the
        trunk's, else 'own'.
        """
        table = name_table(dataclasses.replace(config, mtp_embeddings="copied"))
        originals = {t.path: t.name for t in table if not t.copy}
        pairs = [(originals[t.path], t.name) for t in table if t.copy]
        if not any(copy in self.file_of for _, copy in pairs):
            return "shared"
        present = all(name in self.file_of for pair in pairs for name in pair)
        return "copied" if present and all(self.equal(*pair) for pair in pairs) else "own"

    def equal(self, first: str, second: str, rows: int = 4096) -> bool:
        """Whether two matrices have the same bytes; compared some rows at a time."""
        a, b = self.tensor(first), self.tensor(second)
        if (a.get_shape(), a.get_dtype()) != (b.get_shape(), b.get_dtype()):
            return False
        parts = [
            slice(i, min(i + rows, a.get_shape()[0])) for i in range(0, a.get_shape()[0], rows)
        ]
        return all(a[part].tobytes() == b[part].tobytes() for part in parts)

    def check(self, table: list[Tensor]):
        """Raises ValueError where names, shapes or types differ from the table's. Reads headers
        only.
        """
        expected = {t.name for t in table}
        expected |= {self.scale_of[name] for name in expected & self.scale_of.keys()}
        missing, unexpected = expected - self.file_of.keys(), self.file_of.keys() - expected
        if missing or unexpected:
            wrong = [
                f"{what} {_few(names)}"
                for what, names in (("lacks", missing), ("has unexpected", unexpected))
                if names
            ]
            raise ValueError(f"{self.root} {' and '.join(wrong)}")
        for t in table:
            tensor, valid = self.tensor(t.name), tuple(DISK_TYPES)
            if t.name in self.scale_of:
                valid = (FP8,)
                self.scale_block(t.name)
            if tuple(tensor.get_shape()) != t.shape:
                raise ValueError(
                    f"{self.root}: {t.name} has shape {tuple(tensor.get_shape())}, config.json"
                    f" makes it {t.shape}"
                )
            if tensor.get_dtype() not in valid:
                raise ValueError(
                    f"{self.root}: {t.name} has type {tensor.get_dtype()}, not {' or '.join(valid)}"
                )

    def scale_block(self, name: str) -> tuple[int, int]:
        """Rows and columns of an FP8 matrix that share a scale: a row each (compressed-tensors'
        channels), blocks, or all.

        Blocks are square unless they span a dimension; the last one may be partial.
        """
        matrix, scale = self.tensor(name).get_shape(), self.tensor(self.scale_of[name]).get_shape()
        scale = (*scale, 1, 1)[:2]
        blocks = (self.config.get("quantization_config") or {}).get("weight_block_size") or [
            128,
            128,
        ]
        for rows, columns in ((1, matrix[1]), tuple(matrix), tuple(blocks)):
            if (-(-matrix[0] // rows), -(-matrix[1] // columns)) == scale:
                return rows, columns
        raise ValueError(
            f"{self.root}: {self.scale_of[name]} has shape {scale}, which scales no rows or"
            f" {blocks} blocks of {matrix}"
        )

    def values(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """tensor[part]; FP8 in float32, times its scales."""
        if name not in self.scale_of:
            return self.tensor(name)[part]
        block = self.scale_block(name)
        scale = self.tensor(self.scale_of[name])[...].astype(np.float32)
        scale = scale.reshape((*scale.shape, 1, 1)[:2])
        rows, columns = (np.arange(s.start, s.stop) // b for s, b in zip(part, block, strict=True))
        return (
            _fp8_matrix(self.file_of[name], name)[part].astype(np.float32)
            * scale[np.ix_(rows, columns)]
        )

    def read(
        self,
        tensors: list[Tensor],
        shape: tuple[int, ...],
        dtype: np.dtype,
        part: tuple[slice, ...],
    ) -> np.ndarray:
        """array[part] of our array of this shape, whose tensors these are; only what the part needs
        is read.
        """
        ranges = [range(*s.indices(n)) for s, n in zip(part, shape, strict=True)]
        out = np.empty([len(r) for r in ranges], dtype)
        for t in tensors:
            stacked = len(t.index)
            if all(i in r for i, r in zip(t.index, ranges, strict=False)):
                inner = [slice(r.start, r.stop) for r in ranges[stacked:]]
                values = self.values(t.name, tuple(inner[::-1] if t.transposed else inner))
                out[tuple(i - r.start for i, r in zip(t.index, ranges, strict=False))] = (
                    values.T if t.transposed else values
                )
        return out


def import_checkpoint(
    folder, runtime: Mapping, *, dtype: str = "float32", shardings: Mapping | None = None
) -> tuple[ModelConfig, nnx.State]:
    """Reads a Hugging Face folder, one of our arrays at a time.

    Args:
      folder: config.json, and model.safetensors or shards with their index; float32, bfloat16,
        float16 or a mixture of them; matrices also FP8 with scales of rows (compressed-tensors, as
        released) or blocks, which are read as what they stand for.
      runtime: value of each of hf_config.RUNTIME_FIELDS, the fields of ModelConfig that no folder
        knows.
      dtype: 'float32', 'bfloat16', or 'stored': each array as it is on disk, without loss (FP8 with
        its scales, and an array whose layers or experts have several types: float32). Router biases
        are float32 in any case.
      shardings: path -> jax.sharding.Sharding of every parameter. Each device's share is read
        straight from the files, so a host never holds more than its devices' shares. Without it the
        arrays are NumPy's.

    Returns:
      The config, `mtp_embeddings` and `num_mtp_layers` set by the tensors found, and the model's
      state; see abstract_model.

    Raises:
      ValueError: naming the key, tensor or file that is missing, damaged, or does not fit.
    """
    check_choice("dtype", dtype, CHECKPOINT_TYPES)
    files = Folder(folder)
    config = config_from_hf(files.config, {**runtime, "mtp_embeddings": "shared"})
    config = dataclasses.replace(config, num_mtp_layers=files.num_mtp_layers(config))
    config = dataclasses.replace(config, mtp_embeddings=files.mtp_embeddings(config))
    table = name_table(config)
    files.check(table)
    tensors = collections.defaultdict(list)
    for t in table:
        if not t.copy:
            tensors[t.path].append(t)
    flat = []
    for path, variable in abstract_parameters(config).items():
        shape = variable.get_value().shape
        disk = {files.tensor(t.name).get_dtype() for t in tensors[path]}
        stored = (
            DISK_TYPES[disk.pop()]
            if len(disk) == 1 and disk < DISK_TYPES.keys()
            else np.dtype(np.float32)
        )
        array_type = stored if dtype == "stored" or tensors[path][0].float32 else np.dtype(dtype)

        def read(part, path=path, shape=shape, array_type=array_type):
            return files.read(tensors[path], shape, array_type, part)

        value = (
            read((slice(None),) * len(shape))
            if shardings is None
            else jax.make_array_from_callback(shape, shardings[path], read)
        )
        flat.append((path, variable.replace(value)))
    return config, nnx.from_flat_state(flat)


def read_json(file: pathlib.Path) -> dict:
    if not file.is_file():
        raise ValueError(f"no {file.name} in {str(file.parent)!r}: not a Hugging Face folder")
    try:
        # some editors begin a file with a byte order mark
        return json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _open(file: pathlib.Path):
    if not file.is_file():
        raise ValueError(f"no {file.name} in {str(file.parent)!r}")
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _fp8_matrix(file: pathlib.Path, name: str) -> np.ndarray:
    """A float8 tensor mapped from its file; safetensors' NumPy side knows the type only by a name
    that NumPy does not have.
    """
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))[name]
    start, _ = header["data_offsets"]
    return np.memmap(file, np.uint8, "r", 8 + size + start, tuple(header["shape"])).view(
        ml_dtypes.float8_e4m3fn
    )


def _few(names, count: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
