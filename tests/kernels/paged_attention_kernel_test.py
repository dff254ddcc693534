"""The TPU kernel of paged attention, simulated, against float64; and through the real TPU
compiler.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compiler, interpret
from pallas_kernels.paged_attention import kernel, reference, shapes, store_kernel, work
from pallas_kernels.paged_attention.api import paged_attention, store
from pallas_kernels.paged_attention.work import Blocks

LAYERS, PAGE = 2, 128
STRICT = {"detect_races": True, "uninitialized_memory": "nan"}
LIMIT = {"float32": 1e-5, "bfloat16": 1e-2, "float8_e4m3fn": 1e-2}
PLAIN = Blocks(pages=2, join=1, tokens=8, bits=False, turn=2)


def cache(starts, counts, length, cache_dtype, *, groups, per_group, size, page_size=PAGE, seed=0):
    """Inputs of a call: keys and values of each row scattered over the pages of layer 1; every
    other page is NaN.
    """
    rng = np.random.default_rng(seed)
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    width = max(-(-end // page_size) for end in [*ends, 1])
    num_pages = len(starts) * width + 1
    free = iter(rng.permutation(num_pages))
    tables = np.full((len(starts), width), next(free), np.int32)
    k = np.full((LAYERS, num_pages, groups, size, page_size), np.nan, np.float32)
    v = np.full((LAYERS, num_pages, groups, page_size, size), np.nan, np.float32)
    for row, end in enumerate(ends):
        for block in range(-(-end // page_size)):
            tables[row, block] = page = next(free)
            k[1, page], v[1, page] = (rng.normal(size=(groups, *x.shape[3:])) for x in (k, v))
    dtype = "float32" if cache_dtype == "float32" else "bfloat16"
    q = jnp.asarray(2 * rng.normal(size=(len(starts), length, groups * per_group, size)), dtype)
    ints = [jnp.asarray(x, jnp.int32) for x in (tables, starts, counts)]
    return q, jnp.asarray(k, cache_dtype), jnp.asarray(v, cache_dtype), 1, *ints


def oracle(q, k_pages, v_pages, layer, tables, starts, counts, scale):
    """In float64, token by token; zeros where no token is real."""
    q, k_pages, v_pages = (
        np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k_pages, v_pages)
    )
    out = np.zeros(q.shape)
    for row, (start, count) in enumerate(zip(np.asarray(starts), np.asarray(counts), strict=True)):
        pages = np.asarray(tables)[row]
        k = np.concatenate(list(k_pages[layer, pages]), axis=-1)  # [G, H, M]
        v = np.concatenate(list(v_pages[layer, pages]), axis=1)
        for token in range(count):
            for head in range(q.shape[2]):
                group, end = head // (q.shape[2] // len(k)), start + token + 1
                scores = scale * q[row, token, head] @ k[group, :, :end]
                exps = np.exp(scores - scores.max())
                out[row, token, head] = exps / exps.sum() @ v[group, :end]
    return out


def races_found() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def check(args, blocks: Blocks, *, cores=1, **options):
    scale = args[0].shape[-1] ** -0.5
    works = work.read(args[0].shape[1], args[1], *args[-2:], blocks, cores)
    with interpret.on(**STRICT | options):
        ours = np.asarray(kernel.paged_attention(*args, works, scale, blocks).astype(jnp.float32))
    assert not races_found()
    expected = oracle(*args, scale)
    for row, count in enumerate(np.asarray(args[-1])):
        assert not ours[row, count:].any()
        if count:
            error = np.linalg.norm(ours[row, :count] - expected[row, :count]) / np.linalg.norm(
                expected[row, :count]
            )
            assert error < LIMIT[args[1].dtype.name], (row, error)


@pytest.mark.parametrize(("dtype", "groups", "per_group", "size", "length", "blocks", "cores"), [
    ("float32", 2, 12, 128, 1, PLAIN, 1),
    ("float32", 2, 3, 64, 3, Blocks(2, 2, 8, False, 1), 2),  # cores share the heads
    ("bfloat16", 1, 12, 128, 1, Blocks(4, 2, 8, False, 1), 2),  # or the rows
    ("bfloat16", 2, 4, 64, 8, PLAIN, 1),
    ("float8_e4m3fn", 2, 12, 128, 1, PLAIN, 1),
    ("float8_e4m3fn", 1, 12, 128, 2, Blocks(2, 2, 8, True, 1), 1),
    # a chunk of prompt in blocks of queries
    ("float32", 1, 2, 128, 40, Blocks(2, 1, 16, False, 1), 1),
])  # fmt: skip
def test_values_over_ragged_rows(dtype, groups, per_group, size, length, blocks, cores):
    starts = [0, 127, 300, 5, 513, 128]
    counts = [length, 1, 0, min(2, length), length, length]
    check(
        cache(starts, counts, length, dtype, groups=groups, per_group=per_group, size=size),
        blocks,
        cores=cores,
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 4)), min_size=1, max_size=5),
    st.integers(0, 10**6),
)
def test_values_over_random_rows(rows, seed):
    starts, counts = zip(*rows, strict=True)
    check(cache(starts, counts, 4, "float32", groups=2, per_group=2, size=128, seed=seed), PLAIN)


def test_two_cores_at_once_do_not_race():
    args = cache([0, 400, 3], [1, 1, 0], 1, "float32", groups=1, per_group=2, size=128)
    check(args, PLAIN, cores=2, num_cores_or_threads=2)


def test_pages_of_256_tokens_and_no_rows_at_all():
    check(
        cache(
            [700, 0, 255], [1, 1, 1], 1, "bfloat16", groups=2, per_group=2, size=128, page_size=256
        ),
        PLAIN,
    )
    check(cache([700, 0], [0, 0], 1, "bfloat16", groups=1, per_group=2, size=128), PLAIN, cores=2)


def test_only_the_rows_own_pages_are_read():
    """Every copy of a page that the kernel starts, counted: each page of each row once."""
    starts, counts = [0, 127, 300, 513], [1, 1, 0, 1]
    row, block, pages, part, total = map(
        np.asarray,
        work._read(jnp.asarray(starts), jnp.asarray(counts), 1, 1, PAGE, 2, 1, split=False),
    )
    assert part.tolist() == [0, 3] and total.tolist() == [1 + 1 + 3]
    assert dict(zip(row[:3].tolist(), pages[:3].tolist(), strict=True)) == {0: 1, 1: 1, 3: 5}
    assert not block.any()


def test_cores_share_a_ragged_list_evenly():
    starts = np.full(16, 128 * 16 - 1)
    *_, part, total = work._read(
        jnp.asarray(starts), jnp.ones(16, jnp.int32), 1, 1, PAGE, 4, 2, split=True
    )
    assert part.tolist() == [0, 8, 8, 16] and total.tolist() == [32, 32]


@pytest.mark.parametrize(("name", "topology"), [
    ("32K", "v5p:2x2x1"), ("32K", "v6e:2x2"), ("32K", "tpu7x:2x2x1"),
    ("32K, one head", "tpu7x:2x2x1"), ("32K, 4 tokens", "tpu7x:2x2x1"),
    ("128K fp8", "v5p:2x2x1"), ("128K fp8", "v6e:2x2"), ("128K fp8", "tpu7x:2x2x1"),
    ("32K fp8, one head", "v6e:2x2"),
])  # fmt: skip
def test_hbm_binds_it_on_every_chip(name, topology, schedules):
    """*Compiled*: cycles of a step's pages against the time that HBM takes for their bytes."""
    shape = shapes.SHAPES[name]
    with jax.set_mesh(compiler.one_device(topology)):
        blocks = shapes.chosen_blocks(shape, "forward")
    cycles, hbm_cycles = shapes.step_cycles(shape, blocks, topology, schedules)
    assert cycles < hbm_cycles


