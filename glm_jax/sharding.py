"""The mesh, and the rules that map logical axes of tensors to mesh axes: a value, of which training
and inference may have one each. Nothing else in glm_jax names a mesh axis or makes a PartitionSpec.

Flax's own rules drop a misspelt or doubled axis silently; `spec` raises instead.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm_jax.config import check_types
from glm_jax.torus import arranged

Array = jax.Array | np.ndarray  # the second on the host, until a step takes it
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
# an expert-parallel device holds its own rows of the batch, too
BATCH_AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis of a tensor -> mesh axes it is split over. Hashable: what is compiled under some
    rules is not taken under others.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self):
        for axis, over in self.table:
            unknown = [a for a in over if a not in MESH_AXES]
            if unknown:
                raise ValueError(
                    f"rules: {axis!r} over {over}; mesh axes are {', '.join(MESH_AXES)}"
                )

    @classmethod
    def of(cls, table: Mapping[str, tuple[str, ...]]) -> Rules:
        return cls(tuple((axis, tuple(over)) for axis, over in table.items()))

    def changed(self, **axes: tuple[str, ...]) -> Rules:
        """These rules but for some logical axes. Raises ValueError for one that they do not
        have.
        """
        for axis in axes:
            self[axis]
        return Rules.of(self._mapping | axes)

    def __getitem__(self, axis: str) -> tuple[str, ...]:
        return self.over(axis, "")

    def over(self, axis: str, where: str) -> tuple[str, ...]:
        """The mesh axes of a logical axis. Raises ValueError, which says where, for an unknown
        one.
        """
        if axis not in self._mapping:
            raise ValueError(
                f"logical axis {axis!r}{where} is not one of {', '.join(self._mapping)}"
            )
        return self._mapping[axis]

    @functools.cached_property
    def _mapping(self) -> dict[str, tuple[str, ...]]:
        return dict(self.table)


RULES = Rules.of({
    # parameters
    "embed": ("fsdp",),  # model width
    "vocab": ("tensor",),
    "heads": ("tensor",),  # query heads x head size
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),  # feed-forward width
    "experts": ("expert",),
    "router": (),  # expert dimension of the router: every device routes over all experts
    "norm": (),
    "layers": (),  # the stacked dimension that scan walks along
    # activations
    "batch": BATCH_AXES,
    "length": ("context",),
    "act_embed": (),
    "act_vocab": ("tensor",),
    "pages": BATCH_AXES,  # of the key-value cache: a device holds those of its own rows
})  # fmt: skip

# jax.jit traces anew where they change
_IN_USE = jax.make_user_context(RULES)


def rules_in_use() -> Rules:
    """Those of the innermost `ruled` or `use`; RULES outside of them."""
    return _IN_USE.value


def ruled(rules: Rules) -> contextlib.AbstractContextManager:
    """Inside of it, everything here goes by these rules."""
    return _IN_USE(rules)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """jax.set_mesh, with the rules that split tensors over it."""
    with ruled(rules), jax.set_mesh(mesh):
        yield


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one of them -1: what is left over."""

    data: int
    fsdp: int
    expert: int
    context: int
    tensor: int

    def __post_init__(self):
        check_types(self)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Mesh over all devices (or those given). Raises ValueError where the sizes do not multiply to
    their number.

    On a TPU the devices of the last axes stand closest together (glm_jax/torus.py): experts are
    exchanged in every layer.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh.{axis}={size}: must be positive, or -1 for what is left over")
    for axis in ("context", "tensor"):
        if sizes[axis] != 1:
            raise ValueError(
                f"mesh.{axis}={sizes[axis]}: this axis is not supported yet, set it to 1"
            )
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh: only one axis can be -1, not {', '.join(free)}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(count // known, 1)
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, there are {count}"
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(MESH_AXES)
    placed = (
        arranged(devices, shape)
        if devices[0].platform == "tpu"
        else np.asarray(devices).reshape(shape)
    )
    return Mesh(placed, MESH_AXES, axis_types=types)


def data_rank(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count): which part of the batch's rows a process reads, of how many equal parts.
    process: None for this one.

    Devices that differ only along axes that do not split the batch hold the same rows, so processes
    that they belong to read the same part. Parts are numbered by their first device along the
    batch. The devices of a part need not stand side by side there, and on a TPU pod they do not:
    jax.make_array_from_process_local_data deals a process's rows to its own devices, in order.

    Raises ValueError, the same in every process, where two processes' rows are neither the same nor
    apart, or not as many; or where the process has no device in the mesh.
    """
    process = jax.process_index() if process is None else process
    batch = [mesh.axis_names.index(axis) for axis in rules_in_use()["batch"]]
    devices = np.moveaxis(mesh.devices, batch, range(len(batch)))
    devices = devices.reshape(math.prod(devices.shape[: len(batch)]), -1)
    places = collections.defaultdict(set)  # process -> of its devices along the batch
    for place, holders in enumerate(devices):
        for device in holders:
            places[device.process_index].add(place)
    if process not in places:
        raise ValueError(
            f"process {process} has no device in the mesh, which is of the processes"
            f" {', '.join(map(str, sorted(places)))}"
        )
    first_reader = {}  # place -> the first process that reads its rows
    for reader, own in sorted(places.items()):
        other = next((first_reader[p] for p in sorted(own) if p in first_reader), min(places))
        theirs = places[other]
        if own != theirs and (own & theirs or len(own) != len(theirs)):
            raise ValueError(
                f"mesh {dict(mesh.shape)}: of the {len(devices)} places that rows of a batch have,"
                f" process {other} has {sorted(theirs)} and process {reader} {sorted(own)}; two"
                " processes must have the same ones, or as many others"
            )
        for place in own:
            first_reader.setdefault(place, reader)
    parts = sorted({min(own) for own in places.values()})
    return parts.index(min(places[process])), len(parts)


def one_process(what: str, devices=None):
    """Raises ValueError where devices (None: all that there are) belong to other processes than
    this one.
    """
    devices = jax.devices() if devices is None else devices
    others = sorted({d.process_index for d in devices} - {jax.process_index()})
    if others:
        raise ValueError(
            f"{what} runs in one process, whose mesh may have many devices; here are devices of the"
            f" processes {', '.join(map(str, others))}, too"
        )


def spec(axes) -> PartitionSpec:
    """PartitionSpec of a tensor from its logical axes (None: not split).

    Raises ValueError for an unknown logical axis, or where two dimensions want the same mesh axis.
    """
    rules, entries, used = rules_in_use(), [], {}
    for axis in axes:
        mesh_axes = rules.over(axis, f" of {tuple(axes)}") if axis is not None else ()
        for mesh_axis in mesh_axes:
            if mesh_axis in used:
                raise ValueError(
                    f"{tuple(axes)}: {axis!r} and {used[mesh_axis]!r} both want mesh axis"
                    f" {mesh_axis!r}"
                )
            used[mesh_axis] = axis
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def named(mesh: Mesh, axes, shape=None, name: str = "tensor") -> NamedSharding:
    """NamedSharding of a tensor; with its shape given, raises ValueError where a dimension does not
    divide evenly.
    """
    partition = spec(axes)
    if shape is not None:
        for size, axis, entry in zip(shape, axes, partition, strict=True):
            split = math.prod(
                mesh.shape[a] for a in ((entry,) if isinstance(entry, str) else entry or ())
            )
            if size % split:
                raise ValueError(
                    f"{name}: {axis!r} of size {size} cannot be split over {entry!r}, {split}"
                    " devices"
                )
    return NamedSharding(mesh, partition)


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Pins x to its logical axes on the current mesh (jax.set_mesh); without one, returns x as it
    is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def by_device(function: Callable, in_axes, out_axes) -> Callable:
    """The function with each device working on its own part, of arguments and results split by
    logical axes (None: whole), or trees of them.

    Without a mesh of several devices, the function itself. What it needs of others it gets by
    `gathered`, `summed` and `dealt`, or by collectives over `split_over`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    is_axes = lambda axes: (
        axes is None
        or (isinstance(axes, tuple) and all(a is None or isinstance(a, str) for a in axes))
    )
    in_specs, out_specs = (
        jax.tree.map(lambda axes: spec(axes or ()), tree, is_leaf=is_axes)
        for tree in (tuple(in_axes), out_axes)
    )
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def by_part(function, sharding: NamedSharding):
    """A function of one array with each device working on its own part, wherever the sharding puts
    it. What the devices return, a tree of arrays, stands one after the other along the first
    dimension, in the order of the sharding's mesh.
    """
    mesh = sharding.mesh
    return jax.shard_map(
        function, mesh=mesh, in_specs=sharding.spec, out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,
    )  # fmt: skip


def split_axes(sharding: NamedSharding, dims: int) -> list[tuple[str, ...]]:
    """For each of an array's dimensions, the mesh axes of more than one device that split it."""
    entries = [*sharding.spec, *[None] * (dims - len(sharding.spec))]
    named_axes = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    return [tuple(a for a in axes if sharding.mesh.shape[a] > 1) for axes in named_axes]


def gathered(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Inside by_device: x whole along a dimension that a logical axis splits."""
    over = split_over(axis)
    return jax.lax.all_gather(x, over, axis=dim, tiled=True) if over else x


def summed(x: jax.Array, axis: str, scattered: str | None = None, dim: int = 0) -> jax.Array:
    """Inside by_device: x summed over the devices that a logical axis splits; with `scattered`,
    another logical axis, its dimension `dim` is split as that says.
    """
    over, split = split_over(axis), split_over(scattered)
    if set(split) - set(over):
        raise ValueError(
            f"{scattered!r} is split over {split}, which are not all of {axis!r}'s {over}"
        )
    x = jax.lax.psum_scatter(x, split, scatter_dimension=dim, tiled=True) if split else x
    rest = tuple(a for a in over if a not in split)
    return jax.lax.psum(x, rest) if rest else x


def dealt(x: jax.Array, axis: str, split: int, joined: int) -> jax.Array:
    """Inside by_device: each device's part of dimension `split`, whole along dimension `joined`,
    which a logical axis splits.
    """
    over = split_over(axis)
    return jax.lax.all_to_all(x, over, split, joined, tiled=True) if over else x


def split_over(axis: str | None) -> tuple[str, ...]:
    """The axes of the current mesh, of more than one device, that split a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or axis is None:
        return ()
    return tuple(a for a in rules_in_use()[axis] if mesh.shape[a] > 1)


def parts(axis: str | None, mesh: Mesh | jax.sharding.AbstractMesh | None = None) -> int:
    """Into how many parts a mesh (None: the current one) splits this logical axis."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty or axis is None:
        return 1
    return math.prod(mesh.shape[a] for a in rules_in_use()[axis])
