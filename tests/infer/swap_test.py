"""New weights for the engine on meshes: bit for bit those of one device, and what travels."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from glm_jax import sharding
from glm_jax.infer import quantize, swap
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.model.layers import axes_of
from glm_jax.model.transformer import GLM
from glm_jax.sharding import RULES, MeshConfig, make_mesh, named
from tests.infer.engine_test import SIZES
from tests.model.oracle import tiny_config

# 5 MoE layers and 12 experts; a width of 2.5 blocks, so that blocks lie on several devices; dense
# layers that get zeros to whole blocks.
CONFIG = tiny_config(
    num_layers=7, num_dense_layers=2, hidden_size=320, num_experts=12, dense_ffn_size=200,
    expert_ffn_size=136, num_heads=8, num_kv_heads=4, head_size=32,
)  # fmt: skip
ARRAYS = re.compile(r"[a-z]+\d+\w*\[([\d,]+)\]")  # in a program's text
SHUFFLED = [5, 0, 3, 6, 1, 7, 2, 4]
# sizes of the trainer's mesh and of the engine's, and whether its devices stand in another order
MESHES = [
    ((1, 4, 2), (2, 1, 4), False),
    ((1, 8, 1), (2, 1, 4), True),
    ((1, 2, 2), (1, 2, 2), False),
    ((1, 2, 4), (2, 2, 2), True),
]


@pytest.fixture(scope="module")
def model():
    return GLM(CONFIG, rngs=nnx.Rngs(0))


def mesh_of(sizes, shuffled=False):
    devices = jax.devices()[: int(np.prod(sizes))]
    return make_mesh(
        MeshConfig(*sizes, 1, 1), [devices[i] for i in SHUFFLED] if shuffled else devices
    )


def split(state, mesh):
    """As the trainer has it."""
    return nnx.from_flat_state([
        (path, v.replace(jax.device_put(v.get_value(), named(mesh, axes_of(v)))))
        for path, v in nnx.to_flat_state(state)
    ])  # fmt: skip


def leaves(state):
    return [(path, jax.tree.leaves(v.get_value())) for path, v in nnx.to_flat_state(state)]


@pytest.mark.parametrize("format", quantize.FORMATS)
@pytest.mark.parametrize(("trainer", "engine", "shuffled"), MESHES)
def test_a_mesh_makes_the_bits_of_one_device(model, format, trainer, engine, shuffled):
    state, mesh = nnx.state(model), mesh_of(engine, shuffled)
    alone = swap.prepare(state, format, "bfloat16", None)
    ours = swap.prepare(split(state, mesh_of(trainer)), format, "bfloat16", mesh)
    targets = leaves(quantize.abstract(state, format, "bfloat16", mesh))
    for (path, arrays), (_, others), (_, shapes) in zip(
        leaves(ours), leaves(alone), targets, strict=True
    ):
        for x, y, shape in zip(arrays, others, shapes, strict=True):
            assert x.sharding == shape.sharding and x.shape == y.shape == shape.shape, path
            assert x.dtype == y.dtype == shape.dtype, path
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def part_of(x):
    return int(np.prod(x.sharding.shard_shape(x.shape)))


@pytest.mark.parametrize("format", quantize.FORMATS)
@pytest.mark.parametrize(("trainer", "engine", "shuffled"), MESHES[:2])
def test_a_device_makes_no_more_of_a_matrix_than_it_has_or_keeps(
    model, format, trainer, engine, shuffled
):
    """Of the whole program: no array of one device is larger than the largest part of a parameter
    on either mesh, a quarter of the experts' matrices, be it of all layers or of one. XLA's own
    resharding makes those whole.
    """
    state = split(nnx.state(model), mesh_of(trainer))
    changes, target = swap.changes_of(state, format, "bfloat16", mesh_of(engine, shuffled))
    text = swap.make.lower(changes, jax.tree.leaves(state)).compile().as_text()
    shapes = [tuple(map(int, dims.split(","))) for dims in ARRAYS.findall(text)]
    kept = jax.tree.leaves((state, target))
    largest = max(map(part_of, kept))
    assert largest == max(x.size for x in jax.tree.leaves(target)) / 4
    assert max(map(np.prod, shapes)) == largest
    # beside the stack of MoE layers, as one of them is in their loop: the MTP block's are as large
    single = max(part_of(x) for x in kept if x.shape[0] != CONFIG.num_moe_layers)
    assert max(np.prod(s) for s in shapes if s[0] != CONFIG.num_moe_layers) == single < largest / 3


@pytest.mark.parametrize(("trainer", "engine", "shuffled"), MESHES[:2])
def test_fp8_travels_and_not_float32(model, trainer, engine, shuffled):
    """Of a quantised matrix scales and the largest values of parts of blocks are all that moves in
    float32. Read before XLA compiles, which for the CPU makes FP8 float16; plan_test.py reads what
    it makes for a TPU.
    """
    state = split(nnx.state(model), mesh_of(trainer))
    changes, _ = swap.changes_of(state, "fp8", "bfloat16", mesh_of(engine, shuffled))
    pairs = zip(changes, jax.tree.leaves(state), strict=True)
    quantised, weights = zip(*[(c, w) for c, w in pairs if c.format == "fp8"], strict=True)
    assert len(quantised) > 10
    text = swap.make.lower(quantised, weights).as_text()
    moved = re.findall(r"\.(?:all_gather|collective_permute)\W.*-> tensor<([\dx]+)x(\w+)>", text)
    sizes = {dtype: [0] for _, dtype in moved}
    for dims, dtype in moved:
        sizes[dtype].append(int(np.prod([int(n) for n in dims.split("x")])))
    largest = max(w.size for w in weights) // 5  # of one layer, as they go one after the other
    assert max(sizes["f8E4M3FN"]) > largest / 8 > 8 * max(sizes["f32"]), sizes
    assert set(sizes) <= {"f8E4M3FN", "f32"} and "all_to_all" not in text


@pytest.mark.parametrize("mesh", [None, (1, 2, 4)])
def test_the_engine_frees_its_old_weights_and_never_the_trainers(model, mesh):
    """Before it makes new ones: both need not fit at once. Nothing is shared, so that either may
    delete what is its own.
    """
    mesh = mesh and mesh_of(mesh)
    state = nnx.state(model) if mesh is None else split(nnx.state(model), mesh)
    sizes = SIZES | {"weights": "fp8", "draft_tokens": 0}
    engine = Engine(nnx.merge(nnx.graphdef(model), state), EngineConfig(**sizes), mesh=mesh)
    old, first = engine.state, list(map(np.array, jax.tree.leaves(engine.state)))
    other = jax.tree.map(lambda x: x * 1.5, state)
    engine.set_weights(other, recompute=True)
    for path, variable in nnx.to_flat_state(old):
        assert all(x.is_deleted() for x in jax.tree.leaves(variable.get_value())), path
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, other)))
    engine.set_weights(state, recompute=True)
    for x, y in zip(jax.tree.leaves(engine.state), first, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, other)))


def test_the_engines_own_rules_place_the_weights(model):
    mesh, state = mesh_of((1, 2, 4)), nnx.state(model)
    with sharding.ruled(RULES.changed(experts=(), embed=())):
        ours = swap.prepare(split_by_default(state, mesh), "int8", "bfloat16", mesh)
    alone = swap.prepare(state, "int8", "bfloat16", None)
    for (path, arrays), (_, others) in zip(leaves(ours), leaves(alone), strict=True):
        for x, y in zip(arrays, others, strict=True):
            assert x.sharding.is_fully_replicated, path
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def split_by_default(state, mesh):
    with sharding.ruled(RULES):
        return split(state, mesh)
