"""Moves between placements against jax.device_put, and how much they send."""

import itertools
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.resharding import Layout, Move, relabelled
from glm_jax.sharding import by_part

NAMES = ("a", "b", "c")


def mesh_of(*sizes, order=None) -> Mesh:
    devices = jax.devices()[: int(np.prod(sizes))]
    devices = devices if order is None else [devices[i] for i in order]
    return Mesh(np.array(devices).reshape(sizes), NAMES[: len(sizes)])


SHUFFLED = [5, 0, 3, 6, 1, 7, 2, 4]


def placed(sizes, *entries, order=None) -> NamedSharding:
    return NamedSharding(mesh_of(*sizes, order=order), PartitionSpec(*entries))


PAIRS = [
    # experts over 4 and width over 2 to experts over 4, twice; the same in another order
    (placed((2, 4), "b", "a"), placed((2, 4), "b")),
    (placed((2, 4), "b", "a"), placed((2, 4), "b", order=SHUFFLED)),
    # a dimension split over 8 to another split over 4, and to none
    (placed((8,), None, "a"), placed((2, 4), "b")),
    (placed((8,), None, "a", order=SHUFFLED), placed((8,))),
    # from what every device has
    (placed((8,)), placed((2, 4), "b", "a")),
    # 3 and 2 parts to 2 and 3
    (placed((3, 2), "a", "b"), placed((3, 2), "b", "a")),
    (placed((2, 2, 2), ("c", "a")), placed((2, 2, 2), "b", ("a", "c"), order=SHUFFLED)),
]


def moved(x, target: NamedSharding):
    """x where the target has it, by a Move; and that Move."""
    source, mesh = x.sharding, x.sharding.mesh
    move = Move.between(Layout.of(source, x.shape, mesh), Layout.of(target, x.shape, mesh))
    run = jax.jit(by_part(lambda part: move.run(part, mesh.axis_names), source))
    return relabelled(run(x), target, x.shape), move, run


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_moved_array_is_where_device_put_puts_it(source, target):
    x = np.arange(12 * 24 * 5, dtype=np.float32).reshape(12, 24, 5)
    ours, move, _ = moved(jax.device_put(x, source), target)
    theirs = jax.device_put(x, target)
    assert ours.sharding == target
    for part, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
        assert part.device == other.device and part.index == other.index
        np.testing.assert_array_equal(part.data, other.data)
    # nobody sends or receives two pieces at a time, and nobody waits without need
    sends, receives = np.zeros((2, source.mesh.size), int)
    for exchanged in move.rounds:
        senders, receivers = zip(*exchanged.pairs, strict=True)
        assert len(set(senders)) == len(senders) and len(set(receivers)) == len(receivers)
        sends[list(senders)] += 1
        receives[list(receivers)] += 1
    assert len(move.rounds) == max(*sends, *receives)


@pytest.mark.parametrize(("source", "target"), PAIRS[:4])
def test_a_device_receives_what_it_lacks_and_no_more(source, target):
    """Counted element by element; what several devices keep may come in two steps, each of which
    brings a part of it.
    """
    shape = (12, 24, 5)
    x = jax.device_put(np.zeros(shape, np.float32), source)
    _, move, run = moved(x, target)
    lacking = []
    index = target.devices_indices_map(shape)
    for device, held in source.devices_indices_map(shape).items():
        has, keeps = np.zeros(shape, bool), np.zeros(shape, bool)
        has[held], keeps[index[device]] = True, True
        lacking.append((keeps & ~has).sum())
    groups = 1 if move.gather is None else len(move.gather[0][0])
    shared = int(np.prod(move.middle.shape))
    received = np.zeros(source.mesh.size, int)
    for sender, receiver in itertools.chain(*(r.pairs for r in move.rounds)):
        received[receiver] += (sender != receiver) * int(np.prod(move.piece))
    assert max(received + (groups - 1) * shared) <= max(lacking) + shared
    whole = np.prod(shape)
    sizes = re.findall(r"f32\[([\d,]+)\]", run.lower(x).compile().as_text())
    largest = max(int(np.prod([int(n) for n in dims.split(",")])) for dims in sizes)
    assert largest <= whole // 4 or target.is_fully_replicated


def test_a_move_to_the_same_place_sends_nothing():
    source = placed((2, 4), "b", "a")
    x = jax.device_put(np.zeros((4, 10), np.float32), source)
    same = placed((4, 2), "a", "b", order=[0, 4, 1, 5, 2, 6, 3, 7])
    for target, nothing in ((source, True), (same, True), (placed((2, 4), "b"), False)):
        move = moved(x, target)[1]
        assert (not move.rounds and move.gather is None) == nothing
