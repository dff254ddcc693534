"""HF -> ours -> HF: the same names and the same bytes; and what a folder that does not fit is
answered.
"""

from __future__ import annotations

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from glm_jax import hf
from glm_jax.hf import config as hf_config
from glm_jax.model.layers import axes_of
from tests.model.oracle import RUNTIME, random_state, tiny_config

CONFIG = tiny_config(mtp_embeddings="copied")
MTP = f"model.layers.{CONFIG.num_layers}."


def tensors_of(folder) -> dict[str, np.ndarray]:
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def assert_same_bytes(first: dict[str, np.ndarray], second: dict[str, np.ndarray]):
    assert first.keys() == second.keys()
    for name, a in first.items():
        b = second[name]
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


def write_like_hugging_face(folder, kind: str, dtype, seed: int = 0) -> dict[str, np.ndarray]:
    """A folder made without our name table: names typed from docs/glm45.md, "Checkpoints",
    random bytes, two files and an index.
    """
    c, rng = CONFIG, np.random.default_rng(seed)
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (64, 32),
    }
    for i in range(5):
        p = f"model.layers.{i}."
        names |= {f"{p}{n}.weight": (32,) for n in ("input_layernorm", "post_attention_layernorm")}
        names |= {f"{p}self_attn.{n}_norm.weight": (16,) for n in "qk"}
        names |= {
            f"{p}self_attn.q_proj.weight": (64, 32),
            f"{p}self_attn.q_proj.bias": (64,),
            f"{p}self_attn.o_proj.weight": (32, 64),
        }
        names |= {f"{p}self_attn.{n}_proj.weight": (32, 32) for n in "kv"} | {
            f"{p}self_attn.{n}_proj.bias": (32,) for n in "kv"
        }
        ffns = (
            {"mlp.": 48}
            if i < 2
            else {f"mlp.experts.{j}.": 24 for j in range(8)} | {"mlp.shared_experts.": 24}
        )
        for ffn, size in ffns.items():
            names |= {
                f"{p}{ffn}{n}_proj.weight": (32, size) if n == "down" else (size, 32)
                for n in ("gate", "up", "down")
            }
        if i >= 2:
            names |= {f"{p}mlp.gate.weight": (8, 32), f"{p}mlp.gate.e_score_correction_bias": (8,)}
    names |= {f"{MTP}{n}.weight": (32,) for n in ("enorm", "hnorm", "shared_head.norm")} | {
        f"{MTP}eh_proj.weight": (32, 64)
    }
    if kind != "shared":
        names |= {f"{MTP}embed_tokens.weight": (64, 32), f"{MTP}shared_head.head.weight": (64, 32)}
    tensors = {
        n: rng.standard_normal(s).astype(np.float32 if n.endswith("correction_bias") else dtype)
        for n, s in names.items()
    }
    if kind == "copied":
        tensors[f"{MTP}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors[f"{MTP}shared_head.head.weight"] = tensors["lm_head.weight"].copy()
    folder.mkdir()
    files = {"first.safetensors": list(tensors)[::2], "second.safetensors": list(tensors)[1::2]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    (folder / hf.INDEX).write_text(
        json.dumps({"weight_map": {n: file for file, part in files.items() for n in part}})
    )
    config = transformers.Glm4MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, first_k_dense_replace=2,
        intermediate_size=48, moe_intermediate_size=24,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, use_qk_norm=True,
        attention_bias=True, max_position_embeddings=128,
        n_routed_experts=8, num_experts_per_tok=3, routed_scaling_factor=2.5, initializer_range=0.2,
    )  # fmt: skip
    config.save_pretrained(folder)
    assert c == tiny_config(mtp_embeddings="copied")
    return tensors


@pytest.fixture
def exported(tmp_path):
    return hf.export_checkpoint(
        tmp_path / "exported", CONFIG, random_state(CONFIG), dtype="float32"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["shared", "copied", "own"])
def test_round_trip_keeps_names_and_bytes(tmp_path, kind, dtype):
    theirs = write_like_hugging_face(tmp_path / "theirs", kind, np.dtype(dtype))
    config, state = hf.import_checkpoint(tmp_path / "theirs", RUNTIME)
    assert config == tiny_config(mtp_embeddings=kind)
    assert {v.get_value().dtype for _, v in nnx.to_flat_state(state)} == {np.dtype(np.float32)}
    again = hf.export_checkpoint(
        tmp_path / "again", config, state, dtype=dtype, max_shard_bytes=30_000
    )
    assert_same_bytes(theirs, tensors_of(again))
    files = sorted(again.glob("*.safetensors"))
    assert len(files) > 3 and all(f.stat().st_size < 60_000 for f in files)
    weight_map = json.loads((again / hf.INDEX).read_text())["weight_map"]
    assert weight_map.keys() == theirs.keys() and set(weight_map.values()) == {
        f.name for f in files
    }


def test_stored_type_keeps_bfloat16_arrays(tmp_path):
    write_like_hugging_face(tmp_path / "theirs", "own", ml_dtypes.bfloat16)
    config, state = hf.import_checkpoint(tmp_path / "theirs", RUNTIME, dtype="stored")
    types = {path: v.get_value().dtype for path, v in nnx.to_flat_state(state)}
    assert {p[-1] for p, t in types.items() if t == np.float32} == {"e_score_correction_bias"}
    assert_same_bytes(
        tensors_of(tmp_path / "theirs"), dict(hf.hf_tensors(config, state, "bfloat16"))
    )


def test_shardings_place_the_same_values(exported):
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("a", "b"))
    parameters = hf.abstract_parameters(CONFIG)
    shardings = {
        path: NamedSharding(mesh, PartitionSpec(*(None for _ in axes_of(v))))
        for path, v in parameters.items()
    }
    _, state = hf.import_checkpoint(exported, RUNTIME, shardings=shardings)
    assert all(isinstance(v.get_value(), jax.Array) for _, v in nnx.to_flat_state(state))
    assert_same_bytes(tensors_of(exported), dict(hf.hf_tensors(CONFIG, state, "float32")))


