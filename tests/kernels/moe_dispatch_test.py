import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.moe_dispatch import api

TOKENS, PER_TOKEN, EXPERTS, WIDTH = 100, 3, 5, 4
sort = jax.jit(api.sort_by_expert, static_argnums=1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), spread=st.integers(1, EXPERTS + 2))
def test_sort_equals_numpys_stable_sort_and_unknown_experts_go_last(seed, spread):
    experts = np.random.default_rng(seed).integers(-1, spread, (TOKENS, PER_TOKEN)).astype(np.int32)
    plan = sort(experts, EXPERTS)
    key = np.where((experts < 0) | (experts >= EXPERTS), EXPERTS, experts).reshape(-1)
    order = np.argsort(key, kind="stable")
    np.testing.assert_array_equal(plan.source_R, order)
    np.testing.assert_array_equal(np.asarray(plan.slot_TK).reshape(-1)[order], np.arange(order.size))
    np.testing.assert_array_equal(plan.group_sizes_E, np.bincount(key, minlength=EXPERTS + 1)[:EXPERTS])


def test_gather_and_combine_equal_plain_indexing_in_values_and_gradients():
    rng = np.random.default_rng(0)
    experts = rng.integers(0, EXPERTS, (TOKENS, PER_TOKEN)).astype(np.int32)
    x, weights = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32), rng.random((TOKENS, PER_TOKEN)).astype(np.float32)
    factor = rng.normal(size=(EXPERTS,)).astype(np.float32)
    plan = sort(experts, EXPERTS)
    row_factor = factor[np.asarray(experts).reshape(-1)[np.asarray(plan.source_R)]][:, None]

    def ours(x, weights):
        return jnp.sum(jnp.sin(api.combine_rows(api.gather_rows(x, plan) ** 2 * row_factor, weights, plan)))

    def plain(x, weights):
        return jnp.sum(jnp.sin(jnp.einsum("tk,tk,td->td", weights, factor[experts], x**2)))

    for mine, theirs in zip(jax.value_and_grad(ours, (0, 1))(x, weights), jax.value_and_grad(plain, (0, 1))(x, weights), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, theirs)
