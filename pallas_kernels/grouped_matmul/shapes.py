"""Blocks of the grouped products: the tuned ones of GLM's shapes, and a rule for every other that
fits the chip's VMEM.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.compiler import Chip
from pallas_kernels.grouped_matmul.tiles import bodies_of_step, most_tiles
from pallas_kernels.target import TWO_CORES, WIDE_UNITS, target_kind

FOLDER = pathlib.Path(__file__).parent
TILE = 64  # rows that an expert's first row is a multiple of
LANES = 128
# Kernels that multiply x [R, K] to [R, N] with matrices split by N; and the gradient of the
# matrices [K, N], of rows as they are or with x's or dy's gathered.
GRADIENTS = ("weight_gradient", "gathered_x_gradient", "gathered_dy_gradient")
KERNELS = ("matmul", "transposed", "two_matmul", "swiglu", "swiglu_backward", *GRADIENTS)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a sweep over rows is cut.

    columns: blocks of the result's columns. size, join: tiles of a step (tiles.row_steps). gap:
    lanes between the rows of a matrix in VMEM: where a row is a multiple of 8 x 128 lanes, v6e
    loads it slower. cores: cores of a device, which share the steps.
    granule: a kernel has a body for each multiple of that many tiles, which also takes steps of a
    few tiles less; fewer are sooner compiled. only: for a probe, the kernel has the body of steps
    of that many tiles alone.
    """

    columns: int
    size: int
    join: bool
    granule: int
    gap: int
    cores: int
    vmem_bytes: int
    only: int | None = None

    @property
    def bodies(self) -> list[range]:
        most = most_tiles(self.size, join=self.join)
        return (
            bodies_of_step(most, self.granule)
            if self.only is None
            else [range(self.only, self.only + 1)]
        )


