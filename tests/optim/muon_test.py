import collections
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import glm45
from experiments.entry import run_config
from glm_jax.optim.muon import newton_schulz, scale_by_muon
from glm_jax.optim.optimizer import (
    OptimizerConfig,
    group_of,
    group_rms,
    group_tree,
    head_split,
    make_optimizer,
)
from glm_jax.sharding import MESH_AXES, MeshConfig, make_mesh, named
from glm_jax.train.state import TrainSpec

SHAPES = {"square": (12, 12), "tall": (24, 8), "wide": (8, 24), "experts": (3, 4, 6, 10)}
STEPS = 3


def config(**changes) -> OptimizerConfig:
    return OptimizerConfig(
        **{**glm45.get_config().optimizer.to_dict(), "ns_dtype": "float32", **changes}
    )


def muon(**changes):
    arguments = dict(momentum=0.95, nesterov=False, ns_steps=5, ns_dtype="float32", update_rms=0.2)
    return scale_by_muon(**{**arguments, **changes})


@pytest.fixture(scope="module")
def gradients():
    rng = np.random.default_rng(0)
    return [
        {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
        for _ in range(STEPS)
    ]


def optax_numbers(params):
    """Dimension numbers that tell optax which axes are a matrix; the others are batches."""
    return jax.tree.map(
        lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params
    )


def test_three_steps_with_decay_equal_optax(gradients):
    """Plain momentum: optax's bias-corrected average differs from it in scale only, which
    Newton-Schulz removes.
    """
    rate, decay = 0.02, 0.1
    start = jax.tree.map(lambda g: 0.3 * g[::-1], gradients[0])
    theirs = optax.contrib.muon(
        rate,
        beta=0.95,
        nesterov=False,
        weight_decay=decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=optax_numbers(start),
    )
    mine = optax.chain(muon(), optax.add_decayed_weights(decay), optax.scale(-rate))
    results = []
    for transformation in (mine, theirs):
        params, state = start, transformation.init(start)
        for gradient in gradients:
            updates, state = jax.jit(transformation.update)(gradient, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)
    assert all(
        np.abs(a - b).max() > 1e-3
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(start), strict=True)
    )


def test_nesterov_direction_is_momentum_times_buffer_plus_gradient(gradients):
    """Against a float64 loop of Moonlight's formula, one matrix at a time."""
    a, b, c = 3.4445, -4.7750, 2.0315

    def orthogonalize(x):
        x = x.T if x.shape[0] > x.shape[1] else x
        transposed = x
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x, transposed

    transformation = muon(nesterov=True)
    state = transformation.init(gradients[0])
    buffer = np.zeros(SHAPES["tall"])
    for gradient in gradients:
        updates, state = transformation.update(gradient, state)
        g = np.asarray(gradient["tall"], np.float64)
        buffer = 0.95 * buffer + g
        expected = orthogonalize(0.95 * buffer + g)[0].T * 0.2 * np.sqrt(24)
        np.testing.assert_allclose(updates["tall"], expected, atol=2e-5)


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("shape", [*SHAPES.values(), (4, 400), (400, 4), (1, 30)])
def test_update_rms_is_point_two_whatever_the_shape(shape):
    """To the last digits where all singular values are equal: five iterations bring them from
    1 / sqrt(n) to one value, the polynomial's, and a matrix of r equal singular values has the RMS
    of one over the square root of its longer side. Nearly where they are random.
    """
    rng, short = np.random.default_rng(7), min(shape[-2:])
    wide = np.linalg.qr(rng.normal(size=(*shape[:-2], max(shape[-2:]), short)))[0].swapaxes(-2, -1)
    equal = wide if shape[-2] <= shape[-1] else wide.swapaxes(-2, -1)
    reached = 1 / math.sqrt(short)
    for _ in range(5):
        reached = 3.4445 * reached - 4.7750 * reached**3 + 2.0315 * reached**5
    update = lambda g: muon().update({"w": jnp.asarray(g)}, muon().init({"w": jnp.asarray(g)}))[0]
    assert rms(update(equal.astype(np.float32))["w"]) == pytest.approx(0.2 * reached, rel=1e-4)
    assert 0.68 < reached < 1.21
    update_of_random = update(rng.normal(size=shape).astype(np.float32))["w"]
    assert 0.2 * 0.68 < rms(update_of_random) < 0.2 * 1.21


