"""Logits, a training step and greedy decoding of a toy with every part of GLM-4.5, beside the CPU's
float32 numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import glm45
from experiments.gpu.measuring import Section
from glm_jax.config import ModelConfig, from_mapping
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.infer.sampling import SamplingParams
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.train.state import TrainSpec, TrainState, build_model, initial_weights
from glm_jax.train.step import StepScalars, gradients, update

ROWS, LENGTH, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 64, 4, 24, 8
TOY = {
    "vocab_size": 512, "hidden_size": 128, "num_layers": 2, "num_dense_layers": 1,
    "dense_ffn_size": 256, "expert_ffn_size": 128,
    "num_heads": 8, "num_kv_heads": 2, "head_size": 64, "max_length": 256, "num_experts": 16,
    "num_experts_per_token": 4,
    "routed_scaling_factor": 1.0, "init_std": 0.1, "remat": "none", "expert_exchange": "all_to_all",
}  # fmt: skip
# Norm of the difference over the norm of the CPU's numbers. float32 sums in another order; bfloat16
# rounds at 4e-3, and may route a token to another expert.
BOUNDS = {
    "float32": {
        "logits": 1e-4,
        "loss": 1e-5,
        "gradients": 1e-3,
        "update": 1e-3,
        "log-probabilities": 1e-4,
    },
    "bfloat16": {"logits": 0.1, "loss": 0.01, "gradients": 0.2, "log-probabilities": 0.1},
}


def toy(compute_dtype: str, attention: str, grouped_matmul: str) -> ModelConfig:
    fields = glm45.get_config().to_dict()["model"] | TOY
    fields |= {
        "compute_dtype": compute_dtype,
        "attention": attention,
        "grouped_matmul": grouped_matmul,
    }
    return from_mapping(ModelConfig, fields, "model")


def batch() -> dict[str, np.ndarray]:
    """Two packed rows of random tokens, [1, B, L]: two documents and padding, one document."""
    tokens = (
        np.random.default_rng(0)
        .integers(0, TOY["vocab_size"], (1, ROWS, LENGTH + 1))
        .astype(np.int32)
    )
    segments = np.ones((1, ROWS, LENGTH), np.int32)
    segments[0, 0, 25:], segments[0, 0, 55:] = 2, 0
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), segments.shape) - np.where(
        segments == 2, 25, 0
    ).astype(np.int32)
    weights = (segments > 0).astype(np.float32)
    return {
        "tokens": tokens[..., :-1], "targets": tokens[..., 1:], "positions": positions,
        "segment_ids": segments, "loss_weights": weights
    }  # fmt: skip


def numbers(config: ModelConfig, params, router, *, engine_attention: str) -> dict[str, np.ndarray]:
    """Name -> array: logits of real tokens, loss, gradients, parameters after a step of Muon,
    greedy tokens and log-probabilities.
    """
    data = batch()
    optimizer = glm45.get_config().to_dict()["optimizer"] | {"ns_dtype": "float32"}
    spec = TrainSpec.create(config, from_mapping(OptimizerConfig, optimizer, "optimizer"))
    rate = jnp.float32(1e-2)
    scalars = StepScalars(jnp.int32(1), rate, jnp.float32(0.3), jnp.float32(1e-3))

    def everything(params, router):
        model = build_model(config, params, router)
        parts = {name: data[name][0] for name in ("segment_ids", "positions")}
        logits = model(data["tokens"][0], **parts)
        state = TrainState(jnp.int32(0), params, router, spec.optimizer.init(params))
        (loss, aux), grads = gradients(spec, state, data, scalars, 1e-4)
        new, _ = update(spec, state, grads, aux["expert_counts"], rate, scalars.bias_rate)
        return logits, loss, grads, new.params

    logits, loss, grads, new = jax.jit(everything)(params, router)
    found = {"logits": logits[data["segment_ids"][0] > 0], "loss": loss}
    found |= {f"gradients/{name}": x for name, x in named(grads).items()} | {
        f"update/{name}": x for name, x in named(new).items()
    }
    model = build_model(dataclasses.replace(config, attention=engine_attention), params, router)
    return {name: np.asarray(x) for name, x in (found | decoded(model)).items()}


def decoded(model) -> dict[str, np.ndarray]:
    """Greedy tokens and their log-probabilities, [prompts, tokens], by the engine."""
    context = PROMPT_TOKENS + NEW_TOKENS
    config = EngineConfig(
        context=context, num_rows=PROMPTS, min_rows=PROMPTS, page_size=8,
        num_pages=PROMPTS * -(-context // 8), prefill_chunk=32,
        min_chunk=32, decode_steps=4, draft_tokens=0, weights="compute", cache_dtype="compute",
        keep_experts=False,
    )  # fmt: skip
    prompts = (
        np.random.default_rng(1).integers(0, TOY["vocab_size"], (PROMPTS, PROMPT_TOKENS)).tolist()
    )
    requests = Engine(model, config).generate(
        prompts, SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0)
    )
    return {
        "tokens": np.array([r.tokens for r in requests]),
        "log-probabilities": np.array([r.logprobs for r in requests]),
    }


def named(tree) -> dict[str, jax.Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


def reference(section: Section):
    """On the CPU: weights and numbers in float32 by the plain implementations, into
    reference.npz.
    """
    config = toy("float32", "reference", "reference")
    params, router = jax.jit(lambda key: initial_weights(config, key))(jax.random.key(0))
    with jax.default_matmul_precision("highest"):
        found = numbers(config, params, router, engine_attention="reference")
    weights = {f"weights/{name}": np.asarray(x) for name, x in named((params, router)).items()}
    arrays: dict[str, Any] = found | weights
    np.savez(section.output / "reference.npz", **arrays)


def correctness(section: Section):
    """One record for each type, implementation and quantity: relative difference from
    reference.npz, and PASS or FAIL.

    Raises ValueError at the end where one is not PASS.
    """
    expected = dict(np.load(section.output / "reference.npz"))
    shapes = jax.eval_shape(
        lambda: initial_weights(toy("float32", "xla", "auto"), jax.random.key(0))
    )
    names = list(named(shapes))
    params, router = jax.tree.unflatten(
        jax.tree.structure(shapes), [jnp.asarray(expected[f"weights/{name}"]) for name in names]
    )
    passed, gpu = [], jax.default_backend() == "gpu"
    sides = [
        ("float32", "xla", "auto"),
        ("bfloat16", "cudnn" if gpu else "xla", "batched"),
        ("float32", "xla", "batched"),
    ]
    for dtype, attention, grouped in sides[: 1 if section.rehearse else None]:
        config = toy(dtype, attention, grouped)

        def measure(config=config, dtype=dtype):
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                found = numbers(config, params, router, engine_attention="xla")
            result = compare(found, expected, dtype)
            passed.append(result["verdict"] == "PASS")
            return result

        passed.append(
            section.attempt(measure, dtype=dtype, attention=attention, grouped_matmul=grouped)
        )
    if not all(passed):
        raise ValueError("not every number is the CPU's; see the verdicts and this log")


def compare(found: dict, expected: dict, dtype: str) -> dict:
    """Relative difference of each quantity, the share of greedy tokens that are equal, and the
    verdict.

    In float32 the worst gradient counts. Otherwise all tensors of a quantity count together:
    AdamW's first step divides a gradient by itself, so where it is all but zero the sign of the
    noise decides; bfloat16 has such noise in gradients, too.
    """
    bounds, result = BOUNDS[dtype], {}
    # Tokens that both chose after the same past; the others answer another question.
    same = np.cumprod(found["tokens"] == expected["tokens"], axis=1).astype(bool)
    result["greedy tokens equal"] = round(float(same.mean()), 4)
    for quantity in bounds:
        pairs = [
            (found[name], expected[name])
            for name in sorted(found)
            if name.split("/")[0] == quantity
        ]
        if quantity == "log-probabilities":
            pairs = [(mine[same], theirs[same]) for mine, theirs in pairs]
        if quantity == "update" or dtype == "bfloat16":
            pairs = [
                tuple(
                    np.concatenate([np.ravel(x) for x in side]) for side in zip(*pairs, strict=True)
                )
            ]
        result[quantity] = float(f"{max(relative(*pair) for pair in pairs):.2g}")
    failed = [name for name, bound in bounds.items() if not result[name] <= bound]
    if dtype == "float32" and not same.all():
        failed.append("greedy tokens")
    return result | {"verdict": f"FAIL: {', '.join(failed)}" if failed else "PASS"}


def relative(mine, theirs) -> float:
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(mine - theirs) / max(np.linalg.norm(theirs), 1e-30))
