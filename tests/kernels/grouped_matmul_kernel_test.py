"""The TPU kernels, simulated with races detected and memory NaN until written, against float64
products an expert at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import interpret
from pallas_kernels.grouped_matmul import kernel, reference, rows
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.gather import gathered
from pallas_kernels.grouped_matmul.shapes import Blocks, GradientBlocks
from pallas_kernels.grouped_matmul.tiles import buffer_rows, row_steps, row_tiles
from pallas_kernels.grouped_matmul.weight_gradient import weight_gradient

D, F, E, TILE, ROWS = 384, 256, 4, 64, 600
KERNELS = ("matmul", "transposed", "swiglu", "two", "backward", "gradient")
BUFFER = buffer_rows(ROWS, E, TILE)
LIMIT = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
# One step a tile, columns in blocks, steps over two cores; steps of up to five tiles, with a gap in
# the matrices; bodies for two tiles that also take one.
BLOCKS = {
    "small": Blocks(2, 1, False, 1, 0, 2, 2**26),
    "joined": Blocks(1, 3, True, 1, 128, 1, 2**26),
    "granules": Blocks(1, 4, False, 2, 0, 1, 2**26),
}
GRADIENT_BLOCKS = {
    "small": GradientBlocks(3, 2, 2, 128, 1, 0, 2**26),
    "joined": GradientBlocks(1, 1, 4, 256, 1, 128, 2**26),
    "granules": GradientBlocks(1, 1, 8, 256, 4, 0, 2**26),
}
SIZES = ([130, 0, 300, 1], [0, 0, 600, 0], [0, 0, 0, 0], [128, 256, 1, 129])


def simulated(function, *args):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    with interpret.on(detect_races=True, uninitialized_memory="nan"):
        out = jax.tree.map(np.asarray, jax.jit(function)(*args))
    assert not interpret_pallas_call.races.races_found
    return out


def relative(value, oracle):
    value, oracle = np.asarray(value, np.float64), np.asarray(oracle, np.float64)
    return np.linalg.norm(value - oracle) / max(np.linalg.norm(oracle), 1e-30)


def place(sizes, tile=TILE, buffer=BUFFER):
    """Expert of each row of the aligned buffer, -1 in rows of none; number of rows in used
    tiles.
    """
    expert = np.full(buffer, -1)
    start = 0
    for e, size in enumerate(sizes):
        expert[start : start + size] = e
        start += -(-size // tile) * tile
    return expert, start


def data(seed, dtype, *shapes):
    """Arrays that the dtype holds exactly, so that a float64 oracle sees the same numbers."""
    rng = np.random.default_rng(seed)
    return [
        np.array(jnp.asarray(rng.normal(size=shape), dtype).astype(jnp.float32)) for shape in shapes
    ]


def by_expert(x, w, expert):
    y = np.zeros((len(x), w.shape[2]))
    for e in range(len(w)):
        y[expert == e] = x[expert == e].astype(np.float64) @ w[e].astype(np.float64)
    return y


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 900) | st.sampled_from([0, 1, 128, 129, 256]), min_size=1,
                      max_size=7),
       size=st.sampled_from([1, 2, 4]), join=st.booleans(), empty=st.booleans())  # fmt: skip
def test_steps_take_every_tile_of_an_expert_once_and_in_order(sizes, size, join, empty):
    tiles = row_tiles(
        jnp.asarray(sizes, jnp.int32), buffer_rows(sum(sizes), len(sizes), TILE), TILE
    )
    steps, num = row_steps(tiles, size, join=join, visit_empty=empty)
    steps, taken, visited = [np.asarray(s)[: int(num)] for s in steps], [], []
    for n, (tile, count, expert, run, following) in enumerate(zip(*steps, strict=True)):
        taken += [(tile + i, expert) for i in range(count)]
        assert 0 <= count <= (2 * size - 1 if join else size)
        if not visited or visited[-1] != expert:
            visited.append(expert)
        assert run == len(visited) - 1
        later = [e for e in steps[2][n:] if e != expert]
        assert following == (later[0] if later else -1)
    assert visited == [e for e, s in enumerate(sizes) if s or empty]
    assert taken == [
        (i, e) for i, e in enumerate(np.repeat(range(len(sizes)), [-(-s // TILE) for s in sizes]))
    ]
    assert int(tiles.used[0]) == len(taken)
    assert np.array_equal(
        np.asarray(reference.live_rows(jnp.asarray(sizes, jnp.int32), tiles.rows, TILE)),
        place(sizes, buffer=tiles.rows)[0] >= 0,
    )


@pytest.fixture(
    scope="module",
    params=[(name, dtype) for name in BLOCKS for dtype in LIMIT],
    ids=lambda p: f"{p[0]}-{p[1].__name__}",
)
def products(request):
    """All kernels on rows as they are, compiled once a case: sizes are data."""
    name, dtype = request.param
    blocks = BLOCKS[name]

    def run(which, sizes, x, gate, up, dy, down, weights):
        tiles = row_tiles(sizes, BUFFER, TILE)
        x, gate, up, dy, down = (a.astype(dtype) for a in (x, gate, up, dy, down))
        return {
            "matmul": lambda: kernel.matmul(x, gate, tiles, blocks=blocks),
            "transposed": lambda: kernel.matmul(x, down, tiles, transposed=True, blocks=blocks),
            "swiglu": lambda: kernel.swiglu(x, gate, up, tiles, blocks=blocks),
            "two": lambda: kernel.two_matmul(dy, 2 * dy, gate, up, tiles, blocks=blocks),
            "backward": lambda: kernel.swiglu_backward(
                x, down, dy, dy[:, ::-1], weights, tiles, blocks=blocks
            ),
            "gradient": lambda: weight_gradient(x, dy, tiles, blocks=GRADIENT_BLOCKS[name]),
        }[which]()

    # One program a kernel: the simulator knows the races of the last kernel alone.
    programs = {which: functools.partial(run, which) for which in KERNELS}
    return dtype, lambda *args: {
        which: simulated(program, *args) for which, program in programs.items()
    }


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_kernel_equals_float64(products, sizes):
    """Rows past the used tiles come in as NaN and must not matter."""
    dtype, run = products
    limit = LIMIT[dtype]
    expert, used = place(sizes)
    x, gate, up, dy, down, weights = data(
        0, dtype, (BUFFER, D), (E, D, F), (E, D, F), (BUFFER, F), (E, F, D), (BUFFER,)
    )
    for array in (x, dy):
        array[expert < 0] = 0
        array[used:] = np.nan
    out = run(jnp.asarray(sizes, jnp.int32), x, gate, up, dy, down, weights)
    x = x[:used].astype(np.float64)
    dy = dy[:used].astype(np.float64)
    weights = weights[:used, None]
    expert = expert[:used]
    turn = lambda w: w.transpose(0, 2, 1)
    g, u = by_expert(x, gate, expert), by_expert(x, up, expert)
    sigmoid = lambda g: 1 / (1 + np.exp(-g))
    back, a, b = by_expert(x, turn(down), expert), dy, dy[:, ::-1]
    h = a * sigmoid(a) * b
    slope = sigmoid(a) * (1 + a * (1 - sigmoid(a)))
    expected = {
        "matmul": g, "transposed": back, "swiglu": [g * sigmoid(g) * u, g, u],
        "two": by_expert(dy, turn(gate), expert) + by_expert(2 * dy, turn(up), expert),
        "backward": [weights * back * b * slope, weights * back * a * sigmoid(a), weights * h,
                     np.sum(back * h, axis=1)],
    }  # fmt: skip
    for name, oracle in expected.items():
        values = out[name] if isinstance(oracle, list) else [out[name]]
        for value, wanted in zip(
            values, oracle if isinstance(oracle, list) else [oracle], strict=True
        ):
            assert relative(value[:used], wanted) < limit, name
            assert not np.any(np.asarray(value[:used], np.float32)[expert < 0]), (
                f"{name} leaves something in rows of no expert"
            )
    for e in range(E):
        oracle = x[expert == e].T @ dy[expert == e]
        assert (
            relative(out["gradient"][e], oracle) < limit
            if sizes[e]
            else not np.any(out["gradient"][e])
        )


@pytest.mark.parametrize("dtype", LIMIT, ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    ("name", "sizes", "depth"),
    [
        ("small", [20, 0, 9, 1], 384),
        ("joined", [43, 2, 0, 5], 512),
        ("granules", [33, 2, 0, 81], 512),
    ],
)
def test_rows_that_are_fetched_by_index_equal_rows_that_were_gathered_before(
    name, sizes, depth, dtype
):
    """Tiles of 16 rows, because every row is a copy of its own here. 384 columns of bfloat16 do not
    share words, 512 do; in blocks, too.
    """
    tile, tokens = 16, 23
    buffer = buffer_rows(sum(sizes), E, tile)
    expert, used = place(sizes, tile, buffer)
    x, gate, up, a, b, down, weights = data(
        1,
        dtype,
        (tokens, depth),
        (E, depth, F),
        (E, depth, F),
        (buffer, F),
        (buffer, F),
        (E, F, depth),
        (buffer,),
    )
    a[expert < 0] = b[expert < 0] = 0
    source = np.where(expert >= 0, np.random.default_rng(2).integers(0, tokens, buffer), -1).astype(
        np.int32
    )
    rows_RD = np.where(source[:, None] >= 0, x[source], 0)
    cuts = dataclasses.replace(
        GRADIENT_BLOCKS[name], rows=depth // 256 if name == "joined" else 1, columns=1
    )

    def run(which, x, source):
        tiles = row_tiles(jnp.asarray(sizes, jnp.int32), buffer, tile)
        cast = lambda *arrays: [jnp.asarray(array, dtype) for array in arrays]
        x, gate_, up_, a_, b_, down_ = cast(x, gate, up, a, b, down)
        x = x if source is None else gathered(x, source)
        words = dict(
            words=source is not None,
            blocks=dataclasses.replace(BLOCKS[name], columns=3 if name == "small" else 1),
        )
        return {
            "swiglu": lambda: kernel.swiglu(x, gate_, up_, tiles, keep=False, blocks=BLOCKS[name]),
            "backward": lambda: kernel.swiglu_backward(
                x, down_, a_, b_, weights, tiles, blocks=BLOCKS[name]
            ),
            "gradient of x": lambda: weight_gradient(x, a_, tiles, blocks=cuts),
            "gradient of dy": lambda: weight_gradient(
                a_, x, tiles, blocks=dataclasses.replace(cuts, rows=1, columns=cuts.rows)
            ),
            "matmul": lambda: kernel.matmul(a_, down_, tiles, **words),
            "two": lambda: kernel.two_matmul(a_, b_, gate_, up_, tiles, **words),
        }[which]()

    for which in ("swiglu", "backward", "gradient of x", "gradient of dy", "matmul", "two"):
        ours = simulated(functools.partial(run, which), x, source)
        plain = simulated(functools.partial(run, which, source=None), rows_RD)
        if which in ("matmul", "two"):
            ours = np.asarray(rows.from_rows(ours, dtype))
        for value, wanted in zip(
            *([out] if isinstance(out, np.ndarray) else out for out in (ours, plain)), strict=True
        ):
            end = len(value) if which.startswith("gradient") else used
            assert relative(value[:end], wanted[:end]) < 1e-6 and np.any(value[:end]), which


@pytest.fixture(scope="module")
def differentiated():
    def run(x, w, sizes, dy):
        y, pullback = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, implementation="pallas", alignment=TILE), x, w
        )
        return y, *pullback(dy)

    return lambda *args: simulated(run, *args)


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=E, max_size=E).map(sorted)
       | st.sampled_from([[0, 0, 0, ROWS], [0, ROWS, ROWS, ROWS], [0] * E]),
       seed=st.integers(0, 99))  # fmt: skip
def test_the_differentiable_product_for_any_sizes(differentiated, cuts, seed):
    """All that lies in rows of no group is NaN, also in the gradient that comes in."""
    sizes = np.diff([0, *cuts]).astype(np.int32)
    expert, _ = place(sizes)
    x, w, dy = data(seed, jnp.float32, (BUFFER, F), (E, F, D), (BUFFER, D))
    x[expert < 0] = dy[expert < 0] = np.nan
    y, dx, dw = differentiated(x, w, sizes, dy)
    assert not np.any(y[expert < 0]) and not np.any(dx[expert < 0])
    assert relative(y, by_expert(x, w, expert)) < 1e-5
    assert relative(dx, by_expert(dy, w.transpose(0, 2, 1), expert)) < 1e-5
    for e in range(E):
        assert relative(dw[e], x[expert == e].astype(np.float64).T @ dy[expert == e]) < 1e-5
