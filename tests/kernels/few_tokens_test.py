"""Dispatch and combine of few tokens equal numpy's, and take nothing from rows that no pair
owns.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import interpret
from pallas_kernels.grouped_matmul import rows
from pallas_kernels.moe_dispatch import few_tokens


def draw(num_tokens: int, num_groups: int, dtype, width: int = 384):
    rng = np.random.default_rng(num_tokens)
    x_TD = jnp.asarray(rng.normal(size=(num_tokens, width)), dtype)
    # Each token's groups are different ones; one in five is of no group.
    choices = rng.permuted(np.tile(np.arange(num_groups), (num_tokens, 1)), axis=1)[:, :3]
    group_TK = np.where(rng.random(choices.shape) < 0.2, num_groups, choices)
    return rng, x_TD, jnp.asarray(group_TK, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("num_tokens", "num_groups", "alignment"), [(1, 7, 1), (5, 7, 16), (29, 11, 8)]
)
def test_rows_are_the_tokens_sorted_by_group(num_tokens, num_groups, alignment, dtype):
    _, x_TD, group_TK = draw(num_tokens, num_groups, dtype)
    num_rows = num_tokens * 3 + num_groups * (alignment - 1)
    words = alignment == 1
    with interpret.on(uninitialized_memory="nan"):
        found = few_tokens.dispatch(
            x_TD,
            group_TK,
            num_groups=num_groups,
            num_rows=num_rows,
            alignment=alignment,
            words=words,
        )
    expected, slot_TK, start = np.zeros((num_rows, x_TD.shape[1])), np.full(group_TK.shape, -1), 0
    for group in range(num_groups):
        pairs = np.argwhere(np.asarray(group_TK) == group)
        assert found.sizes_G[group] == len(pairs)
        for place, (token, choice) in enumerate(pairs, start):
            slot_TK[token, choice], expected[place] = place, x_TD[token]
        start += -(-len(pairs) // alignment) * alignment
    np.testing.assert_array_equal(found.slot_TK, slot_TK)
    np.testing.assert_array_equal(
        np.asarray(rows.from_rows(found.rows, dtype) if words else found.rows, np.float64), expected
    )


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("dtype", "words"), [(jnp.bfloat16, False), (jnp.bfloat16, True), (jnp.float32, True)]
)
def test_combine_adds_the_weighted_rows_in_float32(dtype, words, weighted):
    rng, x_TD, group_TK = draw(29, 11, dtype)
    with interpret.on():
        found = few_tokens.dispatch(x_TD, group_TK, num_groups=11, num_rows=90, words=False)
        slot_TK = np.asarray(found.slot_TK)
        y_RD = (
            jnp.asarray(rng.normal(size=(90, 384)), dtype)
            .at[np.setdiff1d(np.arange(90), slot_TK)]
            .set(jnp.nan)
        )
        weights_TK = rng.random(slot_TK.shape).astype(np.float32) if weighted else None
        given = rows.to_rows(y_RD) if words else y_RD
        y_TD = few_tokens.combine(
            given,
            found.slot_TK,
            None if weights_TK is None else jnp.asarray(weights_TK),
            width=384,
            dtype=dtype,
        )
    values = np.where((slot_TK >= 0)[..., None], np.asarray(y_RD, np.float64)[slot_TK], 0)
    expected = np.einsum(
        "tk,tkd->td", np.ones(slot_TK.shape) if weights_TK is None else weights_TK, values
    )
    # Half of a unit in the last place of the result, and float32's rounding of its terms.
    bound = float(ml_dtypes.finfo(dtype).eps) / 2 * np.abs(expected) + 1e-6
    assert np.all(np.abs(np.asarray(y_TD, np.float64) - expected) <= bound)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [384, 5120])
def test_unpacked_words_are_the_rows(dtype, width):
    x_RD = jnp.asarray(np.random.default_rng(0).normal(size=(150, width)), dtype)
    with interpret.on():
        np.testing.assert_array_equal(
            jax.jit(lambda words: rows.unpack(words, width=width, dtype=dtype))(rows.to_rows(x_RD)),
            x_RD,
        )


def test_more_tokens_than_vector_memory_holds_are_not_taken():
    with interpret.on():
        assert few_tokens.takes(32, 256, 5120, jnp.bfloat16)
        assert not few_tokens.takes(2048, 16384, 5120, jnp.bfloat16)
