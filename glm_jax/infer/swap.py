"""New weights for the engine: what the trainer holds becomes what the engine computes with, in one
program.

Every device first casts or quantises what it holds, then sends what others lack: FP8 travels, not
float32. The trainer's mesh and the engine's are of the same devices, which may stand in another
order and split the weights in other ways.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from glm_jax.infer import quantize
from glm_jax.model.layers import axes_of
from glm_jax.resharding import Layout, Move, relabelled
from glm_jax.sharding import by_part, named, split_axes


@dataclasses.dataclass(frozen=True)
class Change:
    """How one parameter becomes the engine's.

    format: as quantize.format_of says. source: where the trainer has it; None: there is one device.
    targets: shape and place of the engine's array, or of its values and its scales.
    """

    format: str
    source: NamedSharding | None
    targets: tuple[tuple[tuple[int, ...], NamedSharding | None], ...]

    def run(self, w: jax.Array) -> list[jax.Array]:
        """The engine's arrays; on a mesh each device's part of them, as by_part puts it."""
        if self.source is None:
            return self._made(w, self._added(w.shape))
        if not self._is_stack(w.ndim):
            return by_part(self._part(self.source, w.shape), self.source)(w)
        # One after the other: what is gathered would else stand beside the result of all layers.
        targets = tuple(((1, *shape[1:]), place) for shape, place in self.targets)
        one = dataclasses.replace(self, targets=targets)
        layer = one._part(self.source, (1, *w.shape[1:]))
        one_layer = lambda w: [x[0] for x in layer(w[None])]
        return by_part(lambda w: jax.lax.map(one_layer, w), self.source)(w)

    def _is_stack(self, dims: int) -> bool:
        """Whether matrices lie along a first dimension that no device has a part of only."""
        places = [self.source, *(place for _, place in self.targets)]
        return dims > 2 and not any(place and split_axes(place, dims)[0] for place in places)

    def _part(self, source: NamedSharding, size: tuple[int, ...]):
        """A device's parts of the engine's arrays, by its part of a parameter of this size."""
        added, split = self._added(size), split_axes(source, len(size))
        assert not any(n and over for n, over in zip(added[0], split, strict=True)), (
            "zeros cannot be added to a part of a dimension"
        )
        axes, moves = source.mesh.axis_names, self._moves(source, size, added)

        def part(w):
            made = self._made(w, added, split[-2:])
            return [move.run(x, axes) for x, move in zip(made, moves, strict=True)]

        return part

    def _wholes(self, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes of what is made of a parameter of this size, before anything is added."""
        quantised = self.format in quantize.FORMATS
        return [size, quantize.scale_shape(self.format, size)] if quantised else [size]

    def _added(self, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """What the engine's arrays have beyond that, along each dimension."""
        return [
            tuple(more - less for more, less in zip(shape, whole, strict=True))
            for (shape, _), whole in zip(self.targets, self._wholes(size), strict=True)
        ]

    def _made(self, w: jax.Array, added, split=((), ())) -> list[jax.Array]:
        """The engine's arrays where w is: values with zeros added, scales with ones."""
        if self.format in quantize.FORMATS:
            made = jax.tree.leaves(quantize.quantize(w, self.format, split))
        else:
            made = [w.astype(self.format)]
        return [
            jnp.pad(x, [(0, n) for n in more], constant_values=fill)
            for x, more, fill in zip(made, added, (0, 1), strict=False)
        ]

    def _moves(self, source: NamedSharding, size: tuple[int, ...], added) -> list[Move]:
        """Of each array, from where it is made to its place."""
        mesh = source.mesh
        assert isinstance(mesh, Mesh)
        made, moves = [Layout.of(source, size, mesh)], []
        if self.format in quantize.FORMATS:
            made.append(_scales(made[0], size, quantize.block_of(self.format, size)))
        for layout, more, (shape, place) in zip(made, added, self.targets, strict=True):
            assert place is not None
            moves.append(Move.between(layout.grown(more), Layout.of(place, shape, mesh)))
        return moves


def _scales(layout: Layout, size: tuple[int, ...], block: tuple[int, int]) -> Layout:
    """Where quantize.quantize makes the scales of a matrix [..., D, F] of this size."""
    starts, shape = layout.starts.copy(), list(layout.shape)
    for dim, step in zip((-2, -1), block, strict=True):
        own = shape[dim] == size[dim] or shape[dim] % step == 0
        starts[:, dim] = starts[:, dim] // step if own else 0
        shape[dim] = -(-(shape if own else size)[dim] // step)
    return Layout(starts, tuple(shape))


@functools.partial(jax.jit, static_argnums=0)
def make(changes: tuple[Change, ...], weights: list[jax.Array]) -> list[list[jax.Array]]:
    """The engine's arrays of each parameter, as Change.run gives them."""
    return [change.run(w) for change, w in zip(changes, weights, strict=True)]


def changes_of(
    state: nnx.State, format: str, compute_dtype: str, mesh: Mesh | None
) -> tuple[tuple[Change, ...], nnx.State]:
    """Of each parameter, and what they make: shapes in their places, by the rules in use. The state
    holds arrays or placed shapes, on the mesh's devices.
    """
    target, changes = quantize.abstract(state, format, compute_dtype, mesh), []
    for (path, variable), (_, made) in zip(
        nnx.to_flat_state(state), nnx.to_flat_state(target), strict=True
    ):
        targets = tuple((x.shape, x.sharding) for x in jax.tree.leaves(made.get_value()))
        source = None if mesh is None else variable.get_value().sharding
        found = quantize.format_of(path, variable, format, compute_dtype)
        changes.append(Change(found, source, targets))
    return tuple(changes), target


def prepare(state: nnx.State, format: str, compute_dtype: str, mesh: Mesh | None) -> nnx.State:
    """A model's state as the engine keeps it, by the rules in use: matrices quantised, or cast to
    compute precision once and not in every step. All arrays are new: the trainer's stay its own,
    and it may donate them to its next step.

    mesh: the engine's, or None. The state may lie on it, on another mesh of the same devices, or on
    any other device.
    """
    state = _placed(state, mesh)
    changes, target = changes_of(state, format, compute_dtype, mesh)
    places, structure = jax.tree.flatten(target)
    arrays = itertools.chain(*make(changes, jax.tree.leaves(state)))
    if mesh is not None:
        pairs = zip(arrays, places, strict=True)
        arrays = [relabelled(x, place.sharding, place.shape) for x, place in pairs]
    return jax.tree.unflatten(structure, arrays)


def _placed(state: nnx.State, mesh: Mesh | None) -> nnx.State:
    """On the engine's devices: weights that are elsewhere are split over its mesh as they are."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, state)
    devices = set(mesh.devices.flat)
    places = [getattr(w, "sharding", None) for w in jax.tree.leaves(state)]
    if all(isinstance(p, NamedSharding) and p.device_set == devices for p in places):
        return state
    return nnx.from_flat_state(
        [
            (path, v.replace(jax.device_put(v.get_value(), named(mesh, axes_of(v)))))
            for path, v in nnx.to_flat_state(state)
        ]
    )
