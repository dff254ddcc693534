"""Parameter counts of the released models, from the abstract model, without allocating them
(docs/glm45.md, "Architecture").
"""

from __future__ import annotations

import math

import pytest

from configs import glm45, glm45_air
from glm_jax import hf
from glm_jax.config import ModelConfig, from_mapping

GLM45, AIR = (
    from_mapping(ModelConfig, c.get_config().model.to_dict(), "model") for c in (glm45, glm45_air)
)


def billions(count: int) -> float:
    return round(count / 1e9, 3)


def test_counts_of_the_355b_model():
    counts = {name: billions(n) for name, n in hf.parameter_count(GLM45).items()}
    assert (counts["layers"], counts["layers_with_mtp"], counts["stored"]) == (
        351.246,
        355.234,
        358.338,
    )
    assert round(counts["active"], 2) == 32.08
    assert counts["total"] == pytest.approx(355.234 + 2 * 151552 * 5120 / 1e9, abs=0.001)


def test_counts_of_air():
    counts = {name: billions(n) for name, n in hf.parameter_count(AIR).items()}
    assert (counts["layers"], counts["layers_with_mtp"]) == (105.611, 107.986)
    assert round(counts["active"], 2) == 12.18


@pytest.mark.parametrize("config", [GLM45, AIR], ids=["glm45", "air"])
def test_every_tensor_on_disk_is_named_once_and_covers_its_array(config):
    table = hf.name_table(config)
    assert len({t.name for t in table}) == len(table)
    assert len({(t.path, t.index) for t in table if not t.copy}) == sum(not t.copy for t in table)
    arrays = {
        path: math.prod(v.get_value().shape) for path, v in hf.abstract_parameters(config).items()
    }
    on_disk = dict.fromkeys(arrays, 0)
    for t in table:
        on_disk[t.path] += 0 if t.copy else math.prod(t.shape)
    assert on_disk == arrays