@pytest.mark.parametrize("name", sorted(shapes.SHAPES))
def test_bytes_moved_are_at_most_a_tenth_over_those_needed(name):
    shape = shapes.SHAPES[name]
    probe = shapes.probe(shape, dataclasses.replace(PLAIN, tokens=shape.length), "forward")
    assert probe.hbm_bytes <= 1.1 * probe.hbm_bytes_needed


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_prompts_chunk_and_small_heads_compile(topology):
    shape = dataclasses.replace(
        shapes.SHAPES["32K" if topology == "tpu7x:2x2x1" else "32K, one head"], length=512, batch=2
    )
    with jax.set_mesh(compiler.one_device(topology)):
        probe = shapes.probe(shape, shapes.chosen_blocks(shape, "forward"), "forward")
    compiler.compile_kernel(probe.function, probe.args, topology)
    ints = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    pages = [
        jax.ShapeDtypeStruct((2, 64, 4, *dims), "float8_e4m3fn") for dims in ((64, 128), (128, 64))
    ]
    args = (
        jax.ShapeDtypeStruct((4, 2, 16, 64), jnp.bfloat16),
        *pages,
        ints(),
        ints(4, 16),
        ints(4),
        ints(4),
    )
    compiler.compile_kernel(
        lambda *args: paged_attention(*args, scale=0.1, implementation="pallas"), args, topology
    )


def test_what_the_kernel_does_not_take_is_named():
    args = list(cache([5], [1], 1, "float32", groups=1, per_group=2, size=128))
    run = lambda *args: paged_attention(*args, scale=1.0, implementation="pallas")
    with pytest.raises(
        ValueError, match="no TPU, and pallas_kernels.interpret is not on; 'xla' takes it"
    ):
        run(*args)
    short = cache([5], [1], 1, "float32", groups=1, per_group=2, size=128, page_size=64)
    with pytest.raises(ValueError, match="page size 64: takes multiples of 128; 'xla' takes it"):
        run(*short)
    small = cache([5], [1], 1, "float32", groups=1, per_group=2, size=32)
    with pytest.raises(ValueError, match="head size 32: takes 64 and 128"):
        run(*small)
    with pytest.raises(ValueError, match="type float16 of q: takes bfloat16, float32"):
        run(args[0].astype(jnp.float16), *args[1:])
    with pytest.raises(
        ValueError,
        match=(
            "types int8 and int8 of pages: takes one of bfloat16, float32, float8_e4m3fn for both"
        ),
    ):
        run(args[0], args[1].astype(jnp.int8), args[2].astype(jnp.int8), *args[3:])
    with pytest.raises(ValueError, match="tables of 1 x 200000 pages: takes 131072 in all"):
        run(*args[:4], jnp.zeros((1, 200_000), jnp.int32), *args[5:])


