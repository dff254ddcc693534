"""GLM's decoding shapes of the grouped product; blocks for them, tuned or by rule; and what the
report and the tuner put before the compiler. What counts is bytes: a step's schedule only has to be
shorter than the time that HBM takes for its matrices.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compiler, fp8_bits, interpret, tuning
from pallas_kernels.compiler import Chip, Probe
from pallas_kernels.grouped_matmul.few_rows import (
    ALIGNMENT,
    BLOCK,
    Blocks,
    few_rows_matmul,
    few_rows_swiglu,
    one_matmul,
    operands,
    steps_of,
)
from pallas_kernels.grouped_matmul.tiles import buffer_rows
from pallas_kernels.target import WIDE_UNITS, target_kind, target_platform

FOLDER = pathlib.Path(__file__).parent
PASSES = ("forward",)
STEP_BYTES = 2**22  # of a step's matrices, two of which are in flight
NAMES = {1: "few_rows_matmul", 2: "few_rows_swiglu"}
FP8 = "float8_e4m3fn"
FEW_ROWS = 512  # up to which reading matrices is all that costs


@dataclasses.dataclass(frozen=True)
class Shape:
    """`rows` pairs of token and expert, bfloat16, over `groups` experts' matrices [depth, width] of
    type dtype; matrices: 2 with SwiGLU.
    """

    rows: int
    groups: int
    depth: int
    width: int
    matrices: int
    dtype: str

    @property
    def key(self) -> str:
        return _key(self.depth, self.width, self.matrices, self.dtype)

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each group, were they dealt at random."""
        return np.bincount(
            np.random.default_rng(0).integers(0, self.groups, self.rows), minlength=self.groups
        )

    @property
    def alignment(self) -> int:
        return alignment_for(self.rows, self.groups, jnp.bfloat16)

    @property
    def buffer_rows(self) -> int:
        """What holds any sizes, each rounded up."""
        return buffer_rows(self.rows, self.groups, self.alignment)


def _shapes() -> dict[str, Shape]:
    """355B: 160 experts, of which a device holds 20 under expert parallelism over 8; Air: 128."""
    out = {}
    for dtype, label in (("bfloat16", ""), (FP8, " fp8")):
        for model, groups, width, ffn in (
            ("355B", 160, 5120, 1536),
            ("355B, 20 experts", 20, 5120, 1536),
            ("Air", 128, 4096, 1408),
        ):
            for rows in (8, 64, 512):
                out[f"{model} gate_up, {rows} rows{label}"] = Shape(
                    rows, groups, width, ffn, 2, dtype
                )
                out[f"{model} down, {rows} rows{label}"] = Shape(rows, groups, ffn, width, 1, dtype)
    return out


SHAPES = _shapes()


def _key(depth: int, width: int, matrices: int, dtype: str) -> str:
    return f"{matrices} of {depth}x{width} {dtype}"


def alignment_for(rows: int, groups: int, dtype) -> int:
    """Rows of a tile: of a register, or of two where more than half of one would be a group's mean,
    as each tile loads the MXU anew.
    """
    smallest = ALIGNMENT[jnp.dtype(dtype).name]
    return smallest if 2 * rows <= groups * smallest else 2 * smallest


def holds(rows: int, depth: int, dtype) -> bool:
    """Whether the kernels hold so many rows in vector memory, for the current trace: theirs, a
    step's results, and its matrices.
    """
    return 2 * rows * depth * jnp.dtype(dtype).itemsize + 4 * STEP_BYTES <= tuning.vmem_limit()


def blocks_for(depth: int, width: int, matrices: int, dtype) -> Blocks:
    """The tuned blocks for matrices [depth, width] of a type, 1 of them or 2, else some that fit
    any chip.
    """
    name, kind = jnp.dtype(dtype).name, target_kind()
    found = tuning.lookup(FOLDER, kind, f"forward {_key(depth, width, matrices, name)}")
    return _by_rule(depth, width, matrices, name, kind) if found is None else Blocks(**found)


def takes(rows: int, w, dtype, implementation: str) -> bool:
    """Whether `dense` is for these rows and this matrix, and can run."""
    named = implementation == "pallas" or (implementation == "auto" and target_platform() == "tpu")
    fits = not any(size % BLOCK for size in w.shape) and jnp.dtype(dtype).name in ALIGNMENT
    return named and fits and rows <= FEW_ROWS and interpret.available()


def dense(x_RK, w, dtype=None) -> jax.Array:
    """x times a matrix [K, N] that may be quantised or in a stack (few_rows.operands), read where
    it lies: [R, N] in a type, x's own if None.
    """
    values, scale, index = operands(w, x_RK.dtype)
    return one_matmul(
        x_RK, values, index, scale=scale, dtype=dtype, blocks=blocks_for(*w.shape, 1, values.dtype)
    )


def _by_rule(depth: int, width: int, matrices: int, dtype: str, kind: str | None) -> Blocks:
    """A step's columns: as many as STEP_BYTES allow; at least two steps a group, for two cores to
    share.
    """
    column_bytes = matrices * depth * jnp.dtype(dtype).itemsize
    fit = [c for c in _columns(width) if c * column_bytes <= STEP_BYTES and 2 * c <= width]
    wide = 2 * BLOCK if kind in WIDE_UNITS else BLOCK
    return Blocks(max(fit, default=BLOCK), wide, dtype == FP8 and kind in fp8_bits.CHIPS)


def _columns(width: int) -> list[int]:
    return [c for c in range(BLOCK, width + 1, BLOCK) if width % c == 0]


