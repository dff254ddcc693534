"""The same training steps on meshes of eight simulated devices as on one device."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from experiments.entry import run_config
from glm_jax.sharding import MESH_AXES, RULES, MeshConfig, make_mesh, named, ruled
from glm_jax.train.state import TrainSpec
from glm_jax.train.step import StepScalars, compile_step

STEPS, ROWS, LENGTH = 3, 8, 32
MESHES = [  # data, fsdp, expert
    (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 1, 4), (1, 2, 4), (1, 4, 2), (2, 2, 2),
    (4, 1, 2),
]  # fmt: skip


def batch_of(vocab_size: int) -> dict[str, np.ndarray]:
    """One microbatch with several documents a row and padding, [1, B, L]."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (1, ROWS, LENGTH)), axis=-1).astype(np.int32)
    segments[0, 0, 20:] = 0
    tokens, targets = (
        rng.integers(0, vocab_size, (1, ROWS, LENGTH)).astype(np.int32) for _ in range(2)
    )
    starts = np.concatenate(
        [np.ones((1, ROWS, 1), bool), segments[..., 1:] != segments[..., :-1]], axis=-1
    )
    index = np.broadcast_to(np.arange(LENGTH), segments.shape)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)
    weights = (segments > 0).astype(np.float32)
    return {
        "tokens": tokens, "targets": targets, "segment_ids": segments,
        "positions": positions.astype(np.int32), "loss_weights": weights
    }  # fmt: skip


def mesh_of(sizes):
    config = MeshConfig(
        **{**dict.fromkeys(MESH_AXES, 1), **dict(zip(MESH_AXES, sizes, strict=False))}
    )
    return make_mesh(config, jax.devices()[: int(np.prod(sizes))])


def run_steps(spec: TrainSpec, initial, sizes) -> dict[bool, list]:
    """{one expert gets every token: [(metrics, params, router, optimizer state) of every step, on
    the host]}.
    """
    mesh = mesh_of(sizes)
    batch = batch_of(spec.config.vocab_size)
    batch = {n: jax.device_put(x, named(mesh, (None, "batch", "length"))) for n, x in batch.items()}
    scalars = StepScalars(jnp.int32(1), jnp.float32(2e-3), jnp.float32(0.3), jnp.float32(1e-3))
    step, out = compile_step(spec, 1e-4, mesh), {}
    for one_expert in (False, True):
        state = initial
        if one_expert:  # every token chooses expert 0
            raised = jax.tree.map(lambda b: b + 100.0 * (np.arange(b.shape[-1]) == 0), state.router)
            state = dataclasses.replace(state, router=raised)
        state = jax.tree.map(
            lambda x, a: jax.device_put(x.astype(a.dtype), a.sharding),
            state,
            spec.abstract_state(mesh),
        )
        out[one_expert] = []
        with jax.set_mesh(mesh):
            for _ in range(STEPS):
                state, metrics = step(state, batch, scalars)
                out[one_expert].append(
                    jax.device_get((metrics, state.params, state.router, state.opt_state))
                )
    assert step._cache_size() == 1, (
        "a state that comes back placed otherwise compiles the step anew"
    )
    return out


@pytest.fixture(scope="module")
def spec():
    from configs import tiny

    config = tiny.get_config()
    config.model.update(toy.MODEL)
    config.data.sequence_length = LENGTH
    config.optimizer.max_grad_norm = 0.0  # so that the momentum after a step is the gradient itself
    run = run_config(config)
    return TrainSpec.create(run.model, run.optimizer)


@pytest.fixture(scope="module")
def initial(spec):
    """The initial state on the host."""
    return jax.device_get(spec.create_state(mesh_of((1, 1, 1)), 0))


@pytest.fixture(scope="module")
def one_device(spec, initial):
    return run_steps(spec, initial, (1, 1, 1))


def assert_close(ours, oracle, tolerance, what):
    """Norm of the difference over the norm, leaf by leaf."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(oracle), strict=True
    ):
        norm = np.linalg.norm(np.asarray(b, np.float64))
        error = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        assert error <= tolerance * norm + 1e-12, (
            f"{what}{jax.tree_util.keystr(path)}: {error / max(norm, 1e-30):.2e}"
        )


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "x".join(map(str, s)))
def test_three_steps_equal_one_device(spec, initial, one_device, sizes):
    results = run_steps(spec, initial, sizes)
    for one_expert, step in itertools.product((False, True), range(STEPS)):
        metrics, params, router, opt_state = results[one_expert][step]
        oracle = one_device[one_expert][step]
        where = f"one expert {one_expert}, step {step}, "
        np.testing.assert_array_equal(metrics["expert_counts"], oracle[0]["expert_counts"])
        np.testing.assert_allclose(metrics["loss"], oracle[0]["loss"], rtol=1e-5)
        assert_close(opt_state, oracle[3], 1e-5, where + "gradients ")
        assert_close(params, oracle[1], 1e-5, where + "params ")
        jax.tree.map(np.testing.assert_array_equal, router, oracle[2])
        if one_expert:
            tokens = int((batch_of(spec.config.vocab_size)["segment_ids"] > 0).sum())
            np.testing.assert_array_equal(metrics["expert_counts"][:, 0], tokens)


@pytest.mark.parametrize(
    ("expert_exchange", "expert_buffer"), [("all_gather", 1.25), ("all_to_all", 0.3)]
)
def test_other_exchanges_equal_one_device(
    spec, initial, one_device, expert_exchange, expert_buffer
):
    """What the cases above do in one round or a few, all tokens at every device, and in many
    rounds.
    """
    config = dataclasses.replace(
        spec.config, expert_exchange=expert_exchange, expert_buffer=expert_buffer
    )
    results = run_steps(dataclasses.replace(spec, config=config), initial, (2, 1, 4))
    for one_expert in (False, True):
        metrics, params, _, opt_state = results[one_expert][0]
        np.testing.assert_allclose(metrics["loss"], one_device[one_expert][0][0]["loss"], rtol=1e-5)
        assert_close(opt_state, one_device[one_expert][0][3], 1e-5, "gradients ")
        assert_close(params, one_device[one_expert][0][1], 1e-5, "params ")


def test_other_rules_equal_one_device(spec, initial, one_device):
    """Every device has all experts, and the width is split over another axis."""
    with ruled(RULES.changed(experts=(), embed=("data",))):
        results = run_steps(spec, initial, (2, 1, 4))
        placed = spec.abstract_state(mesh_of((2, 1, 4))).params["moe_layers"]["mlp"]["experts"]
    shape = placed["gate_proj"].sharding.shard_shape(placed["gate_proj"].shape)
    assert shape == (1, 8, 32 // 2, 16)
    for one_expert in (False, True):
        metrics, params, _, opt_state = results[one_expert][0]
        np.testing.assert_allclose(metrics["loss"], one_device[one_expert][0][0]["loss"], rtol=1e-5)
        assert_close(opt_state, one_device[one_expert][0][3], 1e-5, "gradients ")
        assert_close(params, one_device[one_expert][0][1], 1e-5, "params ")


def test_a_state_is_born_split_and_equal_to_one_devices(spec, initial):
    state = spec.create_state(mesh_of((2, 2, 2)), 0)
    jax.tree.map(np.testing.assert_array_equal, state, initial)
    experts = state.params["moe_layers"]["mlp"]["experts"]["gate_proj"]
    assert experts.addressable_shards[0].data.shape == (1, 4, 16, 16) and experts.shape == (
        1,
        8,
        32,
        16,
    )
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == experts.shape]
    assert moments and all(m.sharding == experts.sharding for m in moments)
