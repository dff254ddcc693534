"""Our arrays to a Hugging Face folder: export, streaming."""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from glm_jax.config import ModelConfig, check_choice
from glm_jax.hf.config import config_to_hf
from glm_jax.hf.names import (
    CHECKPOINT_TYPES,
    DISK_TYPES,
    END_OF_TEXT,
    INDEX,
    ROUTER_BIAS,
    WEIGHTS,
    Path,
    Tensor,
    abstract_parameters,
    flat,
    name_table,
)
from glm_jax.hf.reading import read_json


def hf_tensors(
    config: ModelConfig, state: nnx.State, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and host array of every tensor, one at a time, in the folder's order; `state` may live
    on devices.

    dtype: as of export_checkpoint. Also maps gradients, or anything else of the parameters'
    structure.
    """
    arrays = {path: _host_view(variable.get_value()) for path, variable in flat(state)}
    types = export_types(state, dtype)
    for t in name_table(config):
        value = np.asarray(arrays[t.path][t.index])
        yield t.name, np.ascontiguousarray(value.T if t.transposed else value, types[t.path])


def export_types(state: nnx.State, dtype: str) -> dict[Path, np.dtype]:
    """Type on disk of each parameter, by its path. Raises ValueError for a type that no folder of
    ours has.
    """
    check_choice("dtype", dtype, CHECKPOINT_TYPES)
    types = {}
    for path, variable in flat(state):
        ours = np.dtype(variable.get_value().dtype)
        if ours not in DISK_TYPES.values():
            raise ValueError(
                f"parameter {'.'.join(path)} has type {ours}, not"
                f" {' or '.join(map(str, DISK_TYPES.values()))}"
            )
        types[path] = (
            np.dtype(np.float32)
            if path[-1] == ROUTER_BIAS
            else ours
            if dtype == "stored"
            else np.dtype(dtype)
        )
    return types


def _host_view(array):
    """A view, no copy, where the array lies in host memory as a whole; else the array, to be
    fetched slice by slice.
    """
    in_host_memory = (
        isinstance(array, jax.Array)
        and {d.platform for d in array.devices()} == {"cpu"}
        and len(array.devices()) == 1
    )
    return np.asarray(array) if in_host_memory else array


def export_checkpoint(
    folder,
    config: ModelConfig,
    state: nnx.State,
    *,
    dtype: str,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer=None,
) -> pathlib.Path:
    """Writes a Hugging Face folder that transformers' Glm4MoeForCausalLM loads; holds one shard of
    it at a time.

    Args:
      folder: must not exist, or be empty. It appears when it is complete.
      state: the model's, as nnx.state(GLM) gives it; arrays of JAX or NumPy.
      dtype: 'stored': the types that the arrays have; 'float32' or 'bfloat16' converts. Router
        biases are float32 in any case.
      max_shard_bytes: a larger tensor gets a shard for itself.
      tokenizer: a tokenizer.json to take along, or None.

    Raises:
      ValueError: for a folder that is not empty, or a state that does not fit the config. OSError
        where writing fails; then nothing remains.
    """
    types = export_types(state, dtype)
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists and is not an empty folder: nothing was written")
    settings = config_to_hf(config, main_type(state, types))
    _check_state(config, state)
    shards = plan_shards(name_table(config), types, max_shard_bytes)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        _write_shards(partial, shards, hf_tensors(config, state, dtype))
        if tokenizer is not None:
            settings |= _write_tokenizer(partial, pathlib.Path(tokenizer), config.max_length)
        _write_json(partial / "config.json", settings)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def main_type(state: nnx.State, types: Mapping[Path, np.dtype]) -> str:
    """The type that most of the parameters have: config.json knows one alone."""
    sizes = collections.Counter()
    for path, variable in flat(state):
        sizes[types[path].name] += math.prod(variable.get_value().shape)
    return max(sizes, key=lambda name: sizes[name])


def plan_shards(
    table: list[Tensor], types: Mapping[Path, np.dtype], max_shard_bytes: int
) -> list[dict[str, int]]:
    """Names and bytes of each shard's tensors, in the table's order."""
    shards = [{}]
    for t in table:
        size = math.prod(t.shape) * types[t.path].itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][t.name] = size
    return shards


def _write_shards(
    folder: pathlib.Path, shards: list[dict[str, int]], tensors: Iterator[tuple[str, np.ndarray]]
):
    files = (
        [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) > 1
        else [WEIGHTS]
    )
    for file, shard in zip(files, shards, strict=True):
        try:
            safetensors.numpy.save_file(
                dict(next(tensors) for _ in shard), folder / file, metadata={"format": "pt"}
            )
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {folder / file}: {error}") from error
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        }
        _write_json(
            folder / INDEX,
            {
                "metadata": {"total_size": sum(sum(s.values()) for s in shards)},
                "weight_map": weight_map,
            },
        )


def _check_state(config: ModelConfig, state: nnx.State):
    found = {path: tuple(v.get_value().shape) for path, v in flat(state)}
    expected = {path: tuple(v.get_value().shape) for path, v in abstract_parameters(config).items()}
    for path in found.keys() | expected.keys():
        if found.get(path) != expected.get(path):
            raise ValueError(
                f"parameter {'.'.join(path)} has shape {found.get(path)}, the config makes it"
                f" {expected.get(path)}"
            )


def _write_tokenizer(
    folder: pathlib.Path, tokenizer: pathlib.Path, max_length: int
) -> dict[str, int]:
    """Copies tokenizer.json, adds what AutoTokenizer needs, and returns the token ids for
    config.json.
    """
    ids = {token["content"]: token["id"] for token in read_json(tokenizer)["added_tokens"]}
    if END_OF_TEXT not in ids:
        raise ValueError(f"{tokenizer} has no token {END_OF_TEXT!r}")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    tokens = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, **tokens},
    )
    return {f"{name}_id": ids[token] for name, token in tokens.items()}


def _write_json(file: pathlib.Path, content: dict):
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
