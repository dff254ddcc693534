"""Where the chips of a TPU pod stand on their torus: the order of devices that keeps together what
exchanges most, and what it costs.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

# of each axis of the torus: places taken, and links from one to the next
Block = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Torus:
    """shape: chips along each axis, last the devices of a chip. wraps: axes whose ends are
    linked.
    """

    shape: tuple[int, ...]
    wraps: tuple[bool, ...]

    @classmethod
    def of(cls, devices: Sequence) -> Torus:
        """Of all TPU devices of a slice. Cubes of 4 x 4 x 4 chips (v4, v5p, tpu7x) are linked into
        rings along every axis, flat slices (v5e, v6e) along axes of 16.
        """
        places = np.array([place(device) for device in devices])
        shape = tuple(int(size) for size in places.max(axis=0) - places.min(axis=0) + 1)
        if math.prod(shape) != len(devices):
            raise ValueError(
                f"{len(devices)} devices do not fill a torus of {shape} (x, y, z, devices of a"
                " chip)"
            )
        flat = "lite" in devices[0].device_kind
        rings = (
            [size == 16 for size in shape[:3]]
            if flat
            else [all(size % 4 == 0 for size in shape[:3])] * 3
        )
        return cls(shape, (*rings, False))

    def spread(self, block: Block) -> float:
        """Time of an all-to-all among the devices of a block, where a device's whole buffer takes 1
        over one link one way.

        The busiest link's load, by shortest ways along one axis after the other, while all other
        such blocks of the torus do the same. Links inside of a chip are not counted.
        """
        return max(
            self._crossing(axis, taken, step) for axis, (taken, step) in enumerate(block[:3])
        )

    def _crossing(self, axis: int, taken: int, step: int) -> float:
        ring = self.wraps[axis] and taken * step == self.shape[axis]
        # that cross the busiest link, of those along one line
        pairs = (taken * taken - taken % 2) / 8 if ring else taken * taken // 4
        return step * pairs / taken

    def busiest(
        self, pairs: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> tuple[float, int]:
        """Load of the busiest link where the first place of each pair sends 1 to the second, by
        shortest ways along one axis after the other, both ways around where they are as long; and
        links to the farthest of them.
        """
        load, farthest = collections.defaultdict(float), 0
        for source, target in pairs:
            at, hops = list(source), 0
            for axis, size in enumerate(self.shape[:3]):
                ahead = target[axis] - at[axis]
                ways = {1: ahead % size, -1: -ahead % size}
                if not self.wraps[axis]:
                    ways = {1 if ahead > 0 else -1: abs(ahead)}
                links = min(ways.values())
                shortest = [way for way, count in ways.items() if count == links]
                for way in shortest:
                    for step in range(links):
                        here = (*at[:axis], (at[axis] + way * step) % size, *at[axis + 1 :])
                        load[here, axis, way] += 1 / len(shortest)
                at[axis], hops = target[axis], hops + links
            farthest = max(farthest, hops)
        return max(load.values(), default=0.0), farthest

    def ring(self, block: Block) -> int:
        """Links from a device to the next on a ring through a block, which other such blocks' rings
        share.
        """
        return max([step for taken, step in block[:3] if taken > 1], default=1)

    def hops(self, block: Block) -> int:
        """Links between the two devices of a block that are the farthest apart."""
        sizes = zip(block[:3], self.shape, self.wraps, strict=False)
        return sum(
            taken // 2 * step if wraps and taken * step == size else (taken - 1) * step
            for (taken, step), size, wraps in sizes
        )

    def block(self, places: Sequence[Sequence[int]]) -> Block | None:
        """The block that these places make; None where they make none."""
        along = [sorted(set(values)) for values in zip(*places, strict=True)]
        steps = [{b - a for a, b in itertools.pairwise(values)} or {1} for values in along]
        if any(len(step) > 1 for step in steps) or math.prod(map(len, along)) != len(
            set(map(tuple, places))
        ):
            return None
        return tuple((len(values), *step) for values, step in zip(along, steps, strict=True))


def place(device) -> tuple[int, ...]:
    """x, y and z of a TPU device, and its number on its chip."""
    return (*device.coords, device.core_on_chip)


def arranged(devices: Sequence, sizes: Sequence[int]) -> np.ndarray:
    """TPU devices as a mesh of these sizes, which multiply to their number: from the last axis to
    the first, each takes the block whose all-to-all is the fastest, of neighbours first. Unlike
    jax.make_mesh it takes any sizes, and splits axes of the torus.

    Several slices are parts of the first axis. Raises ValueError where that does not divide, or
    where devices are missing.
    """
    slices = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(slices) > 1:
        if sizes[0] % len(slices):
            raise ValueError(
                f"a mesh whose first axis is {sizes[0]} cannot be split over {len(slices)} slices"
                " of a pod"
            )
        of_slice = [
            [device for device in devices if device.slice_index == index] for index in slices
        ]
        return np.concatenate(
            [arranged(own, (sizes[0] // len(slices), *sizes[1:])) for own in of_slice]
        )
    torus = Torus.of(devices)
    first = np.array([place(device) for device in devices]).min(axis=0)
    grid = np.empty(torus.shape, object)
    for device in devices:
        grid[tuple(np.array(place(device)) - first)] = device
    # split: the factors of each axis of the torus, from the last axis of the mesh to the first
    steps, split = [1] * grid.ndim, []
    for size in reversed(sizes):
        found = _factors(
            size, [whole // step for whole, step in zip(torus.shape, steps, strict=True)]
        )
        best = min(
            found,
            key=lambda factors: (
                torus.spread(tuple(zip(factors, steps, strict=True))),
                [-f for f in reversed(factors)],
            ),
        )
        split.append(best)
        steps = [step * factor for step, factor in zip(steps, best, strict=True)]
    # Axes of the torus, each as its factors from the slowest to the fastest; then those of one axis
    # of the mesh side by side.
    count = len(sizes)
    grid = grid.reshape([factors[axis] for axis in range(grid.ndim) for factors in reversed(split)])
    order = [
        axis * count + mesh_axis for mesh_axis in range(count) for axis in range(len(torus.shape))
    ]
    return grid.transpose(order).reshape(sizes)


def _factors(size: int, room: Sequence[int]) -> Iterable[tuple[int, ...]]:
    """The ways to write a size as a product of one divisor of each room."""
    if not room:
        if size == 1:
            yield ()
        return
    for factor in range(1, size + 1):
        if size % factor == 0 and room[0] % factor == 0:
            yield from ((factor, *rest) for rest in _factors(size // factor, room[1:]))
