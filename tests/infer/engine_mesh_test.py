"""The engine on meshes of simulated devices against the engine on one."""

import types

import numpy as np
import pytest

from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.infer.sampling import SamplingParams
from glm_jax.sharding import RULES
from tests.infer.engine_test import SIZES, assert_all_returned, engine, model, prompts  # noqa: F401
from tests.train.mesh_test import mesh_of

PARAMS = [SamplingParams(max_new_tokens=4 + i % 5, temperature=i % 2, seed=i) for i in range(12)]


@pytest.fixture(scope="module")
def alone(model):  # noqa: F811
    return engine(model, keep_experts=True).generate(prompts(12), PARAMS)


@pytest.mark.parametrize(("sizes", "changes"), [
    ((2, 1, 4), {"num_rows": 16, "num_pages": 128, "draft_tokens": 1}),
    ((1, 2, 2), {"num_rows": 8, "num_pages": 32, "weights": "compute"}),
])  # fmt: skip
def test_a_mesh_draws_the_same_tokens(model, alone, sizes, changes):  # noqa: F811
    ours = Engine(
        model, EngineConfig(**SIZES | {"keep_experts": True} | changes), mesh=mesh_of(sizes)
    )
    assert (
        ours.pages[0].sharding.shard_shape(ours.pages[0].shape)[1]
        == ours.config.num_pages // ours.shards
    )
    answers = ours.generate(prompts(12), PARAMS)
    assert [a.tokens for a in answers] == [a.tokens for a in alone]
    for answer, other in zip(answers, alone, strict=True):
        assert (answer.experts[:, : model.config.num_moe_layers] == other.experts).all()
    assert {r.shard for r in answers} == set(range(ours.shards))
    assert_all_returned(ours)


def test_an_engine_has_rules_of_its_own(model, alone):  # noqa: F811
    """Weights whole on every device, where those of training would be split."""
    mesh, sizes = mesh_of((1, 2, 2)), SIZES | {"keep_experts": True, "num_rows": 8, "num_pages": 32}
    rules = RULES.changed(experts=(), embed=())
    ours = Engine(model, EngineConfig(**sizes), mesh=mesh, rules=rules)
    gate = ours.state["moe_layers"]["mlp"]["experts"]["gate_proj"].get_value()
    assert gate.sharding.is_fully_replicated
    answers = ours.generate(prompts(12), PARAMS)
    assert [a.tokens for a in answers] == [a.tokens for a in alone]
    assert_all_returned(ours)
    with pytest.raises(ValueError, match="a device must hold the pages of its own rows"):
        Engine(model, EngineConfig(**sizes), mesh=mesh, rules=RULES.changed(pages=("data",)))


def test_quantised_weights_are_placed_like_the_matrices(model):  # noqa: F811
    mesh = mesh_of((1, 2, 4))
    ours = Engine(model, EngineConfig(**SIZES | {"weights": "fp8"}), mesh=mesh)
    gate = ours.state["moe_layers"]["mlp"]["experts"]["gate_proj"].get_value()
    experts = model.config.num_experts
    assert gate.values.sharding.shard_shape(gate.values.shape)[1] == experts // 4
    assert gate.scale.sharding.shard_shape(gate.scale.shape)[1] == experts // 4
    assert (
        engine(model, weights="fp8").generate(prompts(2), PARAMS[:2])[0].tokens
        == ours.generate(prompts(2), PARAMS[:2])[0].tokens
    )


def test_rows_and_pages_must_divide_over_the_shards(model):  # noqa: F811
    with pytest.raises(ValueError, match="num_rows=6 cannot be split over 4 shards"):
        Engine(model, EngineConfig(**SIZES | {"num_rows": 6}), mesh=mesh_of((4, 1, 1)))


def test_a_mesh_with_devices_of_other_processes_is_refused(model):  # noqa: F811
    devices = np.array([types.SimpleNamespace(process_index=i) for i in range(4)])
    mesh = types.SimpleNamespace(devices=devices)
    with pytest.raises(ValueError, match=r"the engine runs in one process.* processes 1, 2, 3"):
        Engine(model, EngineConfig(**SIZES), mesh=mesh)