# --- storing ---


def new_tokens(args, length, seed=1):
    """Keys and values of `length` new tokens a row, NaN where they are not real; the pages with
    them, by numpy.
    """
    _, k_pages, v_pages, layer, tables, starts, counts = args
    rng = np.random.default_rng(seed)
    dtype = "float32" if k_pages.dtype == jnp.float32 else "bfloat16"
    shape = len(tables), length, k_pages.shape[2], k_pages.shape[3]
    k, v = (jnp.asarray(100 * rng.normal(size=shape), dtype) for _ in range(2))
    stored = [np.array(pages.astype(jnp.float32)) for pages in (k_pages, v_pages)]
    real = [np.asarray(reference.saturated(x, k_pages.dtype).astype(jnp.float32)) for x in (k, v)]
    for row, (start, count) in enumerate(zip(np.asarray(starts), np.asarray(counts), strict=True)):
        for token in range(count):
            block, place = divmod(start + token, v_pages.shape[3])
            if block < tables.shape[1]:
                stored[0][layer, tables[row, block], :, :, place] = real[0][row, token]
                stored[1][layer, tables[row, block], :, place] = real[1][row, token]
    unreal = jnp.arange(length) >= counts[:, None]
    return [jnp.where(unreal[..., None, None], jnp.nan, x) for x in (k, v)], stored


def run_store(new, args, cores: int):
    """The pages of `args`, as `cache` gives them, with new tokens."""
    _, k_pages, v_pages, layer, tables, starts, counts = args
    works = work.written(new[0].shape[1], k_pages, tables, starts, counts, cores)
    return store_kernel.store(*new, k_pages, v_pages, layer, starts, counts, works)


@pytest.mark.parametrize(("dtype", "groups", "size", "page_size", "length", "starts", "counts",
                          "cores"), [
    ("float32", 2, 128, 128, 1, (0, 127, 128, 300, 5), (1, 1, 0, 1, 1), 1),
    ("bfloat16", 8, 128, 128, 1, (0, 127, 128, 300, 5, 77, 15, 16), (1, 1, 1, 1, 0, 1, 1, 1), 2),
    ("bfloat16", 1, 128, 128, 4, (0, 126, 128, 301, 5), (4, 4, 0, 3, 1), 2),
    ("bfloat16", 3, 64, 256, 4, (125, 126, 254, 511), (4, 4, 3, 1), 1),
    ("float8_e4m3fn", 2, 128, 128, 3, (0, 126, 128, 301, 31), (3, 3, 0, 1, 2), 2),
    ("float32", 2, 64, 128, 300, (0, 127, 128, 40), (300, 300, 129, 0), 1),
    ("bfloat16", 2, 128, 128, 512, (0, 100, 256), (512, 511, 17), 2),
    ("float8_e4m3fn", 1, 128, 128, 200, (0, 100, 256), (200, 156, 128), 1),
])  # fmt: skip
def test_new_tokens_are_stored_and_nothing_else_changes(
    dtype, groups, size, page_size, length, starts, counts, cores
):
    args = cache(
        starts, counts, length, dtype, groups=groups, per_group=1, size=size, page_size=page_size
    )
    new, expected = new_tokens(args, length)
    with interpret.on(**STRICT):
        found = run_store(new, args, cores)
    assert not races_found()
    for ours, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.astype(jnp.float32)), right)
    for ours, right in zip(store(*new, *args[1:], implementation="xla"), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.astype(jnp.float32)), right)


def test_positions_behind_the_table_are_not_stored():
    args = cache((100,), (28,), 28, "float32", groups=1, per_group=1, size=64)
    args = *args[:-1], jnp.asarray([200])
    new, expected = new_tokens(args, 200)
    with interpret.on(**STRICT):
        found = run_store(new, args, 1)
    for ours, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), right)


@pytest.mark.parametrize("topology", sorted(compiler.SMALLEST.values()))
@pytest.mark.parametrize(
    ("dtype", "length", "groups"),
    [("bfloat16", 1, 8), ("float8_e4m3fn", 4, 8), ("bfloat16", 512, 1), ("float8_e4m3fn", 512, 8)],
)
def test_the_tpu_compiler_takes_the_store(topology, dtype, length, groups):
    array = jax.ShapeDtypeStruct
    new = array((8, length, groups, 128), jnp.bfloat16)
    k, v = array((92, 64, groups, 128, 128), dtype), array((92, 64, groups, 128, 128), dtype)
    ints = (
        array((), jnp.int32),
        array((8, 64), jnp.int32),
        array((8,), jnp.int32),
        array((8,), jnp.int32),
    )

    def function(*args):
        return run_store(args[:2], (None, *args[2:]), shapes.num_cores())

    compiler.compile_kernel(function, (new, new, k, v, *ints), topology)
