"""The numbers that a run is judged by: useful FLOPs, beside the arrays of the model and a count of
every pair of positions, and the loads of experts, beside loops.
"""

import dataclasses
import math
import types

import jax
import pytest

from configs import tiny
from experiments.entry import run_config
from glm_jax.train import metrics
from glm_jax.train.state import initial_weights

MODEL = run_config(tiny.get_config()).model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "num_mtp_layers": 0, "num_layers": 5, "num_dense_layers": 2, "num_shared_experts": 2,
            "num_experts_per_token": 3, "head_size": 16,
        },
    ],
)  # fmt: skip
def test_useful_flops_are_those_of_the_arrays_that_multiply_a_token(changes):
    config = dataclasses.replace(MODEL, **changes)
    params, _ = jax.eval_shape(lambda key: initial_weights(config, key), jax.random.key(0))
    expected = 0
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if "norm" in name or "bias" in name or "embed" in name:
            continue  # they multiply no matrix
        share = config.num_experts_per_token / config.num_experts if ".experts." in name else 1
        heads = 1 + config.num_mtp_layers if name == "lm_head.weight" else 1
        expected += x.size * share * heads
    assert metrics.matmul_parameters(config) == expected

    length = 5
    pairs = sum(key <= query for query in range(length) for key in range(length))
    forward = 2 * 2 * config.num_heads * config.head_size * pairs / length  # scores, and values
    layers = config.num_layers + config.num_mtp_layers
    found = metrics.flops_per_token(config, length)
    assert found == pytest.approx(6 * expected + 3 * forward * layers, rel=1e-12)


def test_loads_are_compared_with_the_mean_and_their_entropy_with_the_most():
    counts = [[4, 0, 0, 0], [1, 1, 1, 1], [5, 2, 1, 0], [0, 0, 0, 0]]
    violations, entropies = metrics.load_statistics(counts)
    for row, violation, entropy in list(zip(counts, violations, entropies, strict=True))[:3]:
        assert violation == pytest.approx(max(row) / (sum(row) / 4) - 1)
        shares = [count / sum(row) for count in row if count]
        assert entropy == pytest.approx(-sum(s * math.log(s, 4) for s in shares))
    assert (violations[3], entropies[3]) == (-1, 0)  # a router that saw no token


def test_the_peak_is_that_of_the_chip_by_either_of_its_names():
    peak = lambda kind: metrics.peak_flops(types.SimpleNamespace(platform="x", device_kind=kind))
    assert peak("TPU v5") == peak("TPU v5p") == 459e12
    assert peak("TPU v5 lite") == peak("TPU v5e") and peak("TPU v6 lite") == peak("TPU v6e")
    assert peak("abacus") is None
    assert metrics.peak_flops(jax.local_devices()[0]) * jax.local_device_count() > 1e8  # measured
