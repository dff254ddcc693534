import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.entry import run_config
from glm_jax.config import REMAT_POLICIES
from glm_jax.sharding import MeshConfig, make_mesh
from glm_jax.train.state import TrainSpec
from glm_jax.train.step import StepScalars, compile_step, gradients, map_routers, step_totals

ROWS, LENGTH = 4, 32


@pytest.fixture
def spec(toy_config):
    run = run_config(toy_config)
    return TrainSpec.create(run.model, run.optimizer)


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=1, expert=1, context=1, tensor=1), jax.devices()[:1])


def batch_of(microbatches: int) -> dict:
    rng = np.random.default_rng(0)
    shape = (microbatches, ROWS * 2 // microbatches, LENGTH)
    tokens, targets = rng.integers(0, 300, (2, *shape)).astype(np.int32)
    segments = np.broadcast_to(1 + np.arange(LENGTH) // 20, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH) % 20, shape).astype(np.int32)
    weights = rng.integers(0, 2, shape).astype(np.float32)
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments,
        "positions": positions,
        "loss_weights": weights,
    }


def scalars(microbatches: int, rate: float = 1e-3) -> StepScalars:
    return StepScalars(
        jnp.int32(microbatches), jnp.float32(rate), jnp.float32(0.3), jnp.float32(1e-3)
    )


def test_scales_and_biases_of_stacked_layers_are_vectors_and_their_matrices_are_muons(spec):
    groups = {
        "/".join(entry.key for entry in path): group
        for path, group in jax.tree_util.tree_leaves_with_path(spec.groups)
    }
    vectors = {name for name, group in groups.items() if group == "vector"}
    assert vectors == {n for n in groups if "norm" in n or n.endswith("bias")} and vectors
    assert {n for n, group in groups.items() if group == "embedding"} == {"embed_tokens/weight"}
    assert {groups[n] for n in groups if "proj/weight" in n or "lm_head" in n} == {"muon"}


def test_two_microbatches_equal_one_batch_and_a_third_empty_one_changes_nothing(spec):
    state = spec.initial_state(jax.random.key(0))
    compute = jax.jit(lambda batch, scalars: gradients(spec, state, batch, scalars, 1e-4))
    whole = compute(batch_of(1), scalars(1))
    halves = batch_of(2)
    # the third is not to be read
    padded = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), halves)
    for parts in (compute(halves, scalars(2)), compute(padded, scalars(2))):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), whole, parts
        )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_totals_are_of_the_live_microbatches_and_never_zero(microbatches):
    """What a loss is divided by: a step that has nothing to predict must give no NaN."""
    batch = batch_of(2)
    live = jax.tree.map(lambda x: x[:microbatches], batch)
    same = live["segment_ids"][..., 1:] == live["segment_ids"][..., :-1]
    found = step_totals(batch, microbatches)
    assert found["tokens"] == live["tokens"].size
    assert found["targets"] == live["loss_weights"].sum()
    assert found["mtp_targets"] == (live["loss_weights"][..., 1:] * same).sum()
    one = np.zeros_like(batch["loss_weights"])
    one[0, 0, 1] = 1  # a target, and the MTP's target of the position before
    assert step_totals(batch | {"loss_weights": one}, microbatches)["targets"] == 1
    nothing = {name: np.zeros_like(x) for name, x in batch.items()}
    assert all(total == 1 for total in step_totals(nothing, microbatches).values())


def test_what_the_backward_pass_recomputes_changes_nothing(toy_config):
    run, found = run_config(toy_config), {}
    for policy in REMAT_POLICIES:
        spec = TrainSpec.create(dataclasses.replace(run.model, remat=policy), run.optimizer)
        state = spec.initial_state(jax.random.key(0))
        found[policy] = jax.jit(
            lambda batch, scalars, t=spec, s=state: gradients(t, s, batch, scalars, 1e-4)
        )(batch_of(1), scalars(1))
    for policy in REMAT_POLICIES:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            found["none"],
            found[policy],
        )


def test_changing_knobs_compiles_nothing(spec, mesh):
    step = compile_step(spec, 1e-4, mesh)
    state = spec.create_state(mesh, 0)
    for microbatches, rate in ((1, 1e-3), (2, 5e-4)):
        state, _ = step(state, batch_of(2), scalars(microbatches, rate))
    assert step._cache_size() == 1


def test_clipping_scales_every_gradient_by_one_factor(spec, mesh):
    state = spec.create_state(mesh, 0)
    momenta = []
    for limit in (0.0, 0.01):
        clipped = dataclasses.replace(spec, max_grad_norm=limit)
        new, metrics = compile_step(clipped, 1e-4, mesh)(
            jax.tree.map(jnp.copy, state), batch_of(1), scalars(1)
        )
        momenta.append([x for x in jax.tree.leaves(new.opt_state) if x.ndim > 2])
    factor = 0.01 / float(metrics["grad_norm"])
    assert factor < 0.1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a * factor, b, rtol=1e-4, atol=1e-9), *momenta
    )


def test_registry_walks_all_routers_trunk_first_then_mtp():
    router = {"moe_layers": {"b": jnp.zeros((2, 4))}, "mtp": {"b": jnp.zeros(4)}}
    seen = map_routers(lambda table: table + jnp.arange(3.0)[:, None], router)
    np.testing.assert_array_equal(seen["moe_layers"]["b"], [[0] * 4, [1] * 4])
    np.testing.assert_array_equal(seen["mtp"]["b"], [2] * 4)
