"""The order of a pod's devices, and what an all-to-all among them costs, counted link by link."""

import itertools
import math
import types

import numpy as np
import pytest

from glm_jax import sharding
from glm_jax.sharding import MESH_AXES, MeshConfig, make_mesh
from glm_jax.torus import Torus, arranged, place
from pallas_kernels.compiler import tpu_devices


def chips(*shape, kind="TPU v5", cores=1, slice_index=0):
    return [
        types.SimpleNamespace(
            coords=coords,
            core_on_chip=core,
            device_kind=kind,
            slice_index=slice_index,
            platform="tpu",
        )
        for *coords, core in itertools.product(*map(range, shape), range(cores))
    ]


def busiest(pod: Torus, groups) -> float:
    """Load of the busiest link where each device sends 1 / n to each of its group of n, by shortest
    ways along x, y and z, both ways around where they are as long.
    """
    load = {}

    def go(at, axis, towards, hops, amount):
        for _ in range(hops):
            load[at, axis, towards] = load.get((at, axis, towards), 0) + amount
            at = tuple((c + towards) % pod.shape[i] if i == axis else c for i, c in enumerate(at))

    for group in groups:
        for source, target in itertools.product(group, repeat=2):
            at = list(source)
            for axis in range(3):
                size, ahead = pod.shape[axis], target[axis] - at[axis]
                ways = (
                    {1: ahead % size, -1: -ahead % size}
                    if pod.wraps[axis]
                    else {1 if ahead >= 0 else -1: abs(ahead)}
                )
                shortest = [towards for towards, hops in ways.items() if hops == min(ways.values())]
                for towards in shortest:
                    go(tuple(at), axis, towards, ways[towards], 1 / len(group) / len(shortest))
                at[axis] = target[axis]
    return max(load.values())


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((4, 4, 4), (2, 1, 32)), ((4, 4, 4), (1, 8, 8)), ((8, 8, 8), (1, 64, 8)),
        ((4, 4, 8), (1, 16, 8)), ((2, 2, 4), (1, 4, 4)),
        ((4, 8, 8), (4, 16, 4)), ((2, 3, 5), (1, 5, 6)),
    ],
)  # fmt: skip
def test_cost_of_an_all_to_all_is_that_of_its_busiest_link(shape, sizes):
    devices = chips(*shape)
    pod = Torus.of(devices)
    mesh = arranged(devices, sizes)
    assert mesh.shape == sizes and len({place(device) for device in mesh.flat}) == math.prod(shape)
    for axis in range(3):
        groups = [
            [place(device) for device in row]
            for row in np.moveaxis(mesh, axis, -1).reshape(-1, sizes[axis])
        ]
        blocks = {pod.block(group) for group in groups}
        assert len(blocks) == 1
        if sizes[axis] > 1:
            assert pod.spread(blocks.pop()) == pytest.approx(busiest(pod, groups))


def test_experts_stand_in_cubes():
    mesh = arranged(chips(8, 8, 8), (1, 64, 8))
    pod = Torus.of(chips(8, 8, 8))
    block = pod.block([place(device) for device in mesh[0, 0]])
    assert block == ((2, 1), (2, 1), (2, 1), (1, 1)) and (pod.spread(block), pod.hops(block)) == (
        0.5,
        3,
    )
    along_a_line = ((8, 1), (1, 1), (1, 1), (1, 1))
    assert (pod.spread(along_a_line), pod.hops(along_a_line), pod.ring(along_a_line)) == (1.0, 4, 1)


def test_two_devices_of_a_chip_stay_together():
    mesh = arranged(chips(2, 2, 4, kind="TPU v4", cores=2), (1, 16, 2))
    assert all(a.coords == b.coords for a, b in mesh[0])


def test_slices_are_parts_of_the_first_axis():
    devices = [*chips(2, 2, 2, slice_index=3), *chips(2, 2, 2, slice_index=7)]
    mesh = arranged(devices[::-1], (4, 2, 2))
    assert [{device.slice_index for device in part.flat} for part in mesh] == [{3}, {3}, {7}, {7}]
    with pytest.raises(ValueError, match="first axis is 1 cannot be split over 2 slices"):
        arranged(devices, (1, 4, 4))


def test_missing_devices_are_named():
    with pytest.raises(ValueError, match="7 devices do not fill a torus"):
        arranged(chips(2, 2, 2)[1:], (1, 7, 1))


def test_only_axes_of_16_are_rings_in_a_flat_pod():
    assert Torus.of(chips(16, 8, 1, kind="TPU v6 lite")).wraps == (True, False, False, False)


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [("v5p:4x4x4", (2, 1, 32)), ("v6e:16x16", (1, 32, 8)), ("v4:2x2x4", (1, 4, 8))],
)
def test_a_mesh_of_a_real_topology(topology, sizes):
    """jax.make_mesh takes none of these."""
    devices = tpu_devices(topology)
    mesh = make_mesh(MeshConfig(*sizes, 1, 1), devices)
    assert (
        mesh.axis_names == MESH_AXES
        and mesh.devices.shape == (*sizes, 1, 1)
        and set(mesh.devices.flat) == set(devices)
    )
    assert set(sharding.BATCH_AXES) <= set(mesh.axis_names)
