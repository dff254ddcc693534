"""Grouped products over rows in tiles of one expert (tiles.py), each a sweep (sweep.py).

All leave the rows of tiles past the used ones unwritten (anything may stand there), and give zeros
in rows whose inputs are zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.gather import Gathered
from pallas_kernels.grouped_matmul.rows import store_columns
from pallas_kernels.grouped_matmul.shapes import LANES, Blocks
from pallas_kernels.grouped_matmul.sweep import Matrices, Result, Rows, sweep
from pallas_kernels.grouped_matmul.tiles import RowTiles, row_tiles
from pallas_kernels.once import once

__all__ = ["RowTiles", "matmul", "row_tiles", "swiglu", "swiglu_backward", "two_matmul"]

CHUNK = 256  # columns of one product: what a 256-wide unit takes


def product(x, w, *, transposed: bool) -> jax.Array:
    """x w, or x w^T, summed in float32; operands of float32 are not rounded."""
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, w, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def chunks(width: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, width)) for start in range(0, width, chunk)]


def rows_of(x: jax.Array | Gathered):
    return x if isinstance(x, Gathered) else Rows(x)


@once("transposed", "words", "blocks")
def matmul(
    x_RK: jax.Array,
    w_EKN: jax.Array,
    tiles: RowTiles,
    *,
    transposed: bool = False,
    words: bool = False,
    blocks: Blocks,
) -> jax.Array:
    """y_r = x_r w_e (transposed: x_r w_e^T, w stored [E, N, K]) for the expert e of each row, [R,
    N]; words: as rows.pack makes of that.
    """
    width = w_EKN.shape[1 if transposed else 2]

    def compute(rows, matrices, results, beside):
        (x,), (w,), (y,) = rows, matrices, results
        for part in chunks(w.shape[0 if transposed else 1], CHUNK):
            store_columns(
                y,
                part.start,
                product(x[...], w[part, :] if transposed else w[:, part], transposed=transposed),
            )

    name = "grouped_transposed" if transposed else "grouped_matmul"
    rows = [Rows(x_RK)]
    matrices = [Matrices(w_EKN, 1 if transposed else 2)]
    results = [Result(width, x_RK.dtype, words=words)]
    return sweep(compute, tiles, rows, matrices, results, blocks=blocks, name=name)[0]


@once("words", "blocks")
def two_matmul(
    a_RF: jax.Array,
    b_RF: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    tiles: RowTiles,
    *,
    words: bool = False,
    blocks: Blocks,
) -> jax.Array:
    """a_r gate_e^T + b_r up_e^T, [R, D] (words: as rows.pack makes of that): the gradient of
    SwiGLU's rows. One sum over 2 F, which fills 256-wide units where F is an odd multiple of 128.
    """

    def compute(rows, matrices, results, beside):
        (a, b), (gate, up), (dx,) = rows, matrices, results
        x = jnp.concatenate([a[...], b[...]], axis=1)
        for part in chunks(gate.shape[0], CHUNK):
            w = jnp.concatenate([gate[part, :], up[part, :]], axis=1)
            store_columns(dx, part.start, product(x, w, transposed=True))

    rows, matrices = [Rows(a_RF), Rows(b_RF)], [Matrices(gate_EDF, 1), Matrices(up_EDF, 1)]
    results = [Result(gate_EDF.shape[1], a_RF.dtype, words=words)]
    return sweep(compute, tiles, rows, matrices, results, blocks=blocks, name="grouped_two")[0]


@once("keep", "blocks")
def swiglu(
    x_RD: jax.Array | Gathered,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    tiles: RowTiles,
    weights_R: jax.Array | None = None,
    *,
    keep: bool = True,
    blocks: Blocks,
) -> tuple[jax.Array, ...]:
    """h = silu(x gate_e) * (x up_e), times its row's weight if there are weights, and gate and up
    as they were before: (h_RF, gate_RF, up_RF); only (h_RF,) without `keep`.
    """

    def compute(rows, matrices, results, beside):
        (x, *weights), (gate, up) = rows, matrices
        spread = _spread(weights[0], tiles.tile) if weights else 1.0
        parts = chunks(results[0].shape[1], LANES)
        for n, part in enumerate(parts):
            beside(n, len(parts))
            # Side by side, 128 columns of each: what a 256-wide unit takes, even where F is an odd
            # multiple of 128.
            both = product(
                x[...], jnp.concatenate([gate[:, part], up[:, part]], axis=1), transposed=False
            )
            g, u = jnp.split(both, 2, axis=1)
            values = (spread * (g * jax.nn.sigmoid(g) * u), g, u)
            for result, value in zip(results, values, strict=False):
                result[:, part] = value.astype(result.dtype)

    results = [Result(gate_EDF.shape[2], x_RD.dtype)] * (3 if keep else 1)
    matrices = [Matrices(gate_EDF, 2), Matrices(up_EDF, 2)]
    rows = [rows_of(x_RD)] if weights_R is None else [rows_of(x_RD), _numbers(weights_R, tiles)]
    return tuple(
        sweep(compute, tiles, rows, matrices, results, blocks=blocks, name="grouped_swiglu")
    )


def _numbers(numbers_R, tiles: RowTiles) -> Rows:
    return Rows(
        numbers_R.astype(jnp.float32).reshape(1, len(tiles.expert), 1, tiles.tile), number=True
    )


def _spread(numbers, tile: int) -> jax.Array:
    """Numbers [n, 1, tile] of rows, which lie along lanes, in all lanes of their rows: [n * tile,
    128].
    """
    return jnp.concatenate(
        [jnp.broadcast_to(numbers[n], (LANES, tile)).T for n in range(numbers.shape[0])]
    )


@once("blocks")
def swiglu_backward(
    dout_RD: jax.Array | Gathered,
    down_EFD: jax.Array,
    gate_RF: jax.Array,
    up_RF: jax.Array,
    weights_R: jax.Array,
    tiles: RowTiles,
    *,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Backward through out_t = sum of weights_r (h_r down_e) over a token's rows r, with h =
    silu(gate) * up.

    dout_RD: of each row's token. weights_R: float32.
    With u = dout down_e^T, returns dgate_RF and dup_RF (of dh = weights * u), hw_RF = weights * h
    (for down's gradient: hw^T dout), and dweights_R = sum over f of u * h, float32.
    """
    tile = tiles.tile

    def compute(rows, matrices, results, beside):
        (dout, gate, up, weights), (down,), (dgate, dup, hw, dweights) = rows, matrices, results
        count, spread = weights.shape[0], _spread(weights, tile)
        sums = jnp.zeros((count * tile, LANES), jnp.float32)
        parts = chunks(gate.shape[1], CHUNK)
        for n, part in enumerate(parts):
            beside(n, len(parts))
            u = product(dout[...], down[part, :], transposed=True)
            g, v = gate[:, part].astype(jnp.float32), up[:, part].astype(jnp.float32)
            sigmoid = jax.nn.sigmoid(g)
            silu = g * sigmoid
            h = silu * v
            w = jnp.concatenate([spread] * (u.shape[1] // LANES), axis=1)
            dh = w * u
            uh = u * h
            for lanes in chunks(uh.shape[1], LANES):
                sums += uh[:, lanes]
            dgate[:, part] = (dh * v * (sigmoid + silu * (1 - sigmoid))).astype(dgate.dtype)
            dup[:, part] = (dh * silu).astype(dup.dtype)
            hw[:, part] = (w * h).astype(hw.dtype)
        for n in range(count):
            dweights[n] = jnp.sum(sums[n * tile : (n + 1) * tile].T, axis=0, keepdims=True)

    width = gate_RF.shape[1]
    rows = [
        rows_of(dout_RD),
        Rows(gate_RF, split=True),
        Rows(up_RF, split=True),
        _numbers(weights_R, tiles),
    ]
    results = [Result(width, gate_RF.dtype)] * 3 + [Result(1, jnp.float32, number=True)]
    *grads, dweights = sweep(
        compute,
        tiles,
        rows,
        [Matrices(down_EFD, 1)],
        results,
        blocks=blocks,
        name="grouped_swiglu_backward",
    )
    return *grads, jnp.sum(dweights, axis=0).reshape(-1)
