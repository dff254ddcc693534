"""Rows that a kernel can fetch one by one: 32-bit words [R, 1, W], which lie one whole row after
the other.

A row of a matrix [R, D] is spread over tiles of 8 or 16 rows, and a copy of one row of a 16-bit
type does not exist. With a unit dimension before the last a row is one stretch of memory, and in
VMEM the same bytes read as [R * W / 128, 128], of which a load with stride W / 128 takes 128 words
of each of eight rows.

bfloat16 with D a multiple of 256: word 128 c + i holds column 256 c + i in its low half and column
256 c + 128 + i in its high half, W = D / 2. Else: float32, one column a word, W = D.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.cost import cost
from pallas_kernels.grouped_matmul.shapes import LANES
from pallas_kernels.once import once

HIGH = 0xFFFF0000
PACKED_ROWS = 128  # of a step


def paired(width: int, dtype) -> bool:
    """Whether two columns share a word."""
    return dtype == jnp.bfloat16 and width % (2 * LANES) == 0


def row_shape(num_rows: int, width: int, dtype) -> jax.ShapeDtypeStruct:
    """Shape and type of the words of [num_rows, width] values."""
    if paired(width, dtype):
        return jax.ShapeDtypeStruct((num_rows, 1, width // 2), jnp.uint32)
    return jax.ShapeDtypeStruct((num_rows, 1, width), jnp.float32)


def to_rows(x_RD: jax.Array) -> jax.Array:
    """[R, D] as words [R, 1, W]."""
    num_rows, width = x_RD.shape
    if not paired(width, x_RD.dtype):
        return x_RD.astype(jnp.float32).reshape(num_rows, 1, width)
    halves = jax.lax.bitcast_convert_type(x_RD.reshape(num_rows, -1, 2, LANES), jnp.uint16).astype(
        jnp.uint32
    )
    return (halves[:, :, 0] | (halves[:, :, 1] << 16)).reshape(num_rows, 1, width // 2)


def from_rows(words_R1W: jax.Array, dtype) -> jax.Array:
    """[R, D] of words [R, 1, W]."""
    num_rows = words_R1W.shape[0]
    if words_R1W.dtype != jnp.uint32:
        return words_R1W.reshape(num_rows, -1).astype(dtype)
    words = words_R1W.reshape(num_rows, -1, 1, LANES)
    halves = jnp.concatenate([words, words >> 16], axis=2).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(halves, jnp.bfloat16).reshape(num_rows, -1).astype(dtype)


@once("zeros")
def pack(x_RD: jax.Array, *, zeros: int = 0) -> jax.Array:
    """to_rows as a kernel that reads and writes once, where XLA goes over the array five times;
    `zeros` rows of zeros after.
    """
    (num_rows, width), dtype = x_RD.shape, x_RD.dtype
    words = row_shape(num_rows + zeros, width, dtype)
    block = min(PACKED_ROWS, num_rows)
    last = pl.cdiv(num_rows, block) - 1

    def kernel(values, words):
        pack_rows(values, words, num_rows - pl.program_id(0) * block if zeros else None)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_rows + zeros, block),),
        in_specs=[pl.BlockSpec((block, width), lambda step: (jnp.minimum(step, last), 0))],
        out_specs=pl.BlockSpec((block, 1, words.shape[2]), lambda step: (step, 0, 0)),
        out_shape=words,
        cost_estimate=cost(x_RD, words),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=16 * PACKED_ROWS * width + (4 << 20)
        ),
        interpret=interpret.params(),
        name="pack_rows",
    )(x_RD)


@once("width", "dtype")
def unpack(words_R1W: jax.Array, *, width: int, dtype) -> jax.Array:
    """from_rows as a kernel: [R, width] in dtype."""
    num_rows, words = words_R1W.shape[0], words_R1W.shape[2]
    block, values = min(PACKED_ROWS, num_rows), jax.ShapeDtypeStruct((num_rows, width), dtype)
    return pl.pallas_call(
        unpack_rows,
        grid=(pl.cdiv(num_rows, block),),
        in_specs=[pl.BlockSpec((block, 1, words), lambda step: (step, 0, 0))],
        out_specs=pl.BlockSpec((block, width), lambda step: (step, 0)),
        out_shape=values,
        cost_estimate=cost(words_R1W, values),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=16 * PACKED_ROWS * width + (4 << 20)
        ),
        interpret=interpret.params(),
        name="unpack_rows",
    )(words_R1W)


# --- inside of kernels ---


def halves(words) -> list[jax.Array]:
    """Float32 columns of words: of the low halves, then of the high ones; for float32 the words
    themselves.
    """
    if words.dtype != jnp.uint32:
        return [words]
    return [
        pltpu.bitcast(words << 16, jnp.float32),
        pltpu.bitcast(words & jnp.uint32(HIGH), jnp.float32),
    ]


def join(columns: list[jax.Array]) -> jax.Array:
    """Words of float32 columns, the opposite of `halves`; two columns are rounded to bfloat16."""
    if len(columns) == 1:
        return columns[0]
    low, high = (
        pltpu.bitcast(c.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32) for c in columns
    )
    return (low >> 16) | high


def load_words(ref, first: int, count: int, line: int):
    """128 words of each of the rows first, ..., from words [n, 1, W] in VMEM: [count, 128], words
    128 * line and following.
    """
    if interpret.params():  # which knows no reshaped refs
        return ref[pl.ds(first, count), 0, pl.ds(line * LANES, LANES)]
    per_row = ref.shape[2] // LANES
    return ref.reshape(ref.shape[0] * per_row, LANES)[
        pl.ds(first * per_row + line, count, stride=per_row), :
    ]


def store_words(ref, first: int, line: int, words):
    """The opposite of load_words."""
    if interpret.params():
        ref[pl.ds(first, words.shape[0]), 0, pl.ds(line * LANES, LANES)] = words
        return
    per_row = ref.shape[2] // LANES
    ref.reshape(ref.shape[0] * per_row, LANES)[
        pl.ds(first * per_row + line, words.shape[0], stride=per_row), :
    ] = words


def unpack_rows(words_ref, out_ref):
    """From words [n, 1, W] to values [n, D] in VMEM."""
    size = LANES * per_word(words_ref)
    for start in range(0, out_ref.shape[1], size):
        line = slice(start, start + size)
        out_ref[:, line] = load_columns(words_ref, 0, words_ref.shape[0], line, out_ref.dtype)


def pack_rows(values_ref, words_ref, live=None):
    """The opposite of unpack_rows; live: number of rows after which all are to be zeros."""
    for line in range(words_ref.shape[2] // LANES):
        size = LANES * per_word(words_ref)
        values = values_ref[:, line * size : (line + 1) * size].astype(jnp.float32)
        if live is not None:
            values = jnp.where(
                jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < live, values, 0.0
            )
        store_columns(words_ref, line * size, values)


def per_word(words_ref) -> int:
    """Columns of a word."""
    return 2 if words_ref.dtype == jnp.uint32 else 1


def store_columns(ref, start: int, values):
    """Float32 columns [n, C] to columns start, ... of rows in VMEM: values [n, D], or words [n, 1,
    W], there whole lines of them.
    """
    if len(ref.shape) == 2:
        ref[:, start : start + values.shape[1]] = values.astype(ref.dtype)
        return
    size = LANES * per_word(ref)
    for first in range(0, values.shape[1], size):
        columns = [values[:, i : i + LANES] for i in range(first, first + size, LANES)]
        store_words(ref, 0, (start + first) // size, join(columns))


def load_columns(words_ref, first, count: int, columns: slice, dtype) -> jax.Array:
    """Columns (whole lines) of the rows first, ... of words [n, 1, W] in VMEM: [count, C]."""
    size = LANES * per_word(words_ref)
    parts = [
        halves(load_words(words_ref, first, count, line))
        for line in range(columns.start // size, columns.stop // size)
    ]
    return jnp.concatenate([part.astype(dtype) for line in parts for part in line], axis=1)