@dataclasses.dataclass(frozen=True)
class GradientBlocks:
    """How the gradient of a matrix is cut: blocks of its rows and columns, tiles of a step; chunk:
    rows of a product within;
    granule: as in Blocks. gap: lanes between the rows of either operand, as there.

    only: for a probe, the kernel has the body of an expert's last step, of that many tiles, alone.
    """

    rows: int
    columns: int
    size: int
    chunk: int
    granule: int
    gap: int
    vmem_bytes: int
    only: int | None = None

    @property
    def bodies(self) -> list[range]:
        return (
            bodies_of_step(self.size, self.granule)
            if self.only is None
            else [range(self.only, self.only + 1)]
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """Products of the experts of one device: per pass the kernel, K and N."""

    forward: tuple[str, int, int]
    input_gradient: tuple[str, int, int]
    weight_gradient: tuple[str, int, int]
    dtype: str

    def product(self, pass_: str) -> tuple[str, int, int]:
        return getattr(self, pass_.replace(" ", "_"))

    @property
    def key(self) -> str:
        kernel, depth, width = self.forward
        return f"{kernel} {self.input_gradient[0]} {depth}x{width} {self.dtype}"


def _shapes() -> dict[str, Shape]:
    out = {}
    for model, width, ffn in (("355B", 5120, 1536), ("Air", 4096, 1408)):
        plain = {"gate_up": (width, 2 * ffn), "down": (ffn, width)}
        for name, (k, n) in plain.items():
            out[f"{model} {name}"] = Shape(
                ("matmul", k, n), ("transposed", n, k), ("weight_gradient", k, n), "bfloat16"
            )
        # What a layer runs, where rows are gathered by the kernels: gate, up and SwiGLU in one,
        # then down.
        products = (
            ("swiglu", width, ffn),
            ("two_matmul", ffn, width),
            ("gathered_x_gradient", width, ffn),
        )
        out[f"{model} routed gate_up"] = Shape(*products, "bfloat16")
        products = (
            ("matmul", ffn, width),
            ("swiglu_backward", width, ffn),
            ("gathered_dy_gradient", ffn, width),
        )
        out[f"{model} routed down"] = Shape(*products, "bfloat16")
    return out


SHAPES = _shapes()
PASSES = ("forward", "input gradient", "weight gradient")


def _tuned(kernel: str, depth: int, width: int, dtype: str, kind: str | None) -> dict | None:
    for shape in SHAPES.values():
        for pass_ in PASSES:
            if shape.product(pass_) == (kernel, depth, width) and shape.dtype == dtype:
                found = tuning.lookup(FOLDER, kind, f"{pass_} {shape.key}")
                if found is not None:
                    return found
    return None


def blocks_for(kernel: str, depth: int, width: int, dtype) -> Blocks | GradientBlocks:
    """Blocks of a kernel (KERNELS) for K = depth and N = width on the TPU that the current trace is
    for, simulated: as on v5p.

    Raises ValueError where not even 128 columns fit VMEM.
    """
    kind = target_kind()
    make = GradientBlocks if kernel in GRADIENTS else Blocks
    if (tuned := _tuned(kernel, depth, width, jnp.dtype(dtype).name, kind)) is not None:
        return make(**tuned)
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes if kind is not None else 64 * 2**20
    for blocks in fitting(kernel, depth, width, dtype, kind, capacity):
        return blocks
    raise ValueError(
        f"{kernel}: K={depth} needs more than VMEM's {capacity} bytes at 128 of N={width}: take"
        " grouped_matmul='ragged_dot'"
    )


def fitting(kernel: str, depth: int, width: int, dtype, kind: str | None, capacity: int) -> list:
    """All blocks that the rule would take, the one with the largest pieces first."""
    wide = kind in WIDE_UNITS
    cores = 2 if kind in TWO_CORES else 1
    limit = capacity - capacity // 32
    if kernel in GRADIENTS:
        cuts = [
            GradientBlocks(
                rows, columns, size, chunk, 4 if wide else 2, LANES if kind == "v6e" else 0, limit
            )
            for size in ((8, 4) if wide else (4, 2))
            for chunk in (256, 512)
            for rows in _divisors(depth)
            for columns in _divisors(width)
        ]
        cuts = [b for b in cuts if gradient_vmem(kernel, b, depth, width, dtype) <= limit]
        # The cores share the blocks; what is read again is rows times this.
        uneven = lambda b: b.rows * b.columns % cores
        # Of rows that are unpacked between the products large pieces are sooner compiled.
        large = wide and kernel != "weight_gradient"
        return sorted(
            cuts,
            key=lambda b: (
                uneven(b),
                -b.size,
                b.columns * depth + b.rows * width,
                -b.chunk if large else b.chunk,
            ),
        )
    cuts = []
    # With SwiGLU in them joined steps are no faster, and bodies are long to compile.
    plain = kernel in ("matmul", "transposed", "two_matmul")
    for size, join in (
        ((4, plain), (4, False), (2, False)) if wide else ((2, True), (2, False), (1, False))
    ):
        for columns in _divisors(width):
            gap = _gap(kind, width // columns) if kernel in ("matmul", "swiglu") else 0
            cuts.append(
                Blocks(columns, size, join, 1 if plain or not wide else 2, gap, cores, limit)
            )
    cuts = [b for b in cuts if vmem(kernel, b, depth, width, dtype) <= limit]
    # Rows are read once a block of columns. Turning a matrix over takes a 256-wide unit as long as
    # 180 rows keep it busy: short steps then cost half as much again.
    transposed = wide and kernel not in ("matmul", "swiglu")
    return sorted(
        cuts,
        key=lambda b: (
            b.columns
            * (
                1.5
                if transposed and b.size < 4
                else 1.1
                if transposed and plain and not b.join
                else 1
            )
        ),
    )


def vmem(kernel: str, blocks: Blocks, depth: int, width: int, dtype) -> int:
    """Bytes of the buffers of a sweep, and of what the compiler puts beside them, roughly."""
    matrices = {"two_matmul": 2, "swiglu": 2}.get(kernel, 1)
    # Columns of rows, in units of K and of a block of N: two buffers each; gathered rows come in
    # words and are unpacked.
    deep, wide = {
        "matmul": (2, 2),
        "transposed": (2, 2),
        "two_matmul": (6, 2),
        "swiglu": (4, 6),
        "swiglu_backward": (4, 10),
    }[kernel]
    rows, block = most_tiles(blocks.size, join=blocks.join) * TILE, width // blocks.columns
    numbers = 2 * matrices * depth * (block + blocks.gap) + rows * (deep * depth + wide * block)
    return numbers * jnp.dtype(dtype).itemsize + rows * 4096 + 2**21


def gradient_vmem(kernel: str, blocks: GradientBlocks, depth: int, width: int, dtype) -> int:
    height = depth // blocks.rows
    across = width // blocks.columns
    itemsize = jnp.dtype(dtype).itemsize
    buffers = 2 * (height + blocks.gap) + (3 if kernel == "gathered_dy_gradient" else 2) * (
        across + blocks.gap
    )
    return height * across * (4 + itemsize) + blocks.size * TILE * buffers * itemsize + 2**21


def _gap(kind: str | None, width: int) -> int:
    return LANES if kind == "v6e" and width % (8 * LANES) == 0 else 0


def _divisors(width: int) -> list[int]:
    """Numbers of equal blocks of a width: of multiples of 256, which a wide unit takes and a line
    of a row's words has, else of 128.
    """
    number = width // (2 * LANES if width % (2 * LANES) == 0 else LANES)
    return [n for n in range(1, number + 1) if number % n == 0]


def chosen_blocks(shape: Shape, pass_: str) -> Blocks | GradientBlocks:
    return blocks_for(*shape.product(pass_), shape.dtype)


def candidates(shape: Shape, pass_: str, chip: Chip) -> list:
    """What the tuner compiles: the rule's first choices."""
    kernel, depth, width = shape.product(pass_)
    return fitting(kernel, depth, width, shape.dtype, chip.kind, chip.vmem_bytes)[:6]
