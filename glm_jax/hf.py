"""The Hugging Face border: one table of names, both directions, streaming.

Tensor names, shapes and config keys are those of `glm4_moe` in transformers 5 and of the released
GLM-4.5 folders (docs/glm45.md, "Checkpoints"); the MTP block follows the last layer, under index
num_layers. The table derives from the abstract model, so a parameter that model/ declares is a
parameter that is read and written here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from glm_jax.config import DTYPES, ModelConfig, check_choice
from glm_jax.hf_config import config_from_hf, config_to_hf
from glm_jax.model.layers import axes_of
from glm_jax.model.transformer import abstract_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
END_OF_TEXT = "<|endoftext|>"  # also what GLM-4.5 pads with
DISK_TYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
FP8 = "F8_E4M3"
CHECKPOINT_TYPES = (*DTYPES, "stored")
ROUTER_BIAS = "e_score_correction_bias"  # float32 in our arrays and in what we write
# Buffers that older versions of transformers saved; the present one ignores them, too.
IGNORED = "rotary_emb.inv_freq"
# beside an FP8 `weight`; both are multiplied with, whatever the second's name says
SCALES = ("weight_scale", "weight_scale_inv")
Path = tuple[str, ...]

# Our path -> Hugging Face name. {layer} counts over the whole model; within a block the names are
# the same but for experts.
PREFIXES = {
    "embed_tokens.": "model.embed_tokens.",
    "dense_layers.": "model.layers.{layer}.",
    "moe_layers.": "model.layers.{layer}.",
    "mtp.block.": "model.layers.{layer}.",
    "mtp.": "model.layers.{layer}.",
    "norm.": "model.norm.",
    "lm_head.": "lm_head.",
}
EXPERTS = "mlp.experts."  # ours: gate_proj [E, D, F]; on disk: {expert}.gate_proj.weight [F, D]
# 'copied' folders carry the trunk's embedding and head a second time, with the MTP block.
COPIES = {
    ("embed_tokens", "weight"): "embed_tokens.weight",
    ("lm_head", "weight"): "shared_head.head.weight",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor on disk: its name and shape there, and the place `array[index]` of our array
    `path` that holds it.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    index: tuple[int, ...]  # () or (layer,), (expert,), (layer, expert) of the stacked array
    transposed: bool
    float32: bool  # ours and what we write, whatever the others' type
    copy: bool  # of a tensor that stands in the table by itself
    layer: int  # only for the order in the folder


@functools.lru_cache(maxsize=8)
def abstract_parameters(config: ModelConfig) -> Mapping[Path, nnx.Variable]:
    """Every parameter and router bias by its path, with shapes in place of arrays. Not to be
    changed: others get the same.
    """
    return dict(nnx.to_flat_state(nnx.state(abstract_model(config))))


def name_table(config: ModelConfig) -> list[Tensor]:
    """Every tensor of the Hugging Face folder, in its order: embedding, layers, MTP block, norm,
    head.
    """
    table = []
    for path, variable in abstract_parameters(config).items():
        table += _tensors_of(config, path, variable)
        if config.num_mtp_layers and config.mtp_embeddings == "copied" and path in COPIES:
            name = f"model.layers.{config.num_layers}.{COPIES[path]}"
            table.append(
                dataclasses.replace(table[-1], name=name, copy=True, layer=config.num_layers)
            )
    return sorted(table, key=lambda t: t.layer)


def _tensors_of(config: ModelConfig, path: Path, variable: nnx.Variable) -> Iterator[Tensor]:
    ours = ".".join(path)
    prefix = next(p for p in PREFIXES if ours.startswith(p))
    name = PREFIXES[prefix] + ours.removeprefix(prefix).replace(EXPERTS, EXPERTS + "{expert}.")
    name += ".weight" if EXPERTS in ours else ""
    layers = {"embed_tokens.": -1, "dense_layers.": 0, "moe_layers.": config.num_dense_layers}
    first_layer = layers.get(prefix, config.num_layers + (not prefix.startswith("mtp.")))
    shape, axes = variable.get_value().shape, axes_of(variable)
    stacked = sum(a in ("layers", "experts") for a in axes)
    matrix = shape[stacked:]
    transposed = len(shape) - stacked == 2 and axes[stacked:] != ("vocab", "embed")
    for index in np.ndindex(shape[:stacked]):
        at = dict(zip(axes, index, strict=False))
        layer, expert = first_layer + at.get("layers", 0), at.get("experts")
        yield Tensor(
            name=name.format(layer=layer, expert=expert),
            shape=matrix[::-1] if transposed else matrix, path=path, index=index,
            transposed=transposed, float32=path[-1] == ROUTER_BIAS, copy=False, layer=layer,
        )  # fmt: skip


def parameter_count(config: ModelConfig) -> dict[str, int]:
    """Counts from the abstract model, nothing allocated; router biases are state and only count as
    `stored`.

    Returns:
      layers: dense and MoE layers and the final norm, the count that GLM-4.5's report gives (355B,
        106B with MTP);
      layers_with_mtp: and the MTP block; both without embeddings and heads, wherever they are.
      active: of `layers`, what one token passes through.
      total: everything that the optimizer sees.
      stored: elements in the Hugging Face folder, copies and router biases included.
    """
    count = collections.Counter()
    for path, variable in abstract_parameters(config).items():
        size = math.prod(variable.get_value().shape)
        if not isinstance(variable, nnx.Param):
            continue
        count["total"] += size
        if "vocab" in axes_of(variable):
            continue
        count["layers_with_mtp"] += size
        if path[0] != "mtp":
            count["layers"] += size
            count["active"] += (
                size * config.num_experts_per_token // config.num_experts
                if "experts" in axes_of(variable)
                else size
            )
    count["stored"] = sum(math.prod(t.shape) for t in name_table(config))
    return dict(count)


# --- reading ---


class Folder:
    """A Hugging Face folder of safetensors, read slice by slice; files are mapped, not loaded.

    Raises ValueError for a folder without weights, and for damaged or missing files, naming the
    file.
    """

    def __init__(self, folder: str | os.PathLike):
        self.root = pathlib.Path(folder)
        self.config = _read_json(self.root / "config.json")
        if (self.root / INDEX).is_file():
            index = _read_json(self.root / INDEX)
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
        for block in ((1, matrix[1]), tuple(matrix), tuple(blocks)):
            if tuple(-(-size // b) for size, b in zip(matrix, block, strict=True)) == scale:
                return block
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


def _read_json(file: pathlib.Path) -> dict:
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


# --- writing ---


def hf_tensors(
    config: ModelConfig, state: nnx.State, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and host array of every tensor, one at a time, in the folder's order; `state` may live
    on devices.

    dtype: as of export_checkpoint. Also maps gradients, or anything else of the parameters'
    structure.
    """
    arrays = {path: _host_view(variable.get_value()) for path, variable in nnx.to_flat_state(state)}
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
    for path, variable in nnx.to_flat_state(state):
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
        where writing fails; then nothing is left behind.
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
    for path, variable in nnx.to_flat_state(state):
        sizes[types[path].name] += math.prod(variable.get_value().shape)
    return max(sizes, key=sizes.get)


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
    found = {path: tuple(v.get_value().shape) for path, v in nnx.to_flat_state(state)}
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
    ids = {token["content"]: token["id"] for token in _read_json(tokenizer)["added_tokens"]}
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
