"""A config of reinforcement learning for the toy, on one device of the eight."""

import jax
import pytest
import toy

from glm_jax.rl import loop
from glm_jax.sharding import make_mesh


@pytest.fixture
def rl_config(start, tmp_path, monkeypatch):
    """configs/rl_math_tiny.py for the toy, with a file of tasks; on the first mesh.data devices."""
    from configs import rl_math_tiny

    monkeypatch.setattr(
        loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[: config.data])
    )
    config = rl_math_tiny.get_config()
    config.update_from_flattened_dict(toy.RL)
    config.start.workdir = str(start)
    train = toy.write_tasks(tmp_path / "train.jsonl", 0, 12)
    held_out = toy.write_tasks(tmp_path / "held.jsonl", 50, 3)
    config.tasks.update(train=(train,), held_out=(held_out,))
    return config
