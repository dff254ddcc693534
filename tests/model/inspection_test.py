"""Inspection against a forward pass written out in NumPy, float64, one query and one token at a
time.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from glm_jax.config import ModelConfig, from_mapping
from glm_jax.model.inspection import inspect_model
from glm_jax.model.moe import RouterBias
from glm_jax.train.state import build_model, initial_weights

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_layers": 3, "num_dense_layers": 1,
    "dense_ffn_size": 24, "expert_ffn_size": 8,
    "num_heads": 4, "num_kv_heads": 2, "head_size": 8, "num_experts": 6, "num_experts_per_token": 2,
    "max_length": 32, "init_std": 0.3,
}  # fmt: skip


def make_model(**changes):
    """Random weights and router biases, norms and biases off their 0 and 1."""
    config = from_mapping(ModelConfig, tiny.get_config().model.to_dict() | SIZES | changes, "model")
    rng = np.random.default_rng(1)
    weights = jax.jit(lambda key: initial_weights(config, key))(jax.random.key(0))
    return build_model(
        config, *jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), weights)
    )


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 50, (2, 2, 12))
    segment_ids = np.array([[1] * 5 + [2] * 7, [1] * 3 + [2] * 5 + [0] * 4])
    positions = np.array([[*range(5), *range(7)], [*range(3), *range(5), 0, 0, 0, 0]])
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
    }


def norm(weight, x, eps=1e-5):
    return weight * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def swiglu(gate, up, down, x):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def rope(x, position):
    """The first half of the head, pairs (i, i + 2) of its 4 dimensions."""
    out, half = x.copy(), 2
    for i in range(half):
        angle = position * 1e4 ** (-2 * i / 4)
        a, b = x[i], x[i + half]
        out[i] = a * np.cos(angle) - b * np.sin(angle)
        out[i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def attend(p, x, segment_ids, positions, entropies):
    """Output of one row's attention; appends (head, entropy) of every real query."""
    heads = {}
    for name in "qkv":
        w = p[f"{name}_proj"]
        y = (x @ w["weight"] + w["bias"]).reshape(len(x), -1, 8)
        y = y if name == "v" else norm(p[f"{name}_norm"]["weight"], y)
        heads[name] = (
            y
            if name == "v"
            else np.array(
                [[rope(h, at) for h in row] for row, at in zip(y, positions, strict=True)]
            )
        )
    out = np.zeros((len(x), 4, 8))
    for i in range(len(x)):
        visible = [j for j in range(i + 1) if segment_ids[j] == segment_ids[i]]
        for head in range(4):
            scores = np.array(
                [heads["q"][i, head] @ heads["k"][j, head // 2] for j in visible]
            ) / np.sqrt(8)
            probs = np.exp(scores - scores.max())
            probs /= probs.sum()
            out[i, head] = probs @ heads["v"][visible, head // 2]
            if segment_ids[i] > 0:
                entropies.append((head, -sum(q * np.log(q) for q in probs)))
    return out.reshape(len(x), -1) @ p["o_proj"]["weight"]


def experts(p, x, segment_ids, counts):
    out = np.array(
        [
            swiglu(
                *(p["shared_experts"][f"{n}_proj"]["weight"] for n in ("gate", "up", "down")), row
            )
            for row in x
        ]
    )
    for t in range(len(x)):
        scores = 1 / (1 + np.exp(-(x[t] @ p["gate"]["weight"])))
        chosen = np.argsort(-(scores + p["gate"]["e_score_correction_bias"]))[:2]
        for e in chosen:
            if segment_ids[t] > 0:
                counts[e] += 1
                out[t] += (
                    scores[e]
                    / scores[chosen].sum()
                    * swiglu(*(p["experts"][f"{n}_proj"][e] for n in ("gate", "up", "down")), x[t])
                )
    return out


def block(p, x, batch, moe):
    """One layer over both rows: x, mean entropy of each head, tokens of each expert."""
    entropies, counts = [], np.zeros(6, int)
    for row in range(2):
        segment_ids, positions = batch["segment_ids"][row], batch["positions"][row]
        x[row] += attend(
            p["self_attn"],
            norm(p["input_layernorm"]["weight"], x[row]),
            segment_ids,
            positions,
            entropies,
        )
        y = norm(p["post_attention_layernorm"]["weight"], x[row])
        mlp = p["mlp"]
        x[row] += (
            experts(mlp, y, segment_ids, counts)
            if moe
            else swiglu(*(mlp[f"{n}_proj"]["weight"] for n in ("gate", "up", "down")), y)
        )
    means = [np.mean([e for h, e in entropies if h == head]) for head in range(4)]
    return means, counts


def brute_force(model, batch):
    """(entropies [4, N], counts [3, E]) of a dense layer, two MoE layers and MTP."""
    p = nnx.to_pure_dict(nnx.state(model))
    as64 = lambda tree: (
        {k: as64(v) for k, v in tree.items()}
        if isinstance(tree, dict)
        else np.asarray(tree, np.float64)
    )
    pick = lambda tree, i: (
        {k: pick(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]
    )
    p = as64(p)
    x = p["embed_tokens"]["weight"][batch["tokens"]]
    layers = [
        (pick(p["dense_layers"], 0), False),
        (pick(p["moe_layers"], 0), True),
        (pick(p["moe_layers"], 1), True),
    ]
    seen = [block(layer, x, batch, moe) for layer, moe in layers]
    mtp = p["mtp"]
    embedding = norm(mtp["enorm"]["weight"], p["embed_tokens"]["weight"][batch["targets"]])
    h = norm(mtp["hnorm"]["weight"], norm(p["norm"]["weight"], x))
    x = np.concatenate([embedding, h], -1) @ mtp["eh_proj"]["weight"]
    seen.append(block(mtp["block"], x, batch, True))
    return np.array([s[0] for s in seen]), np.array([s[1] for s in seen[1:]])


def test_inspection_equals_a_brute_force_pass(model, batch):
    entropy, counts = brute_force(model, batch)
    found = inspect_model(model, batch)
    np.testing.assert_allclose(found.attention_entropy, entropy, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.expert_counts, counts)
    lengths = [5, 7, 3, 5]
    uniform = np.mean([np.log(i + 1) for n in lengths for i in range(n)])
    np.testing.assert_allclose(found.uniform_entropy, uniform, rtol=1e-6)
    # heads differ, every real token has two experts
    assert np.ptp(entropy) > 0.05 and counts.sum() == 3 * 2 * 20


def test_no_keys_means_uniform_attention(model, batch):
    graphdef, params, router = nnx.split(model, nnx.Param, RouterBias)
    flat = {
        p: v.replace(v.get_value() * 0) if "q_norm" in p else v
        for p, v in nnx.to_flat_state(params)
    }
    found = inspect_model(
        nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())), router), batch
    )
    np.testing.assert_allclose(
        found.attention_entropy, np.full((4, 4), found.uniform_entropy), rtol=1e-5
    )


def test_dense_model_has_no_routers(batch):
    found = inspect_model(make_model(num_dense_layers=3, num_mtp_layers=0), batch)
    assert found.expert_counts.shape == (0, 6) and found.attention_entropy.shape == (3, 4)
