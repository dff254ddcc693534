"""Ours equals transformers' glm4_moe in float32 with random weights, through our own export; and
what no oracle can show.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glm_jax import hf, losses
from glm_jax.train.state import FAST_COMPILE
from pallas_kernels import interpret
from pallas_kernels.attention import blocked
from tests.model.oracle import Oracle, random_state, tiny_config, to_jax

CASES = {  # the implementations are spread over the cases: each must equal the oracle
    "qk_norm": {"qk_norm": True, "grouped_matmul": "batched", "attention": "xla"},
    "groups": {"num_expert_groups": 2, "num_groups_per_token": 1, "qk_norm": False,
               "rope_theta": 1e6, "mtp_embeddings": "own",
                   "grouped_matmul": "ragged_dot", "attention": "xla"},
    "reference": {"num_expert_groups": 2, "num_groups_per_token": 1, "qk_norm": True,
                  "grouped_matmul": "reference",
                      "attention": "reference", "scan_layers": False},
}  # fmt: skip
# By the TPU kernels, simulated: widths that they take, and as little as shows everything.
KERNELS = {"hidden_size": 128, "expert_ffn_size": 128, "num_layers": 2, "num_dense_layers": 1,
           "num_experts": 3, "num_experts_per_token": 2,
           "grouped_matmul": "pallas", "attention": "xla"}  # fmt: skip
LENGTH, CHUNK = 24, 7  # CHUNK does not divide LENGTH
DOCUMENTS = (9, 1, 11)  # in a row of 24, the rest padding


class Case:
    """Our model with one compiled function, and the oracle loaded from our export of it."""

    def __init__(self, folder, changes: dict):
        self.config = tiny_config(**changes)
        state = random_state(self.config)
        self.oracle = Oracle(hf.export_checkpoint(folder, self.config, state, dtype="float32"))
        self.state = to_jax(state)
        self.graphdef = nnx.graphdef(hf.abstract_model(self.config))
        function = functools.partial(weighted_losses, self.graphdef)
        self.compiled = jax.jit(jax.grad(function, has_aux=True), compiler_options=FAST_COMPILE)

    def logits(self, rows, segment_ids, positions, state=None):
        """Logits of both heads [2, L, V] for rows [2, L + 1]; the second head's last position has
        the last token of the row.
        """
        zeros = np.zeros(segment_ids.shape, np.float32)
        return jax.device_get(
            self.compiled(
                self.state if state is None else state, rows, segment_ids, positions, zeros, zeros
            )[1][0]
        )

    def gradients(self, rows, segment_ids, positions, weights, mtp_weights):
        """Gradients as a state, and both losses."""
        gradients, (_, both) = self.compiled(
            self.state, rows, segment_ids, positions, weights, mtp_weights
        )
        return gradients, both


def weighted_losses(graphdef, state, rows, segment_ids, positions, weights, mtp_weights):
    """Sum of both heads' weighted cross-entropies, by the training path; also logits and losses of
    each.
    """
    model = nnx.merge(graphdef, state)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    h = model.trunk(tokens, segment_ids, positions).h
    first = losses.chunked_cross_entropy(h, model.lm_head.weight[...], targets, weights, CHUNK)
    x, _, _ = model.mtp_hidden(h, targets, segment_ids, positions)
    batch = {"targets": targets, "segment_ids": segment_ids, "loss_weights": jnp.ones(tokens.shape)}
    second_targets, allowed = losses.mtp_targets(batch)
    second = losses.chunked_cross_entropy(
        x, model.mtp_head.weight[...], second_targets, mtp_weights * allowed, CHUNK
    )
    return first + second, ((model.logits(h), model.logits(x, model.mtp_head)), (first, second))


def random_rows(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, (2, LENGTH + 1), np.int32)


def whole_rows() -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions [2, L] of rows that are one document."""
    return np.ones((2, LENGTH), np.int32), np.broadcast_to(
        np.arange(LENGTH, dtype=np.int32), (2, LENGTH)
    )