def test_a_part_of_an_array_reads_as_the_slice_of_the_whole(exported):
    files, whole = hf.Folder(exported), dict(nnx.to_flat_state(random_state(CONFIG)))
    for name in (
        "moe_layers.mlp.experts.down_proj",
        "embed_tokens.weight",
        "moe_layers.self_attn.q_proj.weight",
    ):
        path = tuple(name.split("."))
        array = whole[path].get_value()
        part = tuple(slice(n // 2, n) for n in array.shape)
        tensors = [t for t in hf.name_table(CONFIG) if t.path == path and not t.copy]
        np.testing.assert_array_equal(
            files.read(tensors, array.shape, array.dtype, part), array[part]
        )


def test_transformers_loads_the_export_and_its_own_save_comes_back_without_mtp(
    exported, tmp_path, caplog
):
    model, info = transformers.Glm4MoeForCausalLM.from_pretrained(
        exported, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert info["unexpected_keys"] and all(k.startswith(MTP) for k in info["unexpected_keys"])
    assert model.dtype == torch.float32
    rope = model.config.rope_parameters
    assert (rope["rope_theta"], rope["partial_rotary_factor"], rope["rope_type"]) == (
        CONFIG.rope_theta,
        0.5,
        "default",
    )
    model.save_pretrained(tmp_path / "theirs")
    config, state = hf.import_checkpoint(tmp_path / "theirs", RUNTIME)
    assert "no MTP block" in caplog.text
    assert config == tiny_config(num_mtp_layers=0)
    trunk = {n: t for n, t in tensors_of(exported).items() if not n.startswith(MTP)}
    assert_same_bytes(trunk, dict(hf.hf_tensors(config, state, "float32")))


def test_tokenizer_loads_with_auto_tokenizer(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens([hf.END_OF_TEXT])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = hf.export_checkpoint(
        tmp_path / "out",
        CONFIG,
        random_state(CONFIG),
        dtype="bfloat16",
        tokenizer=tmp_path / "tokenizer.json",
    )
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("ab").input_ids == [0, 1] and loaded.eos_token_id == 2
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.eos_token_id, config.pad_token_id) == (2, 2)


def rewrite(folder, change):
    """Applies change(tensors) to the folder's only safetensors file."""
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hf.WEIGHTS)


def no_such_block(tensors):
    quantise(tensors, NAME, np.ones((24, 1), np.float32), (1, 32))
    tensors[f"{NAME}_scale"] = np.ones((5, 1), np.float32)


def rewrite_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v != "absent"})
    )


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


NAME = "model.layers.3.mlp.experts.5.up_proj.weight"


