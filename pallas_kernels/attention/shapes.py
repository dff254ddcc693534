"""GLM's attention shapes; blocks for them, tuned or by rule; and what the report and the tuner put
before the compiler.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels import tuning
from pallas_kernels.attention.walk import Blocks, Keys
from pallas_kernels.compiler import Chip, Probe
from pallas_kernels.target import WIDE_UNITS, target_kind

FOLDER = pathlib.Path(__file__).parent
PASSES = ("forward", "backward")
PRODUCTS = {"forward": 2, "backward": 5}
VMEM_BYTES = 7 * 2**23  # of a probe: what every chip has
TILE = 256
AHEAD = {"forward": 8, "backward": 1}
MOST_HEADS = 48  # query heads a key-value head; with more, blocks of half as many queries fit VMEM


@dataclasses.dataclass(frozen=True)
class Shape:
    """One device's share of a layer: `heads` query heads for each of `groups` key-value heads, rows
    of `length` tokens.
    """

    length: int
    heads: int
    groups: int
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.length}x{self.heads} {self.dtype}"


# 96 query and 8 key-value heads of size 128 in both models; their share under tensor parallelism
# over 8 devices, and whole.
SHAPES = {
    "4K": Shape(4096, 12, 1, "bfloat16"),
    "4K, all heads": Shape(4096, 12, 8, "bfloat16"),
    "32K": Shape(32_768, 12, 1, "bfloat16"),
    "128K": Shape(131_072, 12, 1, "bfloat16"),
}
SIZE = 128


def blocks_for(q_length: int, kv_length: int, heads: int, dtype, pass_: str) -> Blocks:
    """The tuned blocks, else ones that fit any chip. Lengths are rounded up to whole blocks by the
    caller.
    """
    shape = Shape(kv_length, heads, 1, jnp.dtype(dtype).name)
    found = tuning.lookup(FOLDER, target_kind(), f"{pass_} {shape.key}")
    if found is not None and q_length == kv_length:
        return Blocks(**found)
    return _rule(q_length, kv_length, heads, shape.dtype, pass_, target_kind() in WIDE_UNITS)


def _rule(q_length: int, kv_length: int, heads: int, dtype: str, pass_: str, wide: bool) -> Blocks:
    """Tiles of 256: on packed rows of short documents they visit 0.7 of the area that those of 512
    visit, at nearly their rate.
    """
    q, kv = min(TILE if heads <= MOST_HEADS else TILE // 2, q_length), min(TILE, kv_length)
    most = {"forward": 12, "backward": 6}[pass_] if dtype == "bfloat16" else 2
    return Blocks(q, kv, q, kv, _divisor(heads, most), AHEAD[pass_], wide and pass_ == "backward")


def chosen_blocks(shape: Shape, pass_: str) -> Blocks:
    return blocks_for(shape.length, shape.length, shape.heads, shape.dtype, pass_)


def _divisor(number: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if number % d == 0)


def candidates(shape: Shape, pass_: str, chip: Chip) -> list[Blocks]:
    """What the tuner compiles. No tile is larger than the rule's: in rows of one document, as
    probes are, larger ones win a little, on packed rows they lose much.
    """
    first = _rule(
        shape.length, shape.length, shape.heads, shape.dtype, pass_, chip.unit_size == 256
    )
    unrolls = [u for u in (2, 3, 4, 6, 12) if shape.heads % u == 0 and u <= first.unroll]
    aheads = (8, 6, 5, 4, 3, 2, 1) if pass_ == "forward" else (1, 2, 3)
    turns = (False, True) if pass_ == "backward" else (False,)
    varied = [
        dataclasses.replace(first, kv_piece=kv_piece, unroll=u, ahead=a, transposed=t)
        for u in reversed(unrolls)
        for a in aheads
        for t in turns
        for kv_piece in sorted({first.kv, 128}, reverse=True)
    ]
    return [first, *(b for b in varied if b != first)]


def probe(shape: Shape, blocks: Blocks, pass_: str, force: str = "full") -> Probe:
    """One row, one document: all tiles below the diagonal are full. force: the form of the tile,
    'full' or 'masked'.
    """
    from pallas_kernels.attention.backward_kernel import BackwardQueries, backward
    from pallas_kernels.attention.kernel import Queries, forward
    from pallas_kernels.attention.tiles import Tiles

    length, heads, groups = shape.length, shape.heads, shape.groups
    array = lambda *dims, dtype=shape.dtype: jax.ShapeDtypeStruct((1, *dims), dtype)
    ints = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    num_q, num_kv = length // blocks.q, length // blocks.kv
    listed = Tiles(ints(2), ints(6, 1, num_q + 1), ints(3, 1, num_kv))
    wide, narrow = array(length, groups * heads * SIZE), array(length, groups * SIZE)
    row = array(groups, heads, length, dtype=jnp.float32)
    ids = array(1, length, dtype=jnp.int32)
    if pass_ == "forward":
        queries, run = Queries(wide, row, ids), forward
    else:
        queries, run = BackwardQueries(wide, wide, row, row, ids), backward
    keys = Keys(narrow, narrow, array(num_kv, 1, blocks.kv, dtype=jnp.int32))
    args, function = (queries, keys, listed), lambda *a: run(*a, blocks, VMEM_BYTES, force)
    region = PRODUCTS[pass_] * blocks.unroll * blocks.q * blocks.kv * SIZE
    ends = np.arange(1, num_q + 1) * blocks.q
    visited = groups * int(np.sum(-(-ends // blocks.kv)))
    return Probe(
        function, args, {f"attention_{pass_}": region}, *_hbm_bytes(shape, blocks, pass_, visited),
        total_macs=_allowed_macs(shape, pass_),
        computed_macs=PRODUCTS[pass_] * heads * visited * blocks.q * blocks.kv * SIZE,
    )  # fmt: skip


def _allowed_macs(shape: Shape, pass_: str) -> int:
    return (
        PRODUCTS[pass_] * shape.groups * shape.heads * SIZE * shape.length * (shape.length + 1) // 2
    )


def _hbm_bytes(shape: Shape, blocks: Blocks, pass_: str, visited: int) -> tuple[int, int]:
    """Moved, with every visited tile's keys and values, and needed: each operand and result
    once.
    """
    item = jnp.dtype(shape.dtype).itemsize
    wide = shape.groups * shape.heads * shape.length * SIZE * item
    narrow = shape.groups * shape.length * SIZE * item
    row = shape.groups * shape.heads * shape.length * 4
    kv_tile = blocks.kv * SIZE
    if pass_ == "forward":
        return 2 * wide + 2 * row + visited * 2 * kv_tile * item, 2 * wide + row + 2 * narrow
    sums = visited * 2 * 2 * kv_tile * 4  # gradients of keys and values, in and out, float32
    return 3 * wide + 2 * row + visited * 2 * kv_tile * item + sums, 3 * wide + 2 * row + 4 * narrow


def public_probes(shape: Shape, pass_: str) -> dict[str, Probe]:
    """Splash attention with segment ids, a head a tile."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    out = {}
    for tile in (512, 1024):
        sizes = splash.BlockSizes(
            block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
            block_kv_dkv_compute=tile,
            use_fused_bwd_kernel=True,
        )  # fmt: skip
        heads = shape.groups * shape.heads
        visited = heads * (shape.length // tile) * (shape.length // tile + 1) // 2
        item = jnp.dtype(shape.dtype).itemsize
        q, kv = heads * shape.length * SIZE * item, shape.groups * shape.length * SIZE * item
        needed = 2 * q + 2 * kv if pass_ == "forward" else 3 * q + 4 * kv
        kv_moved = visited * 2 * tile * SIZE * item
        # The fused backward pass writes a float32 gradient of the queries for each column of tiles.
        moved = (
            2 * q + kv_moved
            if pass_ == "forward"
            else visited * tile * SIZE * (2 * item + 4) + 4 * heads * shape.length * SIZE * item
        )
        name = (
            "splash_mqa_fwd_segmented_no_residuals"
            if pass_ == "forward"
            else "splash_mqa_dkv_segmented_no_residuals"
        )
        out[f"splash {tile}x{tile}"] = Probe(
            *_splash(shape, sizes, pass_), {name: PRODUCTS[pass_] * tile * tile * SIZE}, moved,
            needed,
            total_macs=_allowed_macs(shape, pass_),
            computed_macs=PRODUCTS[pass_] * visited * tile * tile * SIZE,
        )  # fmt: skip
    return out


def _splash(shape: Shape, sizes, pass_: str):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as splash_mask,
    )

    mask = splash_mask.MultiHeadMask(
        [splash_mask.CausalMask((shape.length, shape.length))] * shape.heads
    )
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def attend(q, k, v, ids):
        return jax.vmap(lambda q, k, v: kernel(q, k, v, splash.SegmentIds(ids, ids)))(q, k, v)

    def gradients(q, k, v, ids, dout):
        return jax.vjp(lambda *qkv: attend(*qkv, ids), q, k, v)[1](dout)

    array = lambda *dims: jax.ShapeDtypeStruct(
        (shape.groups, *dims, shape.length, SIZE), shape.dtype
    )
    args = array(shape.heads), array(), array(), jax.ShapeDtypeStruct((shape.length,), jnp.int32)
    return (attend, args) if pass_ == "forward" else (gradients, (*args, array(shape.heads)))