def packed_rows() -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """Segment ids and positions [2, L] of rows with DOCUMENTS and padding, and where each document
    stands.
    """
    ends = np.cumsum(DOCUMENTS).tolist()
    spans = [slice(e - n, e) for e, n in zip(ends, DOCUMENTS, strict=True)]
    segment_ids, positions = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
    for i, span in enumerate(spans, start=1):
        segment_ids[:, span], positions[:, span] = i, np.arange(span.stop - span.start)
    return segment_ids, positions, spans


def assert_close(ours, theirs, what: str):
    """Within 1e-4 of the oracle's standard deviation."""
    error = np.max(np.abs(np.asarray(ours) - theirs)) / np.std(theirs)
    print(f"{what}: max |difference| / std {error:.1e}")
    assert error <= 1e-4, (what, error)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm; 0 where both are exactly 0."""
    difference, size = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
    return 0.0 if difference == 0 else float(difference / size)


@pytest.fixture(scope="module", autouse=True)
def short_attention_blocks():
    """Two query blocks in a row of 24, so that the blockwise path is what is compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "MIN_QUERY_BLOCK", 12)
        yield


@pytest.fixture(scope="module")
def make_case(tmp_path_factory):
    return functools.cache(lambda name: Case(tmp_path_factory.mktemp("export") / name, CASES[name]))


@pytest.fixture(params=CASES)
def case(request, make_case) -> Case:
    return make_case(request.param)


def test_logits_of_both_heads_equal_the_oracles(case):
    rows = random_rows()
    logits, mtp_logits = case.logits(rows, *whole_rows())
    assert_close(logits, case.oracle.logits(rows[:, :-1]), "logits")
    assert_close(mtp_logits, case.oracle.mtp_logits(rows), "MTP logits")


def test_gradient_of_every_parameter_equals_the_oracles(case):
    rows, ones = random_rows(), np.ones((2, LENGTH), np.float32)
    theirs_losses = case.oracle.losses(rows)
    for name, factor in (("cross-entropy", 0.0), ("cross-entropy + 0.3 MTP", 0.3)):
        weights, mtp_weights = ones / ones.size, factor * ones / (2 * (LENGTH - 1))
        gradients, (first, second) = case.gradients(rows, *whole_rows(), weights, mtp_weights)
        np.testing.assert_allclose(
            (first, second), (theirs_losses[0].item(), factor * theirs_losses[1].item()), rtol=1e-5
        )
        theirs = case.oracle.gradients(theirs_losses[0] + factor * theirs_losses[1])
        ours = dict(hf.hf_tensors(case.config, gradients, "float32"))
        biases = {n for n in ours if n.endswith("e_score_correction_bias")}
        assert ours.keys() - biases == theirs.keys()
        assert len(biases) == case.config.num_routers and all(not ours[n].any() for n in biases)
        errors = {n: relative(ours[n], theirs[n]) for n in theirs}
        worst = max(errors, key=errors.get)
        print(f"gradient of {name}: worst relative error {errors[worst]:.1e} at {worst}")
        assert errors[worst] <= 1e-3, (name, worst, errors[worst])
        # nobody may have chosen an expert
        unreached = {n for n in theirs if not theirs[n].any() and ".experts." not in n}
        assert unreached == (
            set()
            if factor
            else {n for n in theirs if n.startswith(case.oracle.prefix) and ".experts." not in n}
        )


def test_kernels_give_the_oracles_logits_and_gradients(tmp_path):
    case, rows = Case(tmp_path / "export", KERNELS), random_rows()
    weights = np.ones((2, LENGTH), np.float32)
    with interpret.on(uninitialized_memory="nan"):
        gradients, (logits, both) = case.compiled(
            case.state,
            rows,
            *whole_rows(),
            weights / weights.size,
            0.3 * weights / (2 * (LENGTH - 1)),
        )
    first, second = case.oracle.losses(rows)
    np.testing.assert_allclose(both, (first.item(), 0.3 * second.item()), rtol=1e-5)
    assert_close(logits[0], case.oracle.logits(rows[:, :-1]), "logits")
    assert_close(logits[1], case.oracle.mtp_logits(rows), "MTP logits")
    theirs = case.oracle.gradients(first + 0.3 * second)
    ours = dict(hf.hf_tensors(case.config, gradients, "float32"))
    errors = {n: relative(ours[n], theirs[n]) for n in theirs}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-3, (worst, errors[worst])
    assert any(theirs[n].any() for n in theirs if ".experts." in n)


