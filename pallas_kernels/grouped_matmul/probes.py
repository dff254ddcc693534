"""The grouped products before the compiler, ours and megablox's, for the report and the tuner."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiler import Probe
from pallas_kernels.grouped_matmul import costs, kernel
from pallas_kernels.grouped_matmul.costs import work_table
from pallas_kernels.grouped_matmul.gather import gathered
from pallas_kernels.grouped_matmul.shapes import (
    FOLDER,
    GRADIENTS,
    PASSES,
    SHAPES,
    TILE,
    Blocks,
    GradientBlocks,
    Shape,
    candidates,
    chosen_blocks,
)
from pallas_kernels.grouped_matmul.tiles import buffer_rows, most_tiles, row_tiles
from pallas_kernels.grouped_matmul.weight_gradient import weight_gradient

__all__ = [
    "FOLDER",
    "PASSES",
    "SHAPES",
    "candidates",
    "chosen_blocks",
    "probe",
    "public_probes",
    "work_table",
]

ROWS = 1024  # an expert
NAMES = {
    "matmul": "grouped_matmul", "transposed": "grouped_transposed", "two_matmul": "grouped_two",
    "swiglu": "grouped_swiglu",
    "swiglu_backward": "grouped_swiglu_backward",
    **dict.fromkeys(GRADIENTS, "grouped_weight_gradient"),
}  # fmt: skip
TWO = ("two_matmul", "swiglu")  # kernels with two matrices an expert


def probe(shape: Shape, blocks: Blocks | GradientBlocks, pass_: str) -> Probe:
    """16 experts with 1,024 rows each, more or less. The region is a full step's body, the others
    left out of the kernel.
    """
    name, depth, width = shape.product(pass_)
    experts, sizes = costs.EXPERTS, costs.routing("uniform", costs.EXPERTS, ROWS)
    tokens, num_rows = experts * ROWS // costs.PER_TOKEN, buffer_rows(experts * ROWS, experts, TILE)
    gradient, routed = name in GRADIENTS, shape.input_gradient[0] != "transposed"
    full = blocks.size if gradient else most_tiles(blocks.size, join=blocks.join)
    blocks = dataclasses.replace(blocks, only=full)
    array = lambda *dims, dtype=shape.dtype: jax.ShapeDtypeStruct(dims, dtype)
    ints = lambda *dims: array(*dims, dtype=jnp.int32)
    made = lambda sizes_E: row_tiles(sizes_E, num_rows, TILE)
    wide = array(num_rows, width)
    deep = array(num_rows, depth)
    matrix = array(experts, depth, width)
    transposed = array(experts, width, depth)
    token = array(tokens, depth)
    each = array(num_rows, dtype=jnp.float32)
    function, args = {
        "matmul": (
            lambda g, x, w: kernel.matmul(x, w, made(g), words=routed, blocks=blocks),
            (deep, matrix),
        ),
        "transposed": (
            lambda g, x, w: kernel.matmul(x, w, made(g), transposed=True, blocks=blocks),
            (deep, transposed),
        ),
        "two_matmul": (
            lambda g, *a: kernel.two_matmul(*a, made(g), words=routed, blocks=blocks),
            (deep, deep, transposed, transposed),
        ),
        "swiglu": (
            lambda g, x, gate, up, s: kernel.swiglu(
                gathered(x, s), gate, up, made(g), blocks=blocks
            ),
            (token, matrix, matrix, ints(num_rows)),
        ),
        "swiglu_backward": (
            lambda g, x, *a: kernel.swiglu_backward(
                gathered(x, a[-1]), *a[:-1], made(g), blocks=blocks
            ),
            (token, transposed, wide, wide, each, ints(num_rows)),
        ),
        "weight_gradient": (
            lambda g, x, dy: weight_gradient(x, dy, made(g), blocks=blocks),
            (deep, wide),
        ),
        "gathered_x_gradient": (
            lambda g, x, dy, s: weight_gradient(gathered(x, s), dy, made(g), blocks=blocks),
            (token, wide, ints(num_rows)),
        ),
        "gathered_dy_gradient": (
            lambda g, x, dy, s: weight_gradient(x, gathered(dy, s), made(g), blocks=blocks),
            (deep, array(tokens, width), ints(num_rows)),
        ),
    }[name]
    macs = depth * width * (2 if name in TWO else 1)
    cuts = blocks.columns * (blocks.rows if gradient else 1)
    count = lambda rows, blocks: costs.moved(name, blocks, depth, width, rows, experts, shape.dtype)
    once = dataclasses.replace(blocks, columns=1, **({"rows": 1} if gradient else {}))
    moved, needed = count(costs.rows_computed(sizes), blocks), count(int(np.sum(sizes)), once)
    region = {NAMES[name]: full * TILE * macs // cuts}
    computed = costs.rows_computed(sizes, blocks.granule * TILE)
    return Probe(
        function,
        (ints(experts), *args),
        region,
        moved,
        needed,
        int(np.sum(sizes)) * macs,
        computed * macs,
    )


def public_probes(shape: Shape, pass_: str) -> dict[str, Probe]:
    """Megablox with whole K and as many columns as its 16 MiB of VMEM take, at three row tiles; and
    tiles of about 1,024. None of the fused kernels.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    name, depth, width = shape.product(pass_)
    if shape.input_gradient[0] != "transposed":
        return {}
    experts, sizes = costs.EXPERTS, costs.routing("uniform", costs.EXPERTS, ROWS)
    num_rows, out = experts * ROWS, {}
    array = lambda *dims, dtype=shape.dtype: jax.ShapeDtypeStruct(dims, dtype)
    gradient = name == "weight_gradient"
    for tile in megablox_tiles(depth, width, gradient=gradient):
        if gradient:
            call = lambda g, x, dy, tile=tile: tgmm(x.T, dy, g, jnp.bfloat16, tile)
            args, op = (array(num_rows, depth), array(num_rows, width)), "tgmm"
        else:
            transposed = name == "transposed"
            call = lambda g, x, w, tile=tile, transposed=transposed: gmm(
                x, w, g, jnp.bfloat16, tile, transpose_rhs=transposed
            )
            args = (
                array(num_rows, depth),
                array(experts, *((width, depth) if transposed else (depth, width))),
            )
            op = "gmm"
        # With K in pieces the schedule shows two bodies, of the last piece and of the others, of
        # which a step runs one.
        bodies = 1 if gradient or tile[1] == depth else 2
        # Of tiles that do not divide N the last is partly for nothing.
        region = bodies * tile[0] * tile[1] * width // -(-width // tile[2])
        moved = costs.moved_by_megablox(sizes, tile, depth, width, shape.dtype, gradient=gradient)
        needed = (num_rows * (depth + width) + experts * depth * width) * 2
        out[f"megablox {'x'.join(map(str, tile))}"] = Probe(
            call, (array(experts, dtype=jnp.int32), *args), {op: region}, moved, needed,
            num_rows * depth * width, costs.rows_of_megablox(sizes, tile[0]) * depth * width,
        )  # fmt: skip
    return out


def megablox_tiles(depth: int, width: int, *, gradient: bool) -> list[tuple[int, int, int]]:
    """Tiles that fit the 16 MiB that megablox leaves itself (blocks twice, a float32 accumulator):
    at each number of rows those with the whole K, or the gradient's with large pieces of it, and
    the widest N (not all divide it); and the usual 512 rows with pieces of K.
    """
    out = []
    for rows in (128, 256, 512):
        for most_k in (1408,) if gradient else (depth, 1408)[: 2 if rows == 512 else 1]:
            k = _divisor(depth, most_k)
            fitting = []
            for n in {512, 768} | {_divisor(width, most) for most in (512, 768, 1024, 1408, 2048)}:
                moving = rows * (k + n) + k * n if gradient else rows * k + k * n + rows * n
                if 4 * moving + (k if gradient else rows) * n * 4 < 15 * 2**20:
                    fitting.append((rows, k, n))
            out += sorted(fitting, key=lambda tile: tile[2])[-2:]
    return out


def _divisor(width: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides a width."""
    return max(n for n in range(128, most + 1, 128) if width % n == 0)
