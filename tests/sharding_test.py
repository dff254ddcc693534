import jax
import pytest
from jax.sharding import PartitionSpec

from glm_jax import sharding
from glm_jax.sharding import MeshConfig, make_mesh, named, spec


def mesh_config(**sizes) -> MeshConfig:
    return MeshConfig(**{**dict.fromkeys(sharding.MESH_AXES, 1), **sizes})


def test_spec_maps_logical_axes_to_mesh_axes():
    assert spec(("experts", "embed", "mlp")) == PartitionSpec("expert", "fsdp", "tensor")
    assert spec(("batch", "length")) == PartitionSpec(("data", "fsdp", "expert"), "context")
    assert spec((None, "norm")) == PartitionSpec(None, None)


def test_an_unknown_axis_raises():
    with pytest.raises(ValueError, match="'embedd' of .* is not one of embed, vocab"):
        spec(("embedd",))


def test_a_mesh_axis_used_twice_raises():
    with pytest.raises(ValueError, match="'vocab' and 'heads' both want mesh axis 'tensor'"):
        spec(("heads", "vocab"))


def test_minus_one_takes_what_is_left_over():
    mesh = make_mesh(mesh_config(fsdp=-1, expert=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 2, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "needs 3 devices, there are 8"),
        ({"data": -1, "fsdp": -1}, "only one axis can be -1, not data, fsdp"),
        ({"data": 0}, "mesh.data=0"),
        ({"data": -1, "tensor": 2}, "mesh.tensor=2: this axis is not supported yet"),
    ],
)
def test_impossible_meshes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(mesh_config(**sizes))


def test_a_dimension_that_does_not_divide_is_named():
    mesh = make_mesh(mesh_config(expert=8))
    with pytest.raises(
        ValueError, match="w: 'experts' of size 12 cannot be split over 'expert', 8 devices"
    ):
        named(mesh, ("experts", "embed"), (12, 4), "w")


def test_constrain_without_a_mesh_returns_the_array_itself():
    x = jax.numpy.ones(3)
    assert sharding.constrain(x, "embed") is x
