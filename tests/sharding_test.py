import itertools
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from glm_jax import sharding
from glm_jax.sharding import RULES, MeshConfig, data_rank, make_mesh, named, one_process, spec
from pallas_kernels.compiler import tpu_devices


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


def mesh_of(processes, **sizes):
    """A mesh whose devices, in order, are of these processes."""
    sizes = {**dict.fromkeys(sharding.MESH_AXES, 1), **sizes}
    devices = np.empty(len(processes), object)
    devices[:] = [types.SimpleNamespace(process_index=p) for p in processes]
    return types.SimpleNamespace(
        devices=devices.reshape(tuple(sizes.values())), axis_names=tuple(sizes), shape=sizes
    )


def each(count, devices):
    """`devices` neighbouring devices of each process."""
    return [process for process in range(count) for _ in range(devices)]


@pytest.mark.parametrize(
    ("processes", "sizes", "indices"),
    [
        # 6 processes: every axis of the batch crosses them
        (each(6, 2), {"data": 3, "fsdp": 2, "expert": 2}, [0, 1, 2, 3, 4, 5]),
        (each(6, 1), {"data": 3, "fsdp": 2}, [0, 1, 2, 3, 4, 5]),
        (each(6, 1), {"fsdp": 3, "expert": 2}, [0, 1, 2, 3, 4, 5]),
        # 3 parts x 2 processes that read the same: their axis does not split the batch
        (each(6, 1), {"data": 3, "tensor": 2}, [0, 0, 1, 1, 2, 2]),
        (each(6, 1), {"expert": 3, "context": 2}, [0, 0, 1, 1, 2, 2]),
        (each(6, 3), {"fsdp": 3, "tensor": 6}, [0, 0, 1, 1, 2, 2]),
        # 2 parts x 3 processes
        (each(6, 1), {"data": 2, "tensor": 3}, [0, 0, 0, 1, 1, 1]),
        (each(6, 2), {"data": 2, "context": 3, "tensor": 2}, [0, 0, 0, 1, 1, 1]),
        # tensor inside of the processes
        (each(6, 2), {"fsdp": 6, "tensor": 2}, [0, 1, 2, 3, 4, 5]),
        (each(6, 4), {"fsdp": 3, "expert": 4, "tensor": 2}, [0, 1, 2, 3, 4, 5]),
        # nothing splits the batch
        (each(6, 1), {"tensor": 6}, [0] * 6),
        # parts are numbered along the batch, whatever the processes' numbers
        ([4, 4, 0, 0, 2, 2, 1, 1, 5, 5, 3, 3], {"data": 3, "fsdp": 4}, [1, 3, 2, 5, 0, 4]),
        ([4, 0, 2, 1, 5, 3], {"data": 3, "tensor": 2}, [0, 1, 1, 2, 0, 2]),
        # a process's devices apart along the batch, as on a pod
        ([0, 1, 2, 0, 1, 2], {"fsdp": 2, "expert": 3}, [0, 1, 2]),
        ([0, 1, 2, 3, 1, 0, 3, 2], {"fsdp": 2, "expert": 2, "tensor": 2}, [0, 0, 1, 1]),
    ],
)
def test_processes_read_the_rows_that_their_devices_hold(processes, sizes, indices):
    mesh = mesh_of(processes, **sizes)
    ranks = [data_rank(mesh, process) for process in range(len(indices))]
    assert [index for index, _ in ranks] == indices
    assert {count for _, count in ranks} == {len(set(indices))}
    # by definition: a device that shares its place in the batch with another shares its part
    for (a, one), (b, other) in itertools.combinations(np.ndenumerate(mesh.devices), 2):
        if a[:3] == b[:3]:
            assert indices[one.process_index] == indices[other.process_index]


@pytest.mark.parametrize(
    ("processes", "sizes", "message"),
    [
        (
            [0, 1, 1, 2, 2, 0],
            {"data": 3, "tensor": 2},
            r"0 has \[0, 2\] and process 1 \[0, 1",
        ),
        ([0, 0, 1], {"data": 3}, r"process 0 has \[0, 1\] and process 1 \[2\]"),
        (
            [0, 0, 0, 1, 2, 2, 1, 1],
            {"fsdp": 4, "tensor": 2},
            r"process 0 has \[0, 1\] and process 1",
        ),
        ([3, 3, 7, 7], {"data": 4}, "process 0 has no device in the mesh, .* processes 3, 7"),
    ],
)
def test_rows_that_cannot_be_dealt_to_processes_are_named(processes, sizes, message):
    mesh = mesh_of(processes, **sizes)
    for process in [0] if "no device" in message else set(processes):
        with pytest.raises(ValueError, match=message):  # in every process: none waits for another
            data_rank(mesh, process)


@pytest.mark.parametrize("topology", ["v5p:4x4x8", "v5e:4x4"])
def test_hosts_of_a_real_topology_each_read_a_part(topology):
    """Their devices are not neighbours along the batch."""
    devices = tpu_devices(topology)
    mesh = make_mesh(mesh_config(fsdp=-1, expert=8), devices)
    hosts = sorted({d.process_index for d in devices})
    assert len(hosts) == len(devices) // 4
    ranks = [data_rank(mesh, host) for host in hosts]
    assert sorted(ranks) == [(index, len(hosts)) for index in range(len(hosts))]


def test_one_process_reads_all_rows():
    assert data_rank(make_mesh(mesh_config(fsdp=2, expert=4))) == (0, 1)


def test_devices_of_other_processes_are_named():
    one_process("the engine")
    one_process("the engine", jax.devices()[:3])
    with pytest.raises(ValueError, match="the engine runs in one process.* processes 2, 5, too"):
        one_process("the engine", mesh_of([0, 5, 2, 0], data=4).devices.flat)


def test_rules_are_a_value_that_changes_what_is_compiled():
    mesh, traced = make_mesh(mesh_config(fsdp=4, expert=2)), []

    @jax.jit
    def own_part(x):
        traced.append(sharding.parts("embed"))
        shape = lambda x: jax.numpy.full((1, 1), x.shape[0])
        return sharding.by_device(shape, (("embed",),), ("embed", "batch"))(x)

    elsewhere = RULES.changed(embed=("expert",), batch=("data", "fsdp"))
    for rules, split in ((RULES.changed(batch=("data",)), 4), (elsewhere, 2), (elsewhere, 2)):
        with sharding.use(mesh, rules):
            assert own_part(np.zeros(8))[0, 0] == 8 // split
            assert named(mesh, ("embed",)).spec == PartitionSpec(rules["embed"][0])
    assert traced == [4, 2] and sharding.rules_in_use() == RULES
    assert elsewhere == RULES.changed(batch=("data", "fsdp"), embed=("expert",)) != RULES


def test_parts_of_the_batch_follow_the_rules():
    mesh = mesh_of(each(6, 1), data=3, fsdp=2)
    with sharding.ruled(RULES.changed(batch=("data",))):
        assert [data_rank(mesh, p)[0] for p in range(6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedd": ("fsdp",)}, "logical axis 'embedd' is not one of embed"),
        ({"embed": ("fdsp",)}, r"rules: 'embed' over \('fdsp',\); mesh axes are data, fsdp"),
    ],
)
def test_wrong_rules_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RULES.changed(**change)
