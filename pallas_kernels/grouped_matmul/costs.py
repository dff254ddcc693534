"""What the grouped products cost, counted: rows that are computed beside those that are needed, and
bytes that HBM moves.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul.shapes import GRADIENTS, TILE

EXPERTS = 16  # of a device: 160 over 10 devices, 128 over 8
PER_TOKEN = 8


def routing(kind: str, experts: int, rows_an_expert: int) -> np.ndarray:
    """Rows of each expert under `uniform` routing (multinomial) or `zipf` (popularity 1 / rank),
    int64 [E].
    """
    weights = {"uniform": np.ones(experts), "zipf": 1 / np.arange(1, experts + 1)}[kind]
    return np.random.default_rng(0).multinomial(experts * rows_an_expert, weights / weights.sum())


def rows_computed(sizes_E: np.ndarray, granule: int = TILE) -> int:
    """Rows that our products multiply: each expert's, up to a multiple of granule."""
    return int((-(-np.asarray(sizes_E) // granule) * granule).sum())


def rows_of_megablox(sizes_E: np.ndarray, tile: int) -> int:
    """Rows that megablox multiplies: for each group all tiles that its rows lie in, as in its
    make_group_metadata.
    """
    ends = np.cumsum(sizes_E)
    starts = ends - sizes_E
    tiles = np.where(sizes_E > 0, -(-ends // tile) - starts // tile, 0)
    return int(tiles.sum()) * tile


def work(sizes_E: np.ndarray, granule: int) -> dict[str, float]:
    """Row efficiency, rows over rows computed, of ours (granule: as in rows_computed) and of
    megablox at its tiles.
    """
    rows = int(np.sum(sizes_E))
    ours = {"ours": rows / rows_computed(sizes_E, granule)}
    return ours | {
        f"megablox {tile}": rows / rows_of_megablox(sizes_E, tile) for tile in (128, 256, 512)
    }


def work_table() -> list[dict]:
    out = []
    granules = {
        "products": TILE,
        "with SwiGLU on 256-wide units, weight gradient": 2 * TILE,
        "weight gradient on 256-wide units": 4 * TILE,
    }
    for rows in (1024, 300):
        for kind in ("uniform", "zipf"):
            for name, granule in granules.items():
                counted = work(routing(kind, EXPERTS, rows), granule)
                out.append({"rows an expert": rows, "routing": kind, "of": name, **counted})
    return out


def moved(kernel: str, blocks, depth: int, width: int, rows: int, experts: int, dtype) -> int:
    """Bytes between HBM and VMEM of a kernel at blocks (shapes.KERNELS: K = depth, N = width),
    rows: of the used tiles.
    """
    item = jnp.dtype(dtype).itemsize
    if kernel in GRADIENTS:
        return (
            rows * (depth * blocks.columns + width * blocks.rows) + experts * depth * width
        ) * item
    matrices, deep, wide = {
        "matmul": (1, 1, 1), "transposed": (1, 1, 1), "two_matmul": (2, 2, 1), "swiglu": (2, 1, 3),
        "swiglu_backward": (1, 1, 5),
    }[kernel]  # fmt: skip
    numbers = experts * matrices * depth * width + rows * (
        deep * depth * blocks.columns + wide * width
    )
    return numbers * item + (rows * 4 * (1 + blocks.columns) if kernel == "swiglu_backward" else 0)


def moved_by_megablox(
    sizes_E: np.ndarray,
    tile: tuple[int, int, int],
    depth: int,
    width: int,
    dtype,
    *,
    gradient: bool,
) -> int:
    """Bytes of gmm (gradient: of tgmm) at tiles of (rows, K, N), where a block is not fetched again
    while its index stays.
    """
    item, (tm, tk, tn) = jnp.dtype(dtype).itemsize, tile
    rows, visited = -(-int(np.sum(sizes_E)) // tm) * tm, rows_of_megablox(sizes_E, tm)
    experts, pieces = len(sizes_E), -(-width // tn)
    if gradient:  # x again for each block of columns of the result, dy for each of rows
        return (rows * (depth * pieces + width * -(-depth // tk)) + experts * depth * width) * item
    if tk >= depth:
        return (rows * depth * pieces + experts * depth * width + rows * width) * item
    return (visited * depth * pieces + visited // tm * depth * width + rows * width) * item
