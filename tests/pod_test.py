"""The planner with the real TPU compiler, on a toy model."""

import dataclasses

import pytest

from glm_jax import pod
from glm_jax.infer.engine import EngineConfig
from glm_jax.sharding import MeshConfig
from tests.model.oracle import tiny_config

ENGINE = EngineConfig(
    context=64, num_rows=8, page_size=16, num_pages=32, prefill_chunk=16, min_rows=1, min_chunk=1,
    decode_steps=4, draft_tokens=1, weights="fp8",
    cache_dtype="float8_e4m3fn", keep_experts=False,
)  # fmt: skip
MESH = MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=1)
TOPOLOGY = "v5e:2x2"


def test_a_toy_decode_step_fits_and_its_bytes_are_counted():
    model = dataclasses.replace(tiny_config(), compute_dtype="bfloat16", grouped_matmul="ragged_dot")
    plan, more = pod.plan_decode(model, ENGINE, MESH, TOPOLOGY)
    assert plan.fits and plan.num_devices == 4 and not plan.message
    layers, pages = model.num_layers + 1, ENGINE.num_pages // 4
    assert plan.cache_bytes == layers * pages * ENGINE.page_size * 2 * model.num_kv_heads * model.head_size  # a byte each
    assert more["cache_bytes_per_token"] == plan.cache_bytes / (pages * ENGINE.page_size)
    assert plan.weight_bytes + plan.cache_bytes < plan.hbm_bytes_per_chip < plan.hbm_capacity_bytes
    free = plan.hbm_capacity_bytes - plan.hbm_bytes_per_chip + plan.cache_bytes
    assert more["cached_tokens_that_fit"] == int(4 * free / more["cache_bytes_per_token"])


def test_what_does_not_fit_says_so():
    model = dataclasses.replace(tiny_config(), compute_dtype="bfloat16", grouped_matmul="ragged_dot")
    plan, more = pod.plan_decode(model, dataclasses.replace(ENGINE, num_pages=40_000_000), MESH, TOPOLOGY)
    assert not plan.fits and "exceeds available HBM" in plan.message
    assert more["cached_tokens_that_fit"] == 0


def test_rows_that_cannot_be_split_are_named():
    with pytest.raises(ValueError, match=r"engine.num_rows=6 cannot be split over 4 shards"):
        pod.plan_decode(tiny_config(), dataclasses.replace(ENGINE, num_rows=6), MESH, TOPOLOGY)
