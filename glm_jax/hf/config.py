"""config.json of a Hugging Face folder <-> ModelConfig, one table for both directions."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from glm_jax.config import ModelConfig, check_choice, from_mapping

MODEL_TYPE = "glm4_moe"
# ModelConfig -> config.json, one to one; RoPE's two keys apart, see rope_from_hf.
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "num_mtp_layers": "num_nextn_predict_layers",
    "dense_ffn_size": "intermediate_size",
    "expert_ffn_size": "moe_intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "qk_norm": "use_qk_norm",
    "attention_bias": "attention_bias",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "num_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "num_expert_groups": "n_group",
    "num_groups_per_token": "topk_group",
    "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
    "init_std": "initializer_range",
}
ROPE_KEYS = {"rope_theta": "rope_theta", "rotary_fraction": "partial_rotary_factor"}
# What transformers' Glm4MoeConfig takes for a key that config.json lacks, or where it is null; the
# same values here.
DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "use_qk_norm": False,
    "attention_bias": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
# transformers' second names
ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
# How the model is run, which is nothing that a folder says: the caller's to choose.
RUNTIME_FIELDS = tuple(
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name not in {*CONFIG_KEYS, *ROPE_KEYS, "mtp_embeddings"}
)
# What config.json may say, but only so: this model has nothing else.
CONFIG_CONSTANTS = {"hidden_act": "silu", "attention_dropout": 0.0, "tie_word_embeddings": False}


def config_to_hf(config: ModelConfig, dtype: str) -> dict:
    """config.json for weights of type `dtype`. RoPE is written twice: as transformers 5 reads it,
    and as older readers do.
    """
    if not config.num_shared_experts:
        raise ValueError(
            "num_shared_experts=0: transformers' glm4_moe always has a shared expert, such a model"
            " cannot be exported"
        )
    rope = {theirs: getattr(config, ours) for ours, theirs in ROPE_KEYS.items()}
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        **{theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()},
        **CONFIG_CONSTANTS,
        **rope,
        "rope_parameters": {"rope_type": "default", **rope},
        "use_cache": True,
    }


def config_from_hf(hf: Mapping, ours: Mapping) -> ModelConfig:
    """ModelConfig of a config.json; `ours`: RUNTIME_FIELDS and mtp_embeddings, which it does not
    know.

    A key that is missing or null has transformers' default; a warning names them.

    Raises:
      ValueError: for another model type, or a feature that this model does not have, naming it.
    """
    if "model_type" not in hf:
        raise ValueError("config.json lacks model_type")
    check_choice("config.json: model_type", hf["model_type"], (MODEL_TYPE,))
    hf = {key: value for key, value in hf.items() if value is not None}
    for key, value in CONFIG_CONSTANTS.items():
        if key in hf and hf[key] != value:
            raise ValueError(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")
    check_quantization(hf.get("quantization_config"))
    hf = {ALIASES[key]: value for key, value in hf.items() if key in ALIASES} | hf
    rope = rope_from_hf(hf)
    absent = [key for key in CONFIG_KEYS.values() if key not in hf and key in DEFAULTS]
    if absent:
        logging.warning(
            "config.json lacks %s: transformers' defaults are taken",
            ", ".join(f"{key} ({DEFAULTS[key]})" for key in absent),
        )
    hf = DEFAULTS | hf
    # as glm4_moe computes it
    hf.setdefault("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    fields = {name: hf[key] for name, key in CONFIG_KEYS.items()} | rope | dict(ours)
    floats = [f.name for f in dataclasses.fields(ModelConfig) if f.type == "float"]
    return from_mapping(
        ModelConfig, fields | {name: float(fields[name]) for name in floats}, "model config"
    )


def check_quantization(quantization: Mapping | None):
    """Weights may be FP8 with scales: compressed-tensors, as the released GLM-4.5-FP8 folders, or
    `fp8` with blocks.

    What scale a value has follows from the shapes of the tensors themselves. Raises ValueError for
    anything else.
    """
    if quantization is None:
        return
    check_choice(
        "config.json: quantization_config.quant_method",
        quantization.get("quant_method", ""),
        ("compressed-tensors", "fp8"),
    )
    for name, group in quantization.get("config_groups", {}).items():
        weights = group.get("weights") or {}
        if (weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True)) != (
            "float",
            8,
            True,
        ):
            raise ValueError(
                f"config.json: quantization_config.config_groups.{name}.weights={weights!r} is not"
                " symmetric 8-bit float"
            )


def rope_from_hf(hf: Mapping) -> dict[str, float]:
    """rope_theta and rotary_fraction, from `rope_parameters` (transformers 5), `rope_scaling` or
    the top level (before it).
    """
    place = next((key for key in ("rope_parameters", "rope_scaling") if hf.get(key)), None)
    nested = hf[place] if place else {}
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"config.json: {place}={nested!r}: rope_type={kind!r} is not supported, only 'default'"
        )
    found = {}
    for ours, key in ROPE_KEYS.items():
        values = {float(where[key]) for where in (nested, hf) if where.get(key) is not None} or {
            DEFAULTS[key]
        }
        if len(values) > 1:
            raise ValueError(
                f"config.json: {key} must be given, and only one value of it; found"
                f" {sorted(values)}"
            )
        found[ours] = values.pop()
    return found