def test_packed_documents_equal_documents_alone(case):
    rows = random_rows()
    segment_ids, positions, spans = packed_rows()
    logits, mtp_logits = case.logits(rows, segment_ids, positions)
    for span in spans:
        assert_close(logits[:, span], case.oracle.logits(rows[:, span]), f"logits of {span}")
        # the last position's next token is another document's
        seen = slice(span.start, span.stop - 1)
        if span.stop - span.start > 1:
            assert_close(
                mtp_logits[:, seen], case.oracle.mtp_logits(rows[:, span]), f"MTP logits of {span}"
            )


def test_positions_with_gaps_equal_the_oracles(case):
    rows = random_rows()
    positions = (
        np.cumsum(np.random.default_rng(2).integers(1, 9, (2, LENGTH)), axis=1, dtype=np.int32) + 40
    )
    logits, mtp_logits = case.logits(rows, whole_rows()[0], positions)
    assert_close(logits, case.oracle.logits(rows[:, :-1], positions), "logits")
    assert_close(
        mtp_logits, case.oracle.mtp_logits(rows, np.pad(positions, ((0, 0), (0, 1)))), "MTP logits"
    )


def test_model_without_segments_and_positions_takes_rows_as_documents(make_case):
    case = make_case("qk_norm")
    tokens, model = random_rows(), nnx.merge(case.graphdef, case.state)
    run = jax.jit(lambda t: (model(t), model.mtp_logits(t)), compiler_options=FAST_COMPILE)
    logits, mtp_logits = run(tokens)
    assert_close(logits, case.oracle.logits(tokens), "logits")
    assert_close(mtp_logits, case.oracle.mtp_logits(tokens), "MTP logits")


def test_correction_bias_is_large_enough_to_matter(case):
    flat = [
        (p, v.replace(v.get_value() * (p[-1] != "e_score_correction_bias")))
        for p, v in nnx.to_flat_state(case.state)
    ]
    with_bias = case.logits(random_rows(), *whole_rows())
    without = case.logits(random_rows(), *whole_rows(), state=nnx.from_flat_state(flat))
    for a, b in zip(with_bias, without, strict=True):
        assert np.mean(np.max(np.abs(a - b), axis=-1) > 0.01 * np.std(a)) > 0.5, (
            "the choice of most tokens must depend on it"
        )


@pytest.mark.parametrize("name", ["qk_norm", "reference"])
def test_no_position_depends_on_the_future_or_on_other_documents(make_case, name):
    """Gradient of each position's loss by the embedding: rows of distinct tokens tell positions
    apart. Exact zeros.
    """
    case = make_case(name)
    row = np.random.default_rng(3).permutation(64).astype(np.int32)[: LENGTH + 1]
    segment_ids, positions, spans = packed_rows()
    nothing = np.zeros((2, LENGTH), np.float32)
    for i in (0, 3, 7, 8, 9, 10, 12, 19, 20):
        (span,) = (s for s in spans if s.start <= i < s.stop)
        at = np.zeros((2, LENGTH), np.float32)
        at[0, i] = 1
        for head, weights, last in (("trunk", (at, nothing), i), ("MTP", (nothing, at), i + 1)):
            gradients, _ = case.gradients(np.stack([row, row]), segment_ids, positions, *weights)
            by_position = np.abs(
                np.asarray(gradients["embed_tokens"]["weight"].get_value())[row]
            ).sum(-1)
            # else losses.mtp_targets gives it no weight
            trained = head == "trunk" or i + 1 < span.stop
            expected = list(range(span.start, last + 1)) if trained else []
            assert np.flatnonzero(by_position).tolist() == expected, (head, i)