def test_singular_values_come_near_one_also_in_bfloat16():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 16, 40)), jnp.float32)
    for dtype in ("float32", "bfloat16"):
        values = np.linalg.svd(np.asarray(newton_schulz(x, 5, dtype)), compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize(("axis", "parts"), [(-1, 3), (-2, 2)])
def test_split_heads_equals_every_head_on_its_own(axis, parts):
    rng = np.random.default_rng(3)
    gradient = {"w": jnp.asarray(rng.normal(size=(2, 8, 12)), jnp.float32)}
    together, _ = muon(head_splits={"w": (axis, parts)}).update(gradient, muon().init(gradient))
    heads = [{"w": h} for h in jnp.split(gradient["w"], parts, axis=axis)]
    apart = [muon().update(h, muon().init(h))[0]["w"] for h in heads]
    np.testing.assert_allclose(
        together["w"], jnp.concatenate(apart, axis=axis), rtol=1e-5, atol=1e-6
    )


def test_groups_follow_the_paper():
    assert group_of(("lm_head", "weight"), ("embed", "vocab")) == "muon"
    assert group_of(("moe_layers", "mlp", "gate", "weight"), ("embed", "router")) == "muon"
    assert (
        group_of(("moe_layers", "mlp", "experts", "gate_proj"), ("experts", "embed", "mlp"))
        == "muon"
    )
    assert group_of(("embed_tokens", "weight"), ("vocab", "embed")) == "embedding"
    assert group_of(("mtp", "embed_tokens", "weight"), ("vocab", "embed")) == "embedding"
    assert group_of(("norm", "weight"), ("norm",)) == "vector"
    assert group_of(("moe_layers", "self_attn", "q_proj", "bias"), ("heads",)) == "vector"


def test_heads_are_split_along_their_own_axis_of_a_matrix():
    assert head_split(("embed", "heads"), (4, 24), 8) == (-1, 3)
    assert head_split(("kv_heads", "embed"), (16, 4), 8) == (-2, 2)
    assert head_split((None, "embed", "heads"), (5, 4, 24), 8) == (-1, 3)
    assert head_split(("embed", "mlp"), (4, 24), 8) is None
    assert head_split(("heads",), (24,), 8) is None


AXES = {
    "embed_tokens": {"weight": ("vocab", "embed")},
    "q_proj": {"weight": ("embed", "heads"), "bias": ("heads",)},
}
PARAMS = {
    "embed_tokens": {"weight": jnp.ones((6, 4))},
    "q_proj": {"weight": jnp.ones((4, 8)), "bias": jnp.ones(8)},
}


@pytest.mark.parametrize("split_heads", [False, True])
def test_optimizer_sends_each_group_to_its_rule_and_decays_matrices_and_embedding_only(split_heads):
    shapes = jax.tree.map(lambda x: x.shape, PARAMS)
    optimizer = make_optimizer(config(split_heads=split_heads), AXES, shapes, head_size=4)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["embed_tokens"]["weight"], 0.1)
    np.testing.assert_allclose(updates["q_proj"]["weight"], 0.1, atol=1e-6)
    np.testing.assert_array_equal(updates["q_proj"]["bias"], 0)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = optimizer.update(ones, optimizer.init(PARAMS), zeros)
    np.testing.assert_allclose(updates["q_proj"]["bias"], 1, rtol=1e-5)  # Adam's first step
    np.testing.assert_allclose(updates["embed_tokens"]["weight"], 1, rtol=1e-5)
    assert np.abs(updates["q_proj"]["weight"]).max() < 0.9


