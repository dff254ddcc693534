import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax import losses
from glm_jax.model.moe import observe

B, L, D, V = 2, 10, 6, 17


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(B, L, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, L)).astype(np.int32)
    weights = rng.integers(0, 2, (B, L)).astype(np.float32)
    return h, head, targets, weights


def full(h, head, targets, weights):
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(h @ head, targets))


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_chunked_cross_entropy_and_its_gradients_equal_optax_on_full_logits(problem, chunk):
    h, head, targets, weights = problem
    chunked = lambda h, head: 3 * losses.chunked_cross_entropy(h, head, targets, weights, chunk)
    mine = jax.value_and_grad(chunked, (0, 1))(h, head)
    theirs = jax.value_and_grad(lambda h, head: 3 * full(h, head, targets, weights), (0, 1))(
        h, head
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), mine, theirs)
    np.testing.assert_allclose(chunked(h, head), theirs[0], rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_log_probabilities_and_entropies_are_those_of_the_full_logits(problem, chunk):
    """In float64, of logits far from zero, which leave a softmax as it is."""
    h, head, targets, weights = problem
    head = head + 50 * np.sign(h.sum()) / D  # the same for every entry of the vocabulary
    logits = h.astype(np.float64) @ head
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    entropy = -np.sum(np.exp(logprobs) * logprobs, axis=-1)
    assert entropy.std() > 0.1 and np.abs(logits).max() > 50
    _, (found, found_entropy) = losses.chunked_token_loss(
        lambda logprobs, weights: -weights * logprobs, h, head.astype(np.float32), targets, weights,
        chunk, True,
    )  # fmt: skip
    expected = np.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found_entropy, entropy, atol=1e-4)


def test_chunked_cross_entropy_never_holds_the_full_logits():
    h, head = jnp.zeros((2, 256, 8)), jnp.zeros((8, 512))
    targets, weights = jnp.zeros((2, 256), jnp.int32), jnp.ones((2, 256))
    grad = jax.grad(lambda h, w: losses.chunked_cross_entropy(h, w, targets, weights, 32), (0, 1))
    memory = jax.jit(grad).lower(h, head).compile().memory_analysis().temp_size_in_bytes
    assert memory < 2 * 256 * 512 * 4, "temporaries must stay below one set of logits"


def test_mtp_targets_stop_at_documents_and_padding():
    batch = {
        "targets": np.asarray([[11, 12, 13, 21, 22, 0]]),
        "segment_ids": np.asarray([[1, 1, 1, 2, 2, 0]]),
        "loss_weights": np.asarray([[1.0, 1, 1, 1, 1, 0]]),
    }
    targets, weights = losses.mtp_targets(batch)
    np.testing.assert_array_equal(weights, [[1, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(np.asarray(targets)[np.asarray(weights) > 0], [12, 13, 22])


def test_balance_loss_equals_the_formula_of_every_document():
    rng = np.random.default_rng(1)
    experts, per_token = 6, 2
    scores = rng.random((B, L, experts)).astype(np.float32)
    chosen = np.argsort(-scores, axis=-1)[..., :per_token]
    segments = np.asarray([[1, 1, 1, 1, 2, 2, 3, 3, 0, 0], [1] * 7 + [2] * 3])
    observation = observe(jnp.asarray(scores), jnp.asarray(chosen), jnp.asarray(segments))
    expected, counts = 0.0, np.zeros(experts)
    for b in range(B):
        for segment in set(segments[b]) - {0}:
            tokens = np.flatnonzero(segments[b] == segment)
            c = np.bincount(chosen[b, tokens].reshape(-1), minlength=experts)
            f = experts / (per_token * len(tokens)) * c
            p = np.mean(scores[b, tokens] / scores[b, tokens].sum(-1, keepdims=True), axis=0)
            expected += len(tokens) * np.sum(f * p)
            counts += c
    np.testing.assert_allclose(observation.balance_loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(observation.expert_counts, counts)


def test_bias_moves_against_the_load_by_its_rate_and_stays_at_rate_zero():
    bias = jnp.asarray([[0.5, 0.0, -0.5, 0.0]])
    counts = jnp.asarray([[40, 10, 5, 25]])
    np.testing.assert_allclose(
        losses.update_router_bias(bias, counts, 0.1), [[0.4, 0.1, -0.4, -0.1]], rtol=1e-6
    )
    np.testing.assert_array_equal(losses.update_router_bias(bias, counts, 0.0), bias)
    np.testing.assert_array_equal(losses.update_router_bias(bias, jnp.full((1, 4), 7), 0.1), bias)
