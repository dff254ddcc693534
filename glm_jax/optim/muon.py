"""Muon (momentum orthogonalised by Newton-Schulz) as an optax transformation over stacks of
matrices.

Formulas: Moonlight, arXiv 2502.16982, section 2; GLM-4.5, arXiv 2508.06471, section 2.4 (N = 5,
momentum 0.95, update RMS 0.2). The last two dimensions of a leaf are one matrix; all before them
(layers, experts) are a batch of matrices.

On a mesh, matrices of one shape and placement are one batch, padded to the number of devices that
hold them. Each device gets its share of whole matrices by one all-to-all in ns_dtype, and gives
them back by another. Large matrices that are fewer than the devices are split along their longer
side instead, and sum their Gram matrices.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from glm_jax.sharding import by_device, split_over

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-8
# shorter side of a matrix that is split where there are fewer than devices: alone it would keep one
# device busy for long
LARGE = 2048


class MuonState(NamedTuple):
    momentum: optax.Updates


def scale_by_muon(
    *,
    momentum: float,
    nesterov: bool,
    ns_steps: int,
    ns_dtype: str,
    update_rms: float,
    head_splits=None,
    axes=None,
) -> optax.GradientTransformation:
    """Replaces gradients by update_rms * sqrt(max(fan_in, fan_out)) * NewtonSchulz(momentum): RMS
    about update_rms.

    M = momentum * M + g; with Nesterov the direction is momentum * M + g. Add weight decay and the
    learning rate after it.

    Args:
      momentum, nesterov: as above.
      ns_steps: Newton-Schulz iterations. ns_dtype: their precision, 'bfloat16' in the paper.
      update_rms: 0.2 matches AdamW's usual update, so that both share a learning rate.
      head_splits: optional tree of (axis, parts) or None like the parameters: `axis` (-1 or -2) is
        cut into `parts` matrices orthogonalised apart, one a head.
      axes: optional tree of logical axes like the parameters, `layers` in front left out: where
        they lie on a mesh.
    """

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        buffer = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)
        direction = (
            jax.tree.map(lambda m, g: momentum * m + g, buffer, updates) if nesterov else buffer
        )
        leaves, treedef = jax.tree.flatten(direction)
        splits = [None] * len(leaves) if head_splits is None else treedef.flatten_up_to(head_splits)
        splits = [split or (-1, 1) for split in splits]
        named = [()] * len(leaves) if axes is None else treedef.flatten_up_to(axes)
        placed = tuple(
            (None,) * (x.ndim - len(own)) + tuple(own) for x, own in zip(leaves, named, strict=True)
        )
        over = [tuple(split_over(axis) for axis in where) for where in placed]
        mesh = jax.sharding.get_abstract_mesh()
        sizes = {} if mesh.empty else {axis: size for axis, size in mesh.shape.items() if size > 1}

        def run(*leaves):
            stacks = [
                _Stack.of(_split(x, *s), where, sizes)
                for x, s, where in zip(leaves, splits, over, strict=True)
            ]
            found = _orthogonalize(stacks, ns_steps, ns_dtype)
            scaled = (
                y.astype(x.dtype) * (update_rms * math.sqrt(max(s.sides)))
                for x, y, s in zip(leaves, found, stacks, strict=True)
            )
            return tuple(
                _join(y.reshape(s.shape), *split)
                for y, s, split in zip(scaled, stacks, splits, strict=True)
            )

        found = by_device(run, placed, placed)(*leaves)
        return treedef.unflatten(found), MuonState(buffer)

    return optax.GradientTransformation(init, update)


def _split(x, axis: int, parts: int):
    """[..., m, n] -> [..., parts, m, n / parts] (axis -1) or [..., parts, m / parts, n] (axis
    -2).
    """
    if parts == 1:
        return x
    *batch, m, n = x.shape
    if axis == -2:
        return x.reshape(*batch, parts, m // parts, n)
    return jnp.moveaxis(x.reshape(*batch, m, parts, n // parts), -2, -3)


def _join(x, axis: int, parts: int):
    if parts == 1:
        return x
    if axis == -1:
        x = jnp.moveaxis(x, -3, -2)
        return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def newton_schulz(x: jax.Array, steps: int, dtype: str) -> jax.Array:
    """Brings the singular values of every matrix in x [..., m, n] near 1 (0.7 to 1.2 after five
    steps).

    X0 = X / ||X||_F; X <- a X + (b A + c A A) X with A = X X^T, on the shorter side. Returns x's
    shape and type.
    """
    return (
        _orthogonalize([_Stack.of(x, ((),) * x.ndim, {})], steps, dtype)[0]
        .reshape(x.shape)
        .astype(x.dtype)
    )


@dataclasses.dataclass(frozen=True)
class _Stack:
    """A device's part of a batch of matrices.

    x: [N, m, n]; shape: before its batch dimensions were joined. sides: (m, n) of a whole matrix.
    dim: 1 or 2, which of them is split over the mesh axes `over`; None: whole. free: mesh axes over
    which the stack is repeated. sizes: of the mesh axes, those over 1.
    """

    x: jax.Array
    shape: tuple[int, ...]
    sides: tuple[int, int]
    dim: int | None
    over: tuple[str, ...]
    free: tuple[str, ...]
    sizes: dict[str, int]

    @classmethod
    def of(cls, x, where, sizes):
        """where: the mesh axes, of those in sizes, that split each dimension; those of the last two
        are of the matrix, whatever batch dimensions x has.
        """
        dims = [dim for dim in (1, 2) if where[dim - 3]]
        if len(dims) > 1:
            raise NotImplementedError(f"Muon: matrices split along both sides, {where}")
        over = where[dims[0] - 3] if dims else ()
        parts = math.prod(sizes[a] for a in over)
        sides = tuple(
            size * (parts if dim in dims else 1)
            for dim, size in zip((1, 2), x.shape[-2:], strict=True)
        )
        used = {axis for axes in where for axis in axes}
        free = tuple(axis for axis in sizes if axis not in used)
        return cls(
            x.reshape(-1, *x.shape[-2:]),
            x.shape,
            sides,
            dims[0] if dims else None,
            over,
            free,
            sizes,
        )

    @property
    def key(self):
        """Stacks of one key can be one stack."""
        return self.sides, self.dim, self.over, self.free

    def parts(self, axes) -> int:
        return math.prod(self.sizes[a] for a in axes)

    def normalised(self, dtype) -> jax.Array:
        """Every matrix over its Frobenius norm."""
        squares = jnp.sum(self.x * self.x, axis=(1, 2), keepdims=True)
        squares = jax.lax.psum(squares, self.over) if self.over else squares
        return (self.x / (jnp.sqrt(squares) + EPS)).astype(dtype)


def _orthogonalize(stacks: list[_Stack], steps: int, dtype: str) -> list[jax.Array]:
    """NewtonSchulz of every stack, [N, m, n] in dtype; those that can be are one batch."""
    alike = collections.defaultdict(list)  # key -> numbers of stacks
    for number, stack in enumerate(stacks):
        alike[stack.key].append(number)
    whole = collections.defaultdict(list)  # shorter and longer side -> (keys, matrices, ways back)
    out = {}

    def put(key, y):
        ends = [sum(len(stacks[n].x) for n in alike[key][: i + 1]) for i in range(len(alike[key]))]
        out.update(zip(alike[key], jnp.split(y, ends[:-1]), strict=True))

    for key, numbers in alike.items():
        first = stacks[numbers[0]]
        x = jnp.concatenate([stacks[n].normalised(dtype) for n in numbers])
        if (
            first.over
            and min(first.sides) >= LARGE
            and len(x) < first.parts(first.over) * first.parts(first.free)
        ):
            x, back = _columns(first, x)
            put(key, back(_iterate(x, steps, first.over)))
        else:
            x, back = _dealt(first, x)
            whole[tuple(sorted(first.sides))].append((key, x, back))
    for items in whole.values():
        y = _iterate(jnp.concatenate([x for _, x, _ in items]), steps, ())
        for key, x, back in items:
            put(key, back(y[: len(x)]))
            y = y[len(x) :]
    return [out[number] for number in range(len(stacks))]


def _dealt(stack: _Stack, x):
    """This device's share of whole matrices, the shorter side first, some of them zeros; and the
    reverse move.
    """
    share, put_together = _share(stack, x, stack.parts(stack.over))
    if stack.over:
        share = jax.lax.all_to_all(share, stack.over, 0, stack.dim, tiled=True)
    swap = stack.sides[0] > stack.sides[1]

    def back(y):
        y = y.swapaxes(1, 2) if swap else y
        return put_together(
            jax.lax.all_to_all(y, stack.over, stack.dim, 0, tiled=True) if stack.over else y
        )

    return share.swapaxes(1, 2) if swap else share, back


def _columns(stack: _Stack, x):
    """Some matrices, the shorter side first, and of each this device's part of the longer side; and
    the reverse move.
    """
    share, put_together = _share(stack, x, 1)
    swap, parts = stack.sides[0] > stack.sides[1], stack.parts(stack.over)
    share = share.swapaxes(1, 2) if swap else share
    move = stack.dim == (2 if swap else 1)  # it is the shorter side that is split
    width = share.shape[2]
    if move:
        share = jnp.pad(share, ((0, 0), (0, 0), (0, -width % parts)))
        share = jax.lax.all_to_all(share, stack.over, 2, 1, tiled=True)

    def back(y):
        y = jax.lax.all_to_all(y, stack.over, 1, 2, tiled=True)[..., :width] if move else y
        return put_together(y.swapaxes(1, 2) if swap else y)

    return share, back


def _share(stack: _Stack, x, parts: int):
    """Of matrices that are repeated over the free axes, this device's, their number a multiple of
    `parts`; and the reverse move.
    """
    count, among = len(x), stack.parts(stack.free)
    x = jnp.pad(x, ((0, -count % (parts * among)), (0, 0), (0, 0)))
    if stack.free:
        own = len(x) // among
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(stack.free) * own, own)

    def back(y):
        return (jax.lax.all_gather(y, stack.free, tiled=True) if stack.free else y)[:count]

    return x, back


def _iterate(x, steps: int, over):
    """Newton-Schulz steps on matrices [N, s, l] of norm 1, s <= l; `over`: mesh axes that split
    their longer side.
    """
    a, b, c = COEFFICIENTS

    def whole(_, x):
        gram = x @ x.swapaxes(1, 2)
        return a * x + (b * gram + c * (gram @ gram)) @ x

    def split(_, x):
        """(gram gram) x as gram (gram x): of few columns that is less work."""
        gram = jnp.einsum("nsl,ntl->nst", x, x, preferred_element_type=jnp.float32)
        gram = jax.lax.psum(gram, over).astype(x.dtype)
        y = gram @ x
        return a * x + b * y + c * (gram @ y)

    return jax.lax.fori_loop(0, steps, split if over else whole, x)
