"""The engine through the TPU kernels, simulated, against the engine through XLA; and its decode
step through the real TPU compiler.
"""

import dataclasses

import pytest
from flax import nnx

from glm_jax import hf
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.infer.sampling import SamplingParams
from glm_jax.model.transformer import GLM
from glm_jax.plan.plan import plan_engine
from glm_jax.sharding import MeshConfig
from pallas_kernels import interpret
from tests.infer.engine_test import SIZES, assert_all_returned, prompts
from tests.model.oracle import random_state, tiny_config, to_jax

CONFIG = tiny_config(head_size=64, num_layers=2, num_dense_layers=1, max_length=512)
LONG = SIZES | {
    "context": 200,
    "num_rows": 4,
    "page_size": 128,
    "num_pages": 16,
    "prefill_chunk": 64,
    "min_rows": 4,
    "min_chunk": 64,
}
GREEDY = SamplingParams(max_new_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def state():
    return to_jax(random_state(CONFIG))


def answers(state, attention: str, **changes):
    model: GLM = nnx.merge(
        nnx.graphdef(hf.abstract_model(dataclasses.replace(CONFIG, attention=attention))), state
    )
    engine = Engine(model, EngineConfig(**LONG | changes))
    # the first crosses a page's end
    asked = [[*prompts(1, seed=1, longest=64)[0], *range(60), *range(60)], *prompts(2, seed=2)]
    assert len(asked[0]) > 124
    out = engine.generate(asked, GREEDY)
    assert_all_returned(engine)
    return out


@pytest.mark.parametrize("changes", [{}, {"draft_tokens": 1}, {"cache_dtype": "float8_e4m3fn"}])
def test_greedy_output_is_that_of_xla(state, changes):
    plain = answers(state, "xla", **changes)
    with interpret.on(uninitialized_memory="nan"):
        ours = answers(state, "pallas", **changes)
    assert [r.tokens for r in ours] == [r.tokens for r in plain]
    if changes.get("draft_tokens"):
        assert [r.accepted for r in ours] == [r.accepted for r in plain]


def test_the_step_of_a_pod_with_drafts_compiles():
    model = dataclasses.replace(
        CONFIG, compute_dtype="bfloat16", attention="pallas", grouped_matmul="ragged_dot"
    )
    engine = EngineConfig(
        **LONG
        | {
            "num_rows": 8,
            "num_pages": 32,
            "weights": "fp8",
            "cache_dtype": "float8_e4m3fn",
            "draft_tokens": 1,
        }
    )
    plan, *_ = plan_engine(
        model,
        engine,
        MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=1),
        "v5p:2x2x1",
        "verify",
    )
    assert plan.fits and plan.num_devices == 4


def test_pages_that_the_kernel_does_not_take_are_named(state):
    with (
        interpret.on(),
        pytest.raises(ValueError, match="page size 64: takes multiples of 128; 'xla' takes it"),
    ):
        answers(state, "pallas", page_size=64)


def test_an_implementation_for_rows_only_is_named(state):
    with pytest.raises(
        ValueError,
        match=(
            "attention='cudnn' is for rows and takes no pages: auto, reference, xla, pallas take"
            " them"
        ),
    ):
        answers(state, "cudnn")
