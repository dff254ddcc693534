"""The TPU attention kernel: simulated on the CPU against float64, and judged by the TPU
compiler.
"""

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compiler, interpret
from pallas_kernels.attention import kernel, shapes, tiled
from pallas_kernels.attention.api import attention
from pallas_kernels.attention.walk import Blocks

BATCH, LENGTH, HEADS, GROUPS = 2, 384, 4, 2
BLOCKS = Blocks(q=128, kv=128, piece=128, kv_piece=128, unroll=2, ahead=1, transposed=False)
# Tiles of several pieces, longer than the row's last block, and the other way to sum gradients of
# keys and values.
PIECES = Blocks(q=256, kv=256, piece=128, kv_piece=128, unroll=2, ahead=3, transposed=True)
RACES = {"detect_races": True, "uninitialized_memory": "nan"}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def documents(*lengths):
    """Ids of a row: documents of these lengths, then padding."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, LENGTH - len(ids))).astype(np.int32)


LAYOUTS = {
    "one document": [documents(LENGTH), documents(LENGTH)],
    "one-token documents": [documents(*[1] * LENGTH), documents(*[1] * 200, 100)],
    "across edges of blocks": [documents(127, 2, 255), documents(128, 129, 127)],
    "padding, and a row of nothing else": [documents(100, 50), documents()],
    "ids that come back": [
        np.tile([3, 1, 2, 0], LENGTH // 4).astype(np.int32),
        documents(90, 200)[::-1].copy(),
    ],
}


def inputs(dtype="float32", size=128, loudness=1.0, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(BATCH, LENGTH, n, size)) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    arrays = [
        np.asarray(jnp.asarray(x * f, dtype), np.float64)
        for x, f in zip(arrays, (loudness, loudness, 1, 1), strict=True)
    ]
    return *arrays, rng.normal(size=(BATCH, LENGTH, HEADS)).astype(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def simulated():
    """(q, k, v, dout, dlse, ids, scale, offsets) -> out, lse and three gradients, simulated with
    race detection.
    """

    def run(q, k, v, dout, dlse, q_ids, kv_ids, scale, q_offset, kv_offset, blocks):
        call = lambda q, k, v: attention(
            q, k, v, q_ids, scale=scale, implementation="pallas", kv_segment_ids_BM=kv_ids,
            q_offset=q_offset, kv_offset=kv_offset,
            with_lse=True,
        )  # fmt: skip
        # While this is traced, and no longer: later tests compile the product's own blocks.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiled, "blocks_for", lambda *_: blocks)
            out, pullback = jax.vjp(call, q, k, v)
            return *out, *pullback((dout, dlse))

    jitted = jax.jit(run, static_argnums=(7, 10))

    def call(arrays, ids, dtype="float32", scale=0.1, offsets=(0, 0), blocks=BLOCKS):
        q_ids, kv_ids = ids if isinstance(ids, tuple) else (ids, ids)
        with interpret.on(**RACES):
            return jitted(*(jnp.asarray(x, dtype) for x in arrays[:4]),
                          jnp.asarray(arrays[4], jnp.float32),
                          jnp.asarray(q_ids), jnp.asarray(kv_ids), scale, *map(jnp.int32, offsets),
                          blocks)  # fmt: skip

    return call


def expected(arrays, ids, scale=0.1, offsets=(0, 0)):
    q, k, v, dout, dlse = arrays
    q_ids, kv_ids = ids if isinstance(ids, tuple) else (ids, ids)
    values = oracle.attention(q, k, v, q_ids, kv_ids, scale, *offsets)
    return *values, *oracle.gradients(q, k, v, q_ids, kv_ids, scale, dout, dlse, *offsets)


def agree(found, wanted, tolerance):
    found = [np.asarray(x, np.float64) for x in found]
    seen = wanted[1] > oracle.NO_KEY
    np.testing.assert_array_equal(found[0][~seen], 0)
    np.testing.assert_array_equal(found[1][~seen], np.float32(oracle.NO_KEY))
    errors = [oracle.relative(found[1][seen], wanted[1][seen])]
    errors += [
        oracle.relative(f, w)
        for f, w in zip(found[:1] + found[2:], wanted[:1] + wanted[2:], strict=True)
    ]
    assert max(errors) < tolerance, errors
    assert not races_found()


def races_found() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_equal_a_loop_over_queries(simulated, layout):
    ids = np.stack(LAYOUTS[layout])
    agree(simulated(inputs(), ids), expected(inputs(), ids), TOLERANCE["float32"])


@pytest.mark.parametrize("layout", ["across edges of blocks", "ids that come back"])
def test_tiles_of_several_pieces_with_turned_sums(simulated, layout):
    ids = np.stack(LAYOUTS[layout])
    agree(simulated(inputs(), ids, blocks=PIECES), expected(inputs(), ids), TOLERANCE["float32"])


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**16), most=st.integers(1, 12), padding=st.integers(0, LENGTH))
def test_random_documents(simulated, seed, most, padding):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, most + 1, (BATCH, LENGTH)), axis=1).astype(np.int32)
    ids[0, LENGTH - padding :] = 0
    agree(simulated(inputs(seed=seed), ids), expected(inputs(seed=seed), ids), TOLERANCE["float32"])


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 128), ("float32", 64)])
def test_bfloat16_and_half_sized_heads(simulated, dtype, size):
    ids, arrays = np.stack(LAYOUTS["across edges of blocks"]), inputs(dtype, size)
    agree(simulated(arrays, ids, dtype), expected(arrays, ids), TOLERANCE[dtype])


@pytest.mark.parametrize("offsets", [(128, 0), (0, 128), (300, 77)])
def test_offsets_move_the_diagonal(simulated, offsets):
    """As in context parallelism: queries of one part of a row, keys of another."""
    ids = (
        np.stack([documents(40, 300), documents(384)]),
        np.stack([documents(200, 184), documents(384)]),
    )
    agree(
        simulated(inputs(), ids, offsets=offsets),
        expected(inputs(), ids, offsets=offsets),
        TOLERANCE["float32"],
    )


def test_parts_of_a_row_merge_to_the_whole(simulated):
    """Two halves of the keys, joined by their log-sum-exp, values and gradients: the cotangent of
    the log-sum-exp is in use.
    """
    arrays, ids = inputs(), np.stack(LAYOUTS["across edges of blocks"])
    parts = []
    for half in range(2):
        kv_ids = np.where((np.arange(LENGTH) >= 192) == half, ids, 0).astype(np.int32)
        parts.append(simulated(arrays, (ids, kv_ids))[:2])
    lse = np.logaddexp(*(np.asarray(p[1], np.float64) for p in parts))
    joined = sum(
        np.exp(np.asarray(p[1], np.float64) - lse)[..., None] * np.asarray(p[0], np.float64)
        for p in parts
    )
    assert oracle.relative(joined, expected(arrays, ids)[0]) < TOLERANCE["float32"]


def test_a_row_whose_exponentials_vanish_is_computed_again(simulated):
    """Keys opposite to their queries: scores lie 176 powers of two below the shift, where float32
    has only zero. Numbers are exact.
    """
    q, k, v, dout, dlse = inputs()
    q[:], k[:] = 1.0, -1.0
    k[:, 5] = 2.0**-10 - 1
    ids, scale = np.stack([documents(LENGTH)] * 2), 1 / tiled.LOG2_E
    shift = 128 - kernel.HEADROOM
    assert (
        shift > kernel.SURE
        and np.exp2(np.float32(-128 - shift)) < np.finfo(np.float32).smallest_subnormal
    )
    found = simulated((q, k, v, dout, dlse), ids, scale=scale)
    out, lse = oracle.attention(q, k, v, ids, ids, scale)
    assert oracle.relative(found[0], out) < TOLERANCE["float32"]
    assert oracle.relative(found[1], lse) < TOLERANCE["float32"]
    dv = oracle.gradients(q, k, v, ids, ids, scale, dout, dlse)[2]
    assert oracle.relative(found[4], dv) < TOLERANCE["float32"]
    assert not races_found()


def test_tiles_visited_are_those_with_an_allowed_pair():
    """Rows of real documents: at most 1.15 times as many, and fewer than splash attention
    visits.
    """
    for kind, share_of_splash in (("whole", 0.7), ("cut", 0.1)):
        ids = shapes.document_rows(32_768, kind)[:2]
        shape = shapes.SHAPES["32K"]
        counted = shapes.work(ids, shapes.chosen_blocks(shape, "forward"))
        assert counted["needed"] <= counted["visited"] <= 1.15 * counted["needed"]
        assert counted["visited"] < share_of_splash * counted["splash"]


# --- the TPU compiler ---


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("pass_", shapes.PASSES)
def test_useful_rates_of_both_forms_of_a_tile(topology, pass_, schedules):
    shape = shapes.SHAPES["128K"]
    mesh = compiler.one_device(topology)
    with jax.set_mesh(mesh):
        blocks = shapes.blocks_for(shape.length, shape.length, shape.heads, shape.dtype, pass_)
    wanted = {"forward": {"v5p": 0.93}, "backward": {"v5p": 0.99}}[pass_].get(
        topology[:3], {"forward": 0.40, "backward": 0.46}[pass_]
    )
    for form in ("full", "masked"):
        verdict = compiler.judge(shapes.probe(shape, blocks, pass_, form), topology, schedules)
        assert verdict.useful_rate[f"attention_{pass_}"] >= wanted, form


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_row_of_128k_with_segment_ids_compiles(topology):
    assert tiled.blocks_for is shapes.blocks_for  # not the blocks of a test
    compiler.compile_kernel(*whole(shapes.SHAPES["128K"]), topology)


def whole(shape):
    """Attention with segment ids and its gradients at a shape, as the model calls it: both forms of
    every tile in one program.
    """

    def run(q, k, v, ids, dout):
        out, pullback = jax.vjp(
            lambda *qkv: attention(*qkv, ids, scale=0.1, implementation="pallas"), q, k, v
        )
        return out, pullback(dout)

    array = lambda n: jax.ShapeDtypeStruct((1, shape.length, n, 128), shape.dtype)
    q, kv = array(shape.groups * shape.heads), array(shape.groups)
    return run, (q, kv, kv, jax.ShapeDtypeStruct((1, shape.length), jnp.int32), q)
