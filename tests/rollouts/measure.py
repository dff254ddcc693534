"""Bytes and seconds of one rollout of 64K tokens with its experts in a checkpoint.

.venv/bin/python -m tests.rollouts.measure
"""

import json
import pathlib
import tempfile
import time

import numpy as np

from glm_jax.rollouts.rollout import Group, Rollout, RolloutStatus, pack_groups, unpack_groups
from glm_jax.rollouts.task import Reward, Task
from glm_jax.run.checkpoints import Checkpoints

LENGTH, LAYERS, PER_TOKEN, EXPERTS = 65536, 89, 8, 160  # GLM-4.5


def main():
    rng = np.random.default_rng(0)
    task = Task("t", "g", "math", ({"role": "user", "content": "?"},), "1")
    experts = rng.integers(0, EXPERTS, (LENGTH - 1, LAYERS, PER_TOKEN)).astype(np.int16)
    rollout = Rollout(
        task, rng.integers(0, 151552, LENGTH), np.ones(LENGTH), rng.normal(size=LENGTH),
        np.zeros(LENGTH), RolloutStatus.COMPLETED, Reward(1.0, {}), experts,
    )  # fmt: skip
    state = {"x": np.zeros(1)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, keep=1)
        started = time.perf_counter()
        entries, arrays = pack_groups([Group(task, [rollout])])
        checkpoints.save(1, state, {"buffer": entries}, arrays)
        returned = time.perf_counter() - started
        checkpoints.wait()
        written = time.perf_counter() - started
        files = (pathlib.Path(folder) / "checkpoints" / "1" / "arrays").rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())
        started = time.perf_counter()
        _, progress, arrays = checkpoints.restore(1, state)
        restored = unpack_groups(progress["buffer"], arrays)[0].rollouts[0]
        read = time.perf_counter() - started
        checkpoints.close()
    assert np.array_equal(restored.experts, experts)
    started = time.perf_counter()
    names = ("tokens", "mask", "logprobs", "versions", "experts")
    text = json.dumps({name: getattr(rollout, name).tolist() for name in names})
    print(f"arrays: {size / 1e6:.1f} MB, save returns after {returned:.2f} s")
    print(f"written after {written:.2f} s, restored in {read:.2f} s")
    print(f"as JSON: {len(text) / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
