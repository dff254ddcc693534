"""Arrays from one placement to another on the same devices, by each device's own parts: what a
device lacks is sent to it, and nothing is made whole that no device keeps whole.

XLA's partitioner does that for some pairs of placements. For others, such as experts over 8 and
width over 8 devices to experts over 32, it makes the array whole on every device first.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from scipy import sparse
from scipy.sparse import csgraph


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Which part of an array each device holds: its first element, [devices, dimensions], and its
    shape, of all devices the same.
    """

    starts: np.ndarray
    shape: tuple[int, ...]

    @classmethod
    def of(cls, sharding: NamedSharding, shape: tuple[int, ...], mesh: Mesh) -> Layout:
        """Devices in the order of the mesh, which need not be the sharding's own."""
        held = sharding.devices_indices_map(shape)
        starts = [[part.start or 0 for part in held[device]] for device in mesh.devices.flat]
        starts = np.array(starts, int).reshape(mesh.size, len(shape))
        return cls(starts, sharding.shard_shape(shape))

    def grown(self, added: tuple[int, ...]) -> Layout:
        """Of an array that is so much longer along dimensions that are not split."""
        return Layout(self.starts, tuple(map(sum, zip(self.shape, added, strict=True))))

    def equals(self, other: Layout) -> bool:
        return self.shape == other.shape and np.array_equal(self.starts, other.starts)

    def holders(self) -> dict[tuple[int, ...], list[int]]:
        """Devices by the number of the part that they hold along each dimension."""
        found = collections.defaultdict(list)
        for device, start in enumerate(self.starts):
            found[tuple(s // size for s, size in zip(start, self.shape, strict=True))].append(
                device
            )
        return found


@dataclasses.dataclass(frozen=True)
class Round:
    """One piece for each device at most: pairs of sender and receiver, and where the piece lies in
    the part of each, [devices, dimensions].
    """

    pairs: list[tuple[int, int]]
    sent: np.ndarray
    stored: np.ndarray


@dataclasses.dataclass(frozen=True)
class Move:
    """First pieces are exchanged in rounds, then devices that keep the same part gather it, each
    having received a share of it.

    middle: what devices hold between the two. gather: groups of devices and the dimension; None
    where every device keeps a part of its own.
    """

    source: Layout
    middle: Layout
    piece: tuple[int, ...]
    rounds: list[Round]
    gather: tuple[list[list[int]], int] | None

    @classmethod
    def between(cls, source: Layout, target: Layout) -> Move:
        """Of an array whose parts the devices hold."""
        middle, gather = _shares(source, target)
        piece = tuple(map(math.gcd, source.shape, middle.shape))
        rounds = [] if source.equals(middle) else _rounds(source, middle, piece)
        return cls(source, middle, piece, rounds, gather)

    def run(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Inside shard_map over all axes of the mesh: a device's part of the target, by its part of
        the source.
        """
        if not self.source.equals(self.middle):
            me = jax.lax.axis_index(axes)
            out = jnp.zeros(self.middle.shape, x.dtype)
            for exchanged in self.rounds:
                out = self._exchange(exchanged, x, out, me, axes)
            x = out
        if self.gather is not None:
            groups, dim = self.gather
            x = jax.lax.all_gather(x, axes, axis_index_groups=groups, axis=dim, tiled=True)
        return x

    def _exchange(self, exchanged: Round, x, out, me, axes):
        stored = _own(exchanged.stored, me)
        piece = jax.lax.dynamic_slice(x, _own(exchanged.sent, me), self.piece)
        if any(sender != receiver for sender, receiver in exchanged.pairs):
            piece = jax.lax.ppermute(piece, axes, exchanged.pairs)
        if len(exchanged.pairs) < len(self.source.starts):
            receives = np.zeros(len(self.source.starts), bool)
            receives[[receiver for _, receiver in exchanged.pairs]] = True
            kept = jax.lax.dynamic_slice(out, stored, self.piece)
            piece = jnp.where(jnp.asarray(receives)[me], piece, kept)
        return jax.lax.dynamic_update_slice(out, piece, stored)


def _own(places: np.ndarray, me: jax.Array) -> list:
    """This device's row; numbers that are the same for all devices stay known to the compiler."""
    same = (places == places[:1]).all(axis=0)
    return [
        int(column[0]) if known else jnp.asarray(column)[me]
        for column, known in zip(places.T, same, strict=True)
    ]


def _shares(source: Layout, target: Layout) -> tuple[Layout, tuple[list[list[int]], int] | None]:
    """Splits a part that several devices keep among them, along the dimension that the source
    splits most. A device's share is one that it holds already, where that can be.
    """
    groups = list(target.holders().values())
    split = [
        needed // held if needed % held == 0 else 1
        for needed, held in zip(target.shape, source.shape, strict=True)
    ]
    dim = int(np.argmax(split))
    count = math.gcd(len(groups[0]), split[dim])
    if count == 1:
        return target, None
    shape = list(target.shape)
    shape[dim] //= count
    starts, gathering = target.starts.copy(), []
    for devices in groups:
        ordered = sorted(devices, key=lambda device: (source.starts[device, dim], device))
        shares = np.array(ordered).reshape(count, -1)
        for number, holders in enumerate(shares):
            starts[holders, dim] += number * shape[dim]
        gathering += shares.T.tolist()
    return Layout(starts, tuple(shape)), (gathering, dim)


def _rounds(source: Layout, target: Layout, piece: tuple[int, ...]) -> list[Round]:
    """Every piece that a device of the target needs, from one that has it; each round as full as
    can be.
    """
    holders, sends = source.holders(), collections.Counter()
    pieces = collections.defaultdict(list)  # (sender, receiver) -> their places in the array
    for receiver, start in enumerate(target.starts):
        steps = [range(0, whole, step) for whole, step in zip(target.shape, piece, strict=True)]
        for offset in itertools.product(*steps):
            place = start + np.array(offset, int)
            having = holders[tuple(place // source.shape)]
            sender = min(having, key=lambda d: (d != receiver, sends[d], abs(d - receiver)))
            sends[sender] += 1
            pieces[sender, receiver].append(place)
    out = []
    while pieces:
        pairs = _matching(list(pieces), len(source.starts))
        sent, stored = np.zeros_like(source.starts), np.zeros_like(source.starts)
        for sender, receiver in pairs:
            place = pieces[sender, receiver].pop()
            sent[sender] = place - source.starts[sender]
            stored[receiver] = place - target.starts[receiver]
            if not pieces[sender, receiver]:
                del pieces[sender, receiver]
        out.append(Round(pairs, sent, stored))
    return out


def _matching(pairs: list[tuple[int, int]], devices: int) -> list[tuple[int, int]]:
    """As many of the pairs of sender and receiver as can be, none of which shares either with
    another. Where all have as many pieces left to send and to receive, that is all devices.
    """
    senders, receivers = zip(*pairs, strict=True)
    graph = sparse.coo_array((np.ones(len(pairs)), (senders, receivers)), (devices, devices))
    found = csgraph.maximum_bipartite_matching(graph.tocsr(), perm_type="column")
    return [(s, int(receiver)) for s, receiver in enumerate(found) if receiver >= 0]


def relabelled(x: jax.Array, sharding: NamedSharding, shape: tuple[int, ...]) -> jax.Array:
    """The same buffers as an array of another shape and sharding, by which every device holds a
    part of the shape that it holds. This process has all devices.
    """
    return jax.make_array_from_single_device_arrays(
        shape, sharding, [part.data for part in x.addressable_shards]
    )