def quantise(
    tensors, name: str, scale: np.ndarray, block: tuple[int, int], suffix: str = "_scale"
) -> np.ndarray:
    """Replaces a matrix by FP8 values and the scales of its blocks; returns what they stand for."""
    places = (np.arange(size) // b for size, b in zip(tensors[name].shape, block, strict=True))
    spread = scale.astype(np.float32)[np.ix_(*places)]
    tensors[name] = (tensors[name] / spread).astype(ml_dtypes.float8_e4m3fn)
    tensors[name + suffix] = scale
    return tensors[name].astype(np.float32) * spread


def test_fp8_folders_are_read_as_what_they_stand_for(exported):
    attention, rng = "model.layers.3.self_attn.", np.random.default_rng(0)
    expected = tensors_of(exported)

    def change(tensors):
        channels = rng.uniform(0.01, 1, (24, 1)).astype(ml_dtypes.bfloat16)  # as released
        expected[NAME] = quantise(tensors, NAME, channels, (1, 32))
        blocks = rng.uniform(0.01, 1, (3, 2)).astype(np.float32)  # the last ones partial
        expected[f"{attention}q_proj.weight"] = quantise(
            tensors, f"{attention}q_proj.weight", blocks, (24, 24), "_scale_inv"
        )
        one = np.full((1, 1), 0.125, np.float32)
        expected[f"{attention}o_proj.weight"] = quantise(
            tensors, f"{attention}o_proj.weight", one, (32, 64)
        )

    rewrite(exported, change)
    rewrite_config(
        exported,
        quantization_config={"quant_method": "compressed-tensors", "weight_block_size": [24, 24]},
    )
    config, state = hf.import_checkpoint(exported, RUNTIME)
    assert_same_bytes(expected, dict(hf.hf_tensors(config, state, "float32")))


BIAS = "model.layers.3.mlp.gate.e_score_correction_bias"
DAMAGES = {
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(NAME)), f"lacks {NAME}"),
    "extra tensor": (lambda f: rewrite(f, lambda t: t.update(extra=t[NAME])), "unexpected extra"),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({NAME: t[NAME][1:]})),
        rf"{NAME} has shape \(23, 32\).*\(24, 32\)",
    ),
    "wrong type": (
        lambda f: rewrite(f, lambda t: t.update({NAME: t[NAME].astype(np.int32)})),
        f"{NAME} has type I32",
    ),
    "bias type": (
        lambda f: rewrite(f, lambda t: t.update({BIAS: t[BIAS].astype(np.float64)})),
        f"{BIAS} has type F64, not F32 or",
    ),
    "half of the copies": (
        lambda f: rewrite(f, lambda t: t.pop(f"{MTP}embed_tokens.weight")),
        f"lacks {MTP}embed_tokens.weight",
    ),
    "truncated file": (lambda f: truncate(f / hf.WEIGHTS), f"{hf.WEIGHTS} is damaged"),
    "no weights": (lambda f: (f / hf.WEIGHTS).unlink(), f"no {hf.WEIGHTS}"),
    "index of a missing file": (
        lambda f: (f / hf.INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "no b.safetensors",
    ),
    "index of a missing tensor": (
        lambda f: (f / hf.INDEX).write_text(f'{{"weight_map": {{"a": "{hf.WEIGHTS}"}}}}'),
        "lacks 'a'",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "model type": (
        lambda f: rewrite_config(f, model_type="glm4moe"),
        "model_type='glm4moe' is not one of glm4_moe",
    ),
    "missing size": (
        lambda f: rewrite_config(f, hidden_size="absent"),
        r"has shape \(64, 32\), config.json makes it \(64, 4096\)",
    ),
    "tied": (lambda f: rewrite_config(f, tie_word_embeddings=True), "tie_word_embeddings=True"),
    "dropout": (lambda f: rewrite_config(f, attention_dropout=0.1), "attention_dropout=0.1"),
    "rope scaling": (
        lambda f: rewrite_config(f, rope_parameters="absent", rope_scaling={"type": "yarn"}),
        "rope_scaling=.*rope_type='yarn'",
    ),
    "rope type": (
        lambda f: rewrite_config(f, rope_parameters={"rope_type": "yarn"}),
        "rope_type='yarn'",
    ),
    "two thetas": (
        lambda f: rewrite_config(f, rope_theta=5.0),
        "rope_theta must be given, and only one",
    ),
    "quantised otherwise": (
        lambda f: rewrite_config(f, quantization_config={"quant_method": "gptq"}),
        "quant_method='gptq' is not one of",
    ),
    "scale of no block": (
        lambda f: rewrite(f, no_such_block),
        r"up_proj.weight_scale has shape \(5, 1\)",
    ),
    "scale of what is not FP8": (
        lambda f: rewrite(f, lambda t: t.update({f"{NAME}_scale": np.ones((24, 1), np.float32)})),
        f"{NAME} has type F32, not F8",
    ),
    "FP8 without a scale": (
        lambda f: rewrite(f, lambda t: t.update({NAME: t[NAME].astype(ml_dtypes.float8_e4m3fn)})),
        f"{NAME} has type F8_E4M3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_import_names_what_does_not_fit(exported, damage):
    break_it, message = DAMAGES[damage]
    break_it(exported)
    with pytest.raises(ValueError, match=message):
        hf.import_checkpoint(exported, RUNTIME)


ROPE_ABSENT = {
    "rope_parameters": "absent",
    "rope_theta": "absent",
    "partial_rotary_factor": "absent",
}


@pytest.mark.parametrize(
    "changes",
    [
        ROPE_ABSENT,
        ROPE_ABSENT | {"rope_theta": 5000},
        ROPE_ABSENT | {"partial_rotary_factor": 0.25, "rope_scaling": None},
        ROPE_ABSENT | {"rope_theta": 5000, "rope_parameters": {"rope_type": "default"}},
        ROPE_ABSENT | {"rope_scaling": {"type": "default"}, "rope_theta": 7},
        ROPE_ABSENT
        | {
            "rope_scaling": {
                "rope_type": "default",
                "rope_theta": 7.0,
                "partial_rotary_factor": 0.25,
            }
        },
        ROPE_ABSENT | {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.25}},
        {
            "n_group": "absent",
            "topk_group": "absent",
            "norm_topk_prob": "absent",
            "initializer_range": "absent",
            "rms_norm_eps": "absent",
        },
        {
            "num_nextn_predict_layers": None,
            "max_position_embeddings": "absent",
            "routed_scaling_factor": "absent",
        },
        {"num_nextn_predict_layers": "absent", "num_mtp_layers": 0},
        {"n_routed_experts": "absent", "num_local_experts": 8},
    ],
)
def test_what_config_lacks_is_read_as_transformers_reads_it(exported, changes):
    rewrite_config(exported, **changes)
    theirs = transformers.AutoConfig.from_pretrained(exported)
    config, _ = hf.import_checkpoint(exported, RUNTIME)
    keys = {
        ours: key
        for ours, key in hf_config.CONFIG_KEYS.items()
        if key != "num_nextn_predict_layers"
    }
    assert {ours: getattr(config, ours) for ours in keys} == {
        ours: getattr(theirs, key) for ours, key in keys.items()
    }
    rope = theirs.rope_parameters
    assert (config.rope_theta, config.rotary_fraction) == (
        rope["rope_theta"],
        rope["partial_rotary_factor"],
    )
    expected = getattr(theirs, "num_nextn_predict_layers", None)
    assert config.num_mtp_layers == (1 if expected is None else expected)


def test_our_defaults_are_those_of_transformers():
    theirs = transformers.Glm4MoeConfig()
    rope = theirs.rope_parameters
    for key, value in hf_config.DEFAULTS.items():
        found = (
            rope[key]
            if key in rope
            else (
                theirs.num_mtp_layers if key == "num_nextn_predict_layers" else getattr(theirs, key)
            )
        )
        assert (type(value), value) == (type(found), found), key


def test_a_byte_order_mark_is_no_part_of_a_file(exported):
    expected = tensors_of(exported)
    weight_map = {"weight_map": dict.fromkeys(expected, hf.WEIGHTS)}
    for file, text in (
        ("config.json", (exported / "config.json").read_text()),
        (hf.INDEX, json.dumps(weight_map)),
    ):
        (exported / file).write_text(text, "utf-8-sig")
    assert_same_bytes(
        expected, dict(hf.hf_tensors(*hf.import_checkpoint(exported, RUNTIME), "float32"))
    )


def test_buffers_that_transformers_ignores_are_ignored(exported):
    expected = tensors_of(exported)
    names = [
        "model.rotary_emb.inv_freq",
        *(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(5)),
    ]
    rewrite(exported, lambda t: t.update({name: np.ones(4, np.float32) for name in names}))
    assert_same_bytes(
        expected, dict(hf.hf_tensors(*hf.import_checkpoint(exported, RUNTIME), "float32"))
    )


def test_an_mtp_block_that_config_switches_off_is_ignored(exported, caplog):
    expected = {name: t for name, t in tensors_of(exported).items() if not name.startswith(MTP)}
    rewrite_config(exported, num_nextn_predict_layers=0)
    config, state = hf.import_checkpoint(exported, RUNTIME)
    assert config.num_mtp_layers == 0 and "its weights are ignored" in caplog.text
    assert_same_bytes(expected, dict(hf.hf_tensors(config, state, "float32")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_folder_of_transformers_is_read_exactly(exported, tmp_path, dtype):
    """`.to(dtype)` rounds everything, the correction bias and the router included."""
    model = transformers.Glm4MoeForCausalLM.from_pretrained(exported).to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "theirs" / hf.WEIGHTS, framework="pt") as file:
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {t.dtype for t in theirs.values()} == {dtype}
    config, state = hf.import_checkpoint(tmp_path / "theirs", RUNTIME)
    assert_same_bytes(
        {name: t.float().numpy() for name, t in theirs.items()},
        dict(hf.hf_tensors(config, state, "float32")),
    )


def test_stored_types_come_back_whatever_they_are(exported, tmp_path):
    """Each array keeps its type; where layers or experts of one array differ, and for FP8, it is
    float32, which holds them all.
    """
    half = {
        "q_proj.weight": np.float16,
        "norm.weight": ml_dtypes.bfloat16,
        "embed_tokens.weight": ml_dtypes.bfloat16,
        BIAS: np.float16,
    }

    def change(tensors):
        for name, t in tensors.items():
            tensors[name] = t.astype(
                next((kind for end, kind in half.items() if name.endswith(end)), t.dtype)
            )
        tensors[NAME] = tensors[NAME].astype(np.float16)

    rewrite(exported, change)
    rewrite_config(exported, dtype="float16")
    theirs = tensors_of(exported)
    config, state = hf.import_checkpoint(exported, RUNTIME, dtype="stored")
    again = hf.export_checkpoint(tmp_path / "again", config, state, dtype="stored")
    exact = {
        name: t.astype(np.float32) if name in (NAME, BIAS) else t for name, t in theirs.items()
    }
    assert_same_bytes(exact, tensors_of(again))
    assert json.loads((again / "config.json").read_text())["dtype"] == "float32"  # most of it is


def test_export_refuses_a_folder_in_use_and_leaves_it_alone(tmp_path):
    (tmp_path / "in_use").mkdir()
    (tmp_path / "in_use" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="in_use' exists and is not an empty folder"):
        hf.export_checkpoint(tmp_path / "in_use", CONFIG, random_state(CONFIG), dtype="float32")
    assert [f.name for f in tmp_path.rglob("*")] == ["in_use", "notes.txt"]


def test_a_failed_export_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [{"content": "<|endoftext|>", "id": 1}]}'
    )
    with pytest.raises(OSError, match="No space left"):
        hf.export_checkpoint(
            tmp_path / "out",
            CONFIG,
            random_state(CONFIG),
            dtype="float32",
            tokenizer=tmp_path / "tokenizer.json",
        )
    assert [f.name for f in tmp_path.iterdir()] == ["tokenizer.json"]


def test_export_names_a_parameter_that_does_not_fit_the_config(tmp_path):
    with pytest.raises(ValueError, match=r"parameter .* has shape .*, the config makes it"):
        hf.export_checkpoint(
            tmp_path / "out", tiny_config(vocab_size=65), random_state(CONFIG), dtype="float32"
        )
    with pytest.raises(ValueError, match="num_shared_experts=0"):
        hf.export_checkpoint(
            tmp_path / "out",
            tiny_config(num_shared_experts=0),
            random_state(CONFIG),
            dtype="float32",
        )


def test_export_names_a_type_that_no_folder_has(tmp_path):
    state = jax.tree.map(lambda x: x.astype(np.float64), random_state(CONFIG))
    with pytest.raises(ValueError, match="has type float64, not float32 or bfloat16 or float16"):
        hf.export_checkpoint(tmp_path / "out", CONFIG, state, dtype="stored")
    with pytest.raises(ValueError, match="dtype='fp32' is not one of float32, bfloat16, stored"):
        hf.export_checkpoint(tmp_path / "out", CONFIG, random_state(CONFIG), dtype="fp32")
    assert not any(tmp_path.iterdir())


def test_export_is_bfloat16_but_for_the_correction_bias(tmp_path):
    folder = hf.export_checkpoint(tmp_path / "out", CONFIG, random_state(CONFIG), dtype="bfloat16")
    with safe_open(folder / hf.WEIGHTS, framework="numpy") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert all(
        (kind == "F32") == name.endswith("e_score_correction_bias") for name, kind in types.items()
    )
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
