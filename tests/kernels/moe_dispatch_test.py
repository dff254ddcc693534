"""Sorting rows by expert and the routed feed-forward of one device, by XLA: against numpy's sort
and a float64 loop over pairs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.moe_dispatch import api, sorting
from tests.kernels.routed_oracle import draw, errors, oracle

TOKENS, PER_TOKEN, EXPERTS, WIDTH = 100, 3, 5, 4
sort = jax.jit(api.sort_by_expert, static_argnums=(1, 2))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16), spread=st.integers(0, EXPERTS + 2),
    alignment=st.sampled_from((1, 8, 128)),
    tokens=st.sampled_from((1, sorting.RANK_BLOCK // PER_TOKEN, TOKENS)),
)  # fmt: skip
@example(seed=0, spread=0, alignment=8, tokens=TOKENS)  # no expert at all
@example(seed=0, spread=1, alignment=128, tokens=TOKENS)
def test_sort_equals_numpys_stable_sort_with_aligned_experts_and_unknown_ones_last(
    seed, spread, alignment, tokens
):
    experts = (
        np.random.default_rng(seed)
        .integers(-1, max(spread, 0), (tokens, PER_TOKEN))
        .astype(np.int32)
    )
    plan = sort(experts, EXPERTS, alignment)
    key = np.where((experts < 0) | (experts >= EXPERTS), EXPERTS, experts).reshape(-1)
    sizes = np.bincount(key, minlength=EXPERTS + 1)
    expected = np.full(
        -(-(key.size + min(EXPERTS, key.size) * (alignment - 1)) // alignment) * alignment, -1
    )
    start = 0
    for expert, size in enumerate(sizes):
        expected[start : start + size] = np.flatnonzero(key == expert)
        start += -(-size // alignment) * alignment
    np.testing.assert_array_equal(plan.source_R, expected)
    np.testing.assert_array_equal(
        np.asarray(plan.source_R)[np.asarray(plan.slot_TK).reshape(-1)], np.arange(key.size)
    )
    np.testing.assert_array_equal(plan.group_sizes_E, sizes[:EXPERTS])


def test_few_pairs_need_no_room_for_experts_that_they_cannot_reach():
    assert sort(np.zeros((2, 3), np.int32), 160, 16).source_R.shape == (96,)


@pytest.mark.parametrize("size", [3, sorting.RANK_BLOCK, sorting.RANK_BLOCK + 1])
def test_what_few_are_compared_for_equals_what_many_are_looked_up(size):
    rng = np.random.default_rng(size)
    x, index = rng.normal(size=7).astype(np.float32), rng.integers(-1, 7, size)
    np.testing.assert_array_equal(sorting.take(x, index), np.where(index < 0, 0, x[index]))
    sizes = rng.integers(0, 9, 7).astype(np.int32)
    np.testing.assert_array_equal(
        sorting.starts(sizes, index), np.where(index < 0, 0, (np.cumsum(sizes) - sizes)[index])
    )


@pytest.mark.parametrize("alignment", [1, 8])
def test_gather_and_combine_equal_plain_indexing_in_values_and_gradients(alignment):
    rng = np.random.default_rng(0)
    experts = rng.integers(0, EXPERTS, (TOKENS, PER_TOKEN)).astype(np.int32)
    x = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    weights = rng.random((TOKENS, PER_TOKEN)).astype(np.float32)
    factor = rng.normal(size=(EXPERTS,)).astype(np.float32)
    plan = sort(experts, EXPERTS, alignment)
    source = np.asarray(plan.source_R)
    # nobody reads what stands between
    row_factor = np.where(source < 0, np.nan, factor[experts.reshape(-1)[source]])[:, None]

    def ours(x, weights):
        return jnp.sum(
            jnp.sin(api.combine_rows(api.gather_rows(x, plan) ** 2 * row_factor, weights, plan))
        )

    def plain(x, weights):
        return jnp.sum(jnp.sin(jnp.einsum("tk,tk,td->td", weights, factor[experts], x**2)))

    for mine, theirs in zip(
        jax.value_and_grad(ours, (0, 1))(x, weights),
        jax.value_and_grad(plain, (0, 1))(x, weights),
        strict=True,
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, theirs
        )


@pytest.mark.parametrize("implementation", ["reference", "batched", "ragged_dot"])
# by MANY_ROWS, the last as one product
@pytest.mark.parametrize(("tokens", "weighted"), [(7, True), (80, True), (80, False), (700, True)])
def test_routed_feed_forward_equals_a_loop_over_pairs(implementation, tokens, weighted):
    case = draw(
        np.random.default_rng(1),
        tokens=tokens,
        per_token=2,
        experts=4,
        width=12,
        ffn=10,
        weighted=weighted,
    )
    run = lambda *args: api.routed_ffn(
        args[0], case.expert_TK, *args[1:], implementation=implementation
    )
    y, pullback = jax.vjp(run, *case.arguments)
    for name, error in errors((y, *pullback(case.dy_TD)), oracle(case)).items():
        assert error < 1e-5, (name, error)


def test_gradients_come_in_the_type_of_their_argument():
    case = draw(
        np.random.default_rng(1),
        tokens=8,
        per_token=2,
        experts=4,
        width=12,
        ffn=10,
        dtype=jnp.bfloat16,
    )
    run = lambda *args: api.routed_ffn(args[0], case.expert_TK, *args[1:], implementation="batched")
    y, pullback = jax.vjp(run, *case.arguments)
    assert y.dtype == jnp.bfloat16
    assert [g.dtype for g in pullback(y)] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]


def test_bad_input_is_named_with_who_would_take_it():
    case = draw(np.random.default_rng(0), tokens=4, per_token=2, experts=2, width=96, ffn=128)
    x, *rest = case.arguments
    run = lambda x, implementation: api.routed_ffn(
        x, case.expert_TK, *rest, implementation=implementation
    )
    with pytest.raises(
        ValueError, match="'megablox' is not one of auto, reference, batched, ragged_dot, pallas"
    ):
        run(x, "megablox")
    with pytest.raises(ValueError, match=r"x \(4, 95\)"):
        run(x[:, 1:], "batched")
    with pytest.raises(
        ValueError,
        match=(
            "model width 96: 'pallas' takes multiples of 128; 'ragged_dot' and 'batched' take"
            " others"
        ),
    ):
        run(x, "pallas")
    with pytest.raises(ValueError, match="type float16: 'pallas' takes bfloat16 and float32"):
        run(x.astype(jnp.float16), "pallas")
    wide = draw(np.random.default_rng(0), tokens=4, per_token=2, experts=2, width=128, ffn=128)
    with pytest.raises(
        ValueError,
        match="'pallas' needs a TPU, or pallas_kernels.interpret.on; 'batched' is for this CPU",
    ):
        api.routed_ffn(
            wide.arguments[0], wide.expert_TK, *wide.arguments[1:], implementation="pallas"
        )