def chosen_blocks(shape: Shape, pass_: str) -> Blocks:
    del pass_
    return blocks_for(shape.depth, shape.width, shape.matrices, shape.dtype)


def candidates(shape: Shape, pass_: str, chip: Chip) -> list[Blocks]:
    """What the tuner compiles."""
    del pass_
    rule = _by_rule(shape.depth, shape.width, shape.matrices, shape.dtype, chip.kind)
    columns = [c for c in _columns(shape.width) if 2 * c <= shape.width and c <= 1024]
    return [rule, *(dataclasses.replace(rule, columns=c) for c in columns if c != rule.columns)]


def probe(shape: Shape, blocks: Blocks, pass_: str) -> Probe:
    """macs: of a tile of rows by the list's mean, as most of a tile's rows are nobody's."""
    del pass_
    x = jax.ShapeDtypeStruct((shape.buffer_rows, shape.depth), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((shape.groups, shape.depth, shape.width), shape.dtype)
    sizes = jax.ShapeDtypeStruct((shape.groups,), jnp.int32)
    per_group = (shape.depth // BLOCK, shape.width // BLOCK)
    scale = (
        jax.ShapeDtypeStruct((shape.groups, *per_group), jnp.float32)
        if shape.dtype == FP8
        else None
    )
    alignment = shape.alignment

    def one(x, w, scale, sizes):
        return few_rows_matmul(
            x, w, steps_of(sizes, alignment), scale=scale, alignment=alignment, blocks=blocks
        )

    def two(x, w, scale, sizes):
        return few_rows_swiglu(
            x,
            w,
            w,
            steps_of(sizes, alignment),
            gate_scale=scale,
            up_scale=scale,
            alignment=alignment,
            blocks=blocks,
        )

    function = two if shape.matrices == 2 else one
    steps = shape.width // blocks.columns
    turns = steps * int(np.sum(-(-shape.sizes // alignment)))
    total = shape.matrices * shape.rows * shape.depth * shape.width
    moved, needed = _bytes(shape, steps)
    return Probe(
        function,
        (x, w, scale, sizes),
        {NAMES[shape.matrices]: total // turns},
        moved,
        needed,
        total_macs=total,
    )


def _bytes(shape: Shape, steps: int) -> tuple[int, int]:
    """Moved: all rows of the buffer, the matrices of groups that have rows, their scales once a
    step. Needed: everything once, of rows the real ones.
    """
    active = int(np.sum(shape.sizes > 0)) * shape.matrices
    matrices = active * shape.depth * shape.width * jnp.dtype(shape.dtype).itemsize
    scales = (
        active * 4 * (shape.depth // BLOCK) * (shape.width // BLOCK) if shape.dtype == FP8 else 0
    )
    row = 2 * (shape.depth + shape.width)
    return matrices + steps * scales + shape.buffer_rows * row, matrices + scales + shape.rows * row


def public_probes(shape: Shape, pass_: str) -> dict[str, Probe]:
    """Megablox, once for each bfloat16 matrix; it takes no FP8. Its row tile of 128 is read and
    computed again at each group in it.
    """
    del pass_
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    if shape.dtype == FP8:
        return {}
    tile, columns = 128, min(512, max(_columns(shape.width)))
    rows = -(-shape.rows // tile) * tile
    args = (
        jax.ShapeDtypeStruct((rows, shape.depth), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.groups, shape.depth, shape.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.groups,), jnp.int32),
    )  # fmt: skip
    steps = -(-shape.width // columns)
    ends = np.cumsum(shape.sizes)
    starts = ends - shape.sizes
    visits = int(np.sum(np.where(shape.sizes > 0, (ends - 1) // tile - starts // tile + 1, 0)))
    matrix = 2 * shape.depth * shape.width
    moved = visits * matrix + rows * 2 * (steps * shape.depth + shape.width)
    needed = int(np.sum(shape.sizes > 0)) * matrix + shape.rows * 2 * (shape.depth + shape.width)
    total = shape.rows * shape.depth * shape.width
    run = lambda x, w, sizes: gmm(x, w, sizes, jnp.bfloat16, tiling=(tile, shape.depth, columns))
    return {
        f"megablox {tile}x{shape.depth}x{columns}": Probe(
            run, args, {"gmm": total // (visits * steps)}, moved, needed, total_macs=total
        )
    }


def work_table() -> list[dict]:
    """Bytes moved over needed with the rule's blocks."""
    out = []
    for name, shape in SHAPES.items():
        counted = probe(
            shape, _by_rule(shape.depth, shape.width, shape.matrices, shape.dtype, None), "forward"
        )
        out.append(
            {"shape": name, "bytes moved / needed": counted.hbm_bytes / counted.hbm_bytes_needed}
        )
    return out


def step_cycles(
    shape: Shape, blocks: Blocks, topology: str, folder: pathlib.Path
) -> tuple[float, float]:
    """*Compiled*: cycles of a step, by the mean of the list's tiles of rows, and those that HBM
    takes for its blocks of matrices.
    """
    cycles = (
        compiler.judge(probe(shape, blocks, "forward"), topology, folder)
        .schedules[NAMES[shape.matrices]]
        .cycles
    )
    tiles = np.sum(-(-shape.sizes // shape.alignment)) / np.sum(shape.sizes > 0)
    step_bytes = shape.matrices * shape.depth * blocks.columns * jnp.dtype(shape.dtype).itemsize
    return tiles * cycles, step_bytes / compiler.chip(topology).hbm_bytes_per_cycle