def document_rows(length: int, kind: str) -> np.ndarray:
    """Segment ids of rows that hold the demo corpus's documents in order, int32 [rows, length];
    kind: 'whole' files or 'cut' ones.
    """
    lengths = json.loads((FOLDER / "document_lengths.json").read_text())[kind]
    rows, row, room = [], [], length
    for number, size in enumerate(lengths):
        take = min(size, room)
        row += [number + 1] * take
        room -= take
        if not room:
            rows, row, room = [*rows, row], [], length
    if not rows:
        rows = [row + [0] * room]
    return np.asarray(rows, np.int32)


def work(segment_ids_BL: np.ndarray, blocks: Blocks) -> dict[str, float]:
    """Pairs of query and key in tiles: those that our kernel visits, those of tiles with an allowed
    pair, allowed ones, and those that splash visits with tiles of 512 (all that causality leaves);
    and the share of our tiles that need no mask.
    """
    from pallas_kernels.attention.tiles import FIRST, ONLY, STOP, tiles

    # not a chip that is only compiled for
    with jax.set_mesh(Mesh(np.asarray(jax.devices("cpu")[:1]), ("data",))):
        ids = jnp.asarray(segment_ids_BL)
        listed = tiles(ids, ids, 0, 0, blocks.q, blocks.kv)
    queries, keys = np.asarray(listed.queries), np.asarray(listed.keys)
    visited = int((queries[STOP] - queries[FIRST]).sum())
    needed = full = allowed = 0
    for row, ids_L in enumerate(segment_ids_BL):
        for i in range(len(ids_L) // blocks.q):
            for j in range(queries[FIRST, row, i], queries[STOP, row, i]):
                below = (j + 1) * blocks.kv - 1 <= i * blocks.q
                full += bool(below and queries[ONLY, row, i] == keys[ONLY, row, j])
            for j in range(-(-(i + 1) * blocks.q // blocks.kv)):
                q_ids, kv_ids = (
                    ids_L[n * size : (n + 1) * size] for n, size in ((i, blocks.q), (j, blocks.kv))
                )
                q_index = i * blocks.q + np.arange(blocks.q)
                kv_index = j * blocks.kv + np.arange(blocks.kv)
                pairs = (
                    (q_ids[:, None] == kv_ids)
                    & (q_ids[:, None] > 0)
                    & (kv_index <= q_index[:, None])
                )
                needed += bool(pairs.any())
                allowed += int(pairs.sum())
    area = blocks.q * blocks.kv
    side = segment_ids_BL.shape[1] // 512
    causal = len(segment_ids_BL) * side * (side + 1) // 2 * 512**2
    return {
        "visited": visited * area, "needed": needed * area, "allowed": allowed, "splash": causal,
        "full_share": full / max(visited, 1),
    }  # fmt: skip


def work_table() -> list[dict]:
    """Our tiles on rows of real documents, in shares."""
    out = []
    for length in (32_768, 131_072):
        for kind in ("whole", "cut"):
            counted = work(document_rows(length, kind), chosen_blocks(SHAPES["32K"], "forward"))
            visited = counted["visited"]
            out.append({
                "row": f"{length} tokens, {kind} files",
                "visited / with an allowed pair": visited / counted["needed"],
                "visited / splash's": visited / counted["splash"],
                "allowed pairs / visited": counted["allowed"] / visited,
                "tiles without a mask": counted["full_share"],
            })  # fmt: skip
    return out
