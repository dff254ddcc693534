"""The table of Hugging Face names, which import and export derive from.

Tensor names, shapes and config keys are those of `glm4_moe` in transformers 5 and of the released
GLM-4.5 folders (docs/glm45.md, "Checkpoints"); the MTP block follows the last layer, under index
num_layers. The table derives from the abstract model, so a parameter that model/ declares is a
parameter that is read and written here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
from flax import nnx

from glm_jax.config import DTYPES, ModelConfig
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
COPIES: dict[Path, str] = {
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
    return dict(flat(nnx.state(abstract_model(config))))


def flat(state: nnx.State) -> list[tuple[Path, nnx.Variable]]:
    """Every variable of a state by its path."""
    return [(tuple(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]


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