def test_adamw_ablation_moves_matrices_as_adam():
    optimizer = make_optimizer(
        config(name="adamw"), AXES, jax.tree.map(lambda x: x.shape, PARAMS), head_size=4
    )
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = optimizer.update(
        ones, optimizer.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    )
    np.testing.assert_allclose(updates["q_proj"]["weight"], 1, rtol=1e-5)


def test_group_rms_pools_all_elements_of_a_group():
    rms = group_rms(jax.tree.map(lambda x: 2 * x, PARAMS), group_tree(AXES))
    assert {k: float(v) for k, v in rms.items()} == pytest.approx(
        {"muon": 2, "embedding": 2, "vector": 2}
    )


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="'moun' is not one of muon, adamw. Did you mean 'muon'"):
        config(name="moun")


# --- on a mesh ---

WIDTH, HEADS = 16, 3
LAYER_AXES = {
    "experts_up": ("experts", "embed", "mlp"), "experts_down": ("experts", "mlp", "embed"),
    "shared": ("embed", "mlp"),
    "q": ("embed", "heads"), "o": ("heads", "embed"), "router": ("embed", "router"),
}  # fmt: skip
OTHER_AXES = {"lm_head": ("embed", "vocab"), "eh_proj": (None, "embed")}
MESHES = [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8), (8, 1, 1)]


def stacks(layers):
    """Shapes and axes of a model's matrices; nothing divides by 8 but what sharding.RULES split."""
    sizes = {
        "experts_up": (8, WIDTH, 12), "experts_down": (8, 12, WIDTH), "shared": (WIDTH, 12),
        "router": (WIDTH, 8),
        "q": (WIDTH, 8 * HEADS), "o": (8 * HEADS, WIDTH),
    }  # fmt: skip
    shapes = {name: (layers, *size) for name, size in sizes.items()} | {
        "lm_head": (WIDTH, 42),
        "eh_proj": (2 * WIDTH, WIDTH),
    }
    return shapes, LAYER_AXES | OTHER_AXES


def on_mesh(sizes, layers, *, abstract=False):
    """The jitted update on a mesh, and placed gradients."""
    shapes, axes = stacks(layers)
    splits = {name: {"q": (-1, HEADS), "o": (-2, HEADS)}.get(name) for name in shapes}
    transformation = muon(nesterov=True, head_splits=splits, axes=axes)
    mesh = make_mesh(MeshConfig(*sizes, 1, 1), jax.devices()[: math.prod(sizes)])
    rng = np.random.default_rng(0)

    def place(name, shape):
        sharding = named(mesh, (None,) * (len(shape) - len(axes[name])) + axes[name], shape)
        if abstract:
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        return jax.device_put(np.asarray(rng.normal(size=shape), np.float32), sharding)

    gradient = {name: place(name, shape) for name, shape in shapes.items()}
    shardings = jax.tree.map(lambda x: x.sharding, gradient)

    def update(gradient):
        return transformation.update(gradient, transformation.init(gradient))[0]

    return mesh, jax.jit(update, out_shardings=shardings), gradient


@pytest.mark.parametrize("large", [2048, 12], ids=["dealt", "split"])
@pytest.mark.parametrize("sizes", MESHES)
def test_a_mesh_moves_whole_matrices_and_changes_nothing(sizes, large, monkeypatch):
    monkeypatch.setattr("glm_jax.optim.muon.LARGE", large)
    mesh, update, gradient = on_mesh(sizes, layers=5)
    with jax.set_mesh(mesh):
        ours = jax.device_get(update(gradient))
    alone = jax.tree.map(lambda x: jnp.asarray(jax.device_get(x)), gradient)
    splits = {name: {"q": (-1, HEADS), "o": (-2, HEADS)}.get(name) for name in alone}
    theirs, _ = muon(nesterov=True, head_splits=splits).update(alone, muon().init(alone))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, jax.device_get(theirs)
    )


