"""Arrays from one placement to another on the same devices, by each device's own parts: what a
device lacks is sent to it, and nothing is made whole that no device wants whole.

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
    """First pieces are exchanged in rounds, then devices that want the same part gather it, each
    having received a share of it.

    middle: what devices hold between the two. gather: groups of devices and the dimension; None
    where every device wants a part of its own.
    """

    source: Layout
    middle: Layout
    piece: tuple[int, ...]
    rounds: list[Round]
    gather: tuple[list[list[int]], int] | None

    @classmethod
    def between(cls, source: Layout, target: Layout, size: tuple[int, ...]) -> Move:
        """size: of the whole array of the source; what a larger target has beyond it is filled."""
        middle, gather = _shares(source, target)
        piece = tuple(map(math.gcd, source.shape, middle.shape))
        rounds = [] if source.equals(middle) else _rounds(source, middle, piece, size)
        return cls(source, middle, piece, rounds, gather)

    @property
    def is_nothing(self) -> bool:
        """Whether every device has what it wants."""
        return self.source.equals(self.middle) and self.gather is None

    def run(self, x: jax.Array, axes: tuple[str, ...], fill: float) -> jax.Array:
        """Inside shard_map over all axes of the mesh: a device's part of the target, by its part of
        the source.
        """
        if not self.source.equals(self.middle):
            me = jax.lax.axis_index(axes)
            out = jnp.full(self.middle.shape, fill, x.dtype)
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
    """Splits a part that several devices want among them, along the dimension that the source
    splits most. A device's share is one that it holds already, where that can be.
    """
    groups = list(target.holders().values())
    split = [
        wanted // held if wanted % held == 0 else 1
        for wanted, held in zip(target.shape, source.shape, strict=True)
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


def _rounds(source: Layout, target: Layout, piece, size) -> list[Round]:
    """Every piece that a device of the target wants, from one that has it; as few rounds as can
    be.
    """
    holders, sends = source.holders(), collections.Counter()
    wanted = []  # (sender, receiver), place of the piece
    for receiver, start in enumerate(target.starts):
        steps = [range(0, whole, step) for whole, step in zip(target.shape, piece, strict=True)]
        for offset in itertools.product(*steps):
            place = start + np.array(offset, int)
            if (place >= size).any():
                continue
            having = holders[tuple(place // source.shape)]
            sender = min(having, key=lambda d: (d != receiver, sends[d], abs(d - receiver)))
            sends[sender] += 1
            wanted.append(((sender, receiver), place))
    rounds = collections.defaultdict(list)
    for number, edge in zip(_numbered([pair for pair, _ in wanted]), wanted, strict=True):
        rounds[number].append(edge)
    out = []
    for edges in rounds.values():
        sent, stored = np.zeros_like(source.starts), np.zeros_like(source.starts)
        for (sender, receiver), place in edges:
            sent[sender] = place - source.starts[sender]
            stored[receiver] = place - target.starts[receiver]
        out.append(Round([pair for pair, _ in edges], sent, stored))
    return out


def _numbered(pairs: list[tuple[int, int]]) -> list[int]:
    """A round for each pair of sender and receiver, so that nobody sends or receives twice in one;
    as many as the busiest device needs (Koenig's theorem: a bipartite graph's edges take as many
    colours as its largest degree).
    """
    taken = collections.defaultdict(dict)  # (role, device) -> round -> number of the pair
    rounds = [0] * len(pairs)
    free = lambda end: next(r for r in itertools.count() if r not in taken[end])
    for number, (sender, receiver) in enumerate(pairs):
        ends = ("sends", sender), ("receives", receiver)
        first, second = map(free, ends)
        # The receiver is made free in the sender's round: pairs along the path from it, which are
        # in one of the two rounds by turns, change places.
        path, end, now = [], ends[1], first
        while first != second and now in taken[end]:
            path.append(taken[end][now])
            other = pairs[path[-1]][end[0] == "sends"]
            end = ("receives" if end[0] == "sends" else "sends", other)
            now = second if now == first else first
        for changed in path:
            for one in _ends(pairs[changed]):
                taken[one].pop(rounds[changed])
        for changed in path:
            rounds[changed] = second if rounds[changed] == first else first
            for one in _ends(pairs[changed]):
                taken[one][rounds[changed]] = changed
        rounds[number] = first
        for one in ends:
            taken[one][first] = number
    return rounds


def _ends(pair: tuple[int, int]) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("sends", pair[0]), ("receives", pair[1])


def relabelled(x: jax.Array, sharding: NamedSharding, shape: tuple[int, ...]) -> jax.Array:
    """The same buffers as an array of another shape and sharding, by which every device holds a
    part of the shape that it holds. This process has all devices.
    """
    return jax.make_array_from_single_device_arrays(
        shape, sharding, [part.data for part in x.addressable_shards]
    )
