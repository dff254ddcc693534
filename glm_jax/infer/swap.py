"""New weights for the engine: what the trainer holds becomes what the engine computes with, in one
program.

Every device first casts or quantises what it holds, then sends what others lack: FP8 travels, not
float32. The trainer's mesh and the engine's are of the same devices, which may stand in another
order and split the weights in other ways.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from glm_jax.infer import quantize
from glm_jax.model.layers import axes_of
from glm_jax.resharding import Layout, Move, relabelled
from glm_jax.sharding import by_part, named, split_axes

FILLS = (0.0, 1.0)  # of values and scales, where the engine's go beyond the trainer's matrix


@dataclasses.dataclass(frozen=True)
class Change:
    """How one parameter becomes the engine's.

    format: as quantize.format_of says. source: where the trainer has it; None: there is one device.
    arrays: shape and place of the engine's array, or of its values and its scales.
    """

    format: str
    source: NamedSharding | None
    arrays: tuple[tuple[tuple[int, ...], NamedSharding | None], ...]

    def run(self, w: jax.Array) -> list[jax.Array]:
        """The engine's arrays; on a mesh each device's part of them, as by_part puts it."""
        if self.source is None:
            return [
                jnp.pad(
                    x,
                    [(0, more - size) for size, more in zip(x.shape, shape, strict=True)],
                    constant_values=fill,
                )
                for x, (shape, _), fill in zip(self._made(w), self.arrays, FILLS, strict=False)
            ]
        axes, moves = self.source.mesh.axis_names, self.moves(w.shape)
        split = split_axes(self.source, w.ndim)[-2:]

        def part(w):
            made = zip(self._made(w, split), moves, FILLS, strict=False)
            return [move.run(x, axes, fill) for x, move, fill in made]

        return by_part(part, self.source)(w)

    def _made(self, w: jax.Array, split=((), ())) -> list[jax.Array]:
        if self.format in quantize.FORMATS:
            return jax.tree.leaves(quantize.quantize(w, self.format, split))
        return [w.astype(self.format)]

    def moves(self, size: tuple[int, ...]) -> list[Move]:
        """Of each array, from where it is made of a parameter of this size to its place."""
        mesh = self.source.mesh
        made = [(Layout.of(self.source, size, mesh), size)]
        if self.format in quantize.FORMATS:
            made.append(_scales(*made[0], quantize.block_of(self.format, size)))
        return [
            Move.between(layout, Layout.of(place, shape, mesh), whole)
            for (layout, whole), (shape, place) in zip(made, self.arrays, strict=True)
        ]

    def is_nothing(self, w: jax.Array) -> bool:
        """Whether the engine takes the trainer's own buffers."""
        same = self.format == str(w.dtype)
        return same and (self.source is None or all(m.is_nothing for m in self.moves(w.shape)))


def _scales(layout: Layout, size, block) -> tuple[Layout, tuple[int, ...]]:
    """Where quantize.quantize makes the scales of a matrix, and how many there are along each
    dimension.
    """
    starts, shape, whole = layout.starts.copy(), list(layout.shape), list(size)
    for dim, step in zip((-2, -1), block, strict=True):
        whole[dim] = -(-size[dim] // step)
        own = shape[dim] == size[dim] or shape[dim] % step == 0
        starts[:, dim] = starts[:, dim] // step if own else 0
        shape[dim] = -(-shape[dim] // step) if own else whole[dim]
    return Layout(starts, tuple(shape)), tuple(whole)


@functools.partial(jax.jit, static_argnums=0)
def make(changes: tuple[Change, ...], weights: list[jax.Array]) -> list[list[jax.Array]]:
    """The engine's arrays of each parameter, as Change.run gives them."""
    return [change.run(w) for change, w in zip(changes, weights, strict=True)]


def changes_of(
    state: nnx.State, format: str, compute_dtype: str, mesh: Mesh | None
) -> tuple[list[Change], nnx.State]:
    """Of each parameter, and what they make: shapes in their places, by the rules in use. The state
    holds arrays or placed shapes, on the mesh's devices.
    """
    target = quantize.abstract(state, format, compute_dtype, mesh)
    changes = []
    for (path, variable), (_, wanted) in zip(
        nnx.to_flat_state(state), nnx.to_flat_state(target), strict=True
    ):
        arrays = tuple((x.shape, x.sharding) for x in jax.tree.leaves(wanted.get_value()))
        source = None if mesh is None else variable.get_value().sharding
        found = quantize.format_of(path, variable, format, compute_dtype)
        changes.append(Change(found, source, arrays))
    return changes, target


def to_make(changes: list[Change], state: nnx.State) -> tuple[tuple[Change, ...], list[jax.Array]]:
    """The arguments of `make`: the changes that are any, and their weights."""
    weights = [variable.get_value() for _, variable in nnx.to_flat_state(state)]
    some = [(c, w) for c, w in zip(changes, weights, strict=True) if not c.is_nothing(w)]
    return tuple(c for c, _ in some), [w for _, w in some]


def prepare(
    state: nnx.State, format: str, compute_dtype: str, mesh: Mesh | None
) -> tuple[nnx.State, list[jax.Array]]:
    """A model's state as the engine keeps it, by the rules in use: matrices quantised, or cast to
    compute precision once and not in every step. Besides, those of its arrays that are new, and not
    the given state's.

    mesh: the engine's, or None. The state may lie on it, on another mesh of the same devices, or on
    any other device.
    """
    state = _placed(state, mesh)
    changes, target = changes_of(state, format, compute_dtype, mesh)
    made = iter(make(*to_make(changes, state)))
    out, new = [], []
    for (path, variable), (_, given), change in zip(
        nnx.to_flat_state(target), nnx.to_flat_state(state), changes, strict=True
    ):
        same = change.is_nothing(given.get_value())
        arrays = [given.get_value()] if same else next(made)
        if mesh is not None:
            arrays = [
                relabelled(x, place, shape)
                for x, (shape, place) in zip(arrays, change.arrays, strict=True)
            ]
        new += [] if same else arrays
        structure = jax.tree.structure(variable.get_value())
        out.append((path, variable.replace(jax.tree.unflatten(structure, arrays))))
    return nnx.from_flat_state(out), new


def _placed(state: nnx.State, mesh: Mesh | None) -> nnx.State:
    """On the engine's devices: weights that are elsewhere are split over its mesh as they are."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, state)
    meshes = {getattr(getattr(w, "sharding", None), "mesh", None) for w in jax.tree.leaves(state)}
    if len(meshes) == 1 and None not in meshes:
        (found,) = meshes
        if set(found.devices.flat) == set(mesh.devices.flat):
            return state
    return nnx.from_flat_state(
        [
            (path, v.replace(jax.device_put(v.get_value(), named(mesh, axes_of(v)))))
            for path, v in nnx.to_flat_state(state)
        ]
    )