def test_collectives_do_not_follow_the_number_of_layers():
    """Nor do they stand in the loop of the iterations; nothing is gathered whole but what every
    device holds whole.
    """
    counts = {}
    for layers in (8, 89):
        mesh, update, gradient = on_mesh((1, 4, 2), layers, abstract=True)
        with jax.set_mesh(mesh):
            text = update.trace(gradient).lower().compile().as_text()
        loops = re.findall(r" while\(.*?body=%?([\w.\-]+)", text)
        bodies = [
            re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.M | re.S)[0] for name in loops
        ]
        assert bodies  # of the iterations
        assert not any(
            re.search(r" (all-to-all|all-gather|all-reduce)(-start)?\(", body) for body in bodies
        )
        counts[layers] = {
            kind: len(re.findall(rf" {kind}(?:-start)?\(", text))
            for kind in ("all-to-all", "all-gather", "all-reduce")
        }
        largest = max(
            math.prod(map(int, dims.split(",")))
            for dims in re.findall(r"f32\[([\d,]+)\]\S* all-(?:gather|to-all)", text)
        )
        assert largest <= 2 * layers * 8 * WIDTH * 12 // 8 * 2
    assert counts[8] == counts[89]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_every_axis_of_the_mesh_shares_the_work(sizes):
    """Of two devices, too, which take a half each."""
    _, alone, gradient = on_mesh((1, 1, 1), layers=8, abstract=True)
    whole = work_of(alone.trace(gradient).jaxpr)["flops"]
    mesh, update, gradient = on_mesh(sizes, layers=8, abstract=True)
    with jax.set_mesh(mesh):
        share = work_of(update.trace(gradient).jaxpr)["flops"]
    assert 1 <= share / (whole / mesh.size) < 1.15


def work_of(jaxpr, times=1) -> collections.Counter:
    """FLOPs of the products that a device runs, and bytes of what it gives to collectives (sums go
    there and back).
    """
    out = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out["flops"] += (
                times
                * 2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(left[i] for i in contracted)
            )
        elif equation.primitive.name in ("all_to_all", "all_gather", "psum"):
            arrays = [
                math.prod(v.aval.shape) * v.aval.dtype.itemsize
                for v in (*equation.invars, *equation.outvars)
            ]
            out["bytes"] += times * (
                sum(arrays) if equation.primitive.name == "psum" else max(arrays)
            )
        assert equation.primitive.name != "while"  # its trips would not be known
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                out += work_of(
                    getattr(inner, "jaxpr", inner), times * equation.params.get("length", 1)
                )
    return out


@pytest.mark.parametrize(
    ("name", "sizes", "most"), [("glm45", (1, 64, 8), 1.15), ("glm45_air", (1, 16, 8), 1.25)]
)
def test_work_of_a_device_at_real_size(name, sizes, most):
    """Every matrix of 92 or 46 layers in the optimizer's update, traced for a pod. What is above
    total / devices: matrices of attention, dense layers and heads are fewer than the devices, so
    their columns are split, which costs half as much again.
    """
    run = run_config(importlib.import_module(f"configs.{name}").get_config())
    spec = TrainSpec.create(run.model, run.optimizer)
    state = jax.eval_shape(spec.initial_state, jax.random.key(0))
    arguments = state.params, state.opt_state, state.params
    alone = work_of(jax.make_jaxpr(spec.optimizer.update)(*arguments).jaxpr)
    mesh = AbstractMesh((*sizes, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    with jax.sharding.use_abstract_mesh(mesh):
        ours = work_of(jax.make_jaxpr(spec.optimizer.update)(*arguments).jaxpr)
    assert 1 <= ours["flops"] / (alone["flops"] / mesh.size) < most
    # ZeRO-1 moves each expert device's gradients and weights once, in bfloat16.
    zero = 2 * 2 * sum(x.size for x in jax.tree.leaves(state.params)) / mesh.shape["expert"]
    assert 0 < ours["bytes"] < zero / 3
