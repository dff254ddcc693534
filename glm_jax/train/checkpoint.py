"""Checkpoints of a run: state, data position and config, asynchronous and atomic (Orbax).

A step's folder appears under its final name only when everything in it is written, so a kill at any moment leaves the
previous checkpoint as the newest.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from data.pipeline import merge_states
from glm_jax.config import ModelConfig, from_mapping
from glm_jax.train.state import TrainState, logical_axes


class Checkpoints:
    """checkpoints/<step>/ of a work directory; `step` is the number of steps that the state has behind it."""

    def __init__(self, workdir: str | pathlib.Path, *, keep: int, merge: Callable[[list[dict]], dict] = merge_states):
        """merge: makes one position in the data of all processes' own."""
        self.merge = merge
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "data"))

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: dict):
        """Starts writing and returns; the arrays may be donated at once. `data_state` is this process's own part."""
        merged = self.merge(_all_processes(data_state))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(merged))
        self.manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict]:
        """State with the shardings of abstract_state, and the data position of all processes."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        try:
            restored = self.manager.restore(step, args=args)
        except Exception as error:  # Orbax raises bare Exception for an array that it cannot read
            reason = (str(error).splitlines() or [""])[0][:200]
            raise ValueError(f"checkpoint {self.folder / str(step)} does not fit this config or is damaged: {reason}") from error
        return restored.state, restored.data

    def wait(self):
        """Until what was saved is on disk; raises what went wrong there."""
        self.manager.wait_until_finished()

    def close(self):
        self.manager.close()


def _all_processes(state: dict) -> list[dict]:
    """Every process's state, on every process."""
    if jax.process_count() == 1:
        return [state]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def read_config(workdir: str | pathlib.Path) -> dict:
    """config.json of a work directory. Raises ValueError where there is none."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{workdir} is no work directory of a run: it has no config.json")
    return json.loads(path.read_text())


def finished_steps(workdir: str | pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints."""
    return [int(p.name) for p in (pathlib.Path(workdir) / "checkpoints").glob("*") if p.name.isdigit()]


def newest_step(workdir: str | pathlib.Path) -> int:
    """Newest finished checkpoint. Raises ValueError where there is none."""
    steps = finished_steps(workdir)
    if not steps:
        raise ValueError(f"{workdir} holds no finished checkpoint")
    return max(steps)


def load_weights(
    workdir: str | pathlib.Path, step: int | None = None, shardings: dict | None = None, *, dtype: str | None = "float32"
) -> tuple[ModelConfig, dict, dict]:
    """(config, params, router) of a run's newest checkpoint or the given step; no optimizer state.

    shardings: trees of `params` and `router`; None: on the default device. dtype: None keeps the types of the checkpoint, which
    are those of the Hugging Face folder where it was imported from one.
    Raises ValueError where the directory holds no finished checkpoint.
    """
    config = from_mapping(ModelConfig, read_config(workdir)["model"], "model")
    step = newest_step(workdir) if step is None else step
    path = pathlib.Path(workdir).absolute() / "checkpoints" / str(step) / "state"
    if not path.is_dir():
        raise ValueError(f"{workdir} holds no checkpoint of step {step}")
    params, router = logical_axes(config, stacked=False)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = shardings or jax.tree.map(lambda _: device, {"params": params, "router": router}, is_leaf=_is_axes)
    marks = jax.tree.map(lambda sharding: ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype), shardings)
    item = jax.tree.map(lambda _: 0, {"params": params, "router": router}, is_leaf=_is_axes)
    with ocp.PyTreeCheckpointer() as reader:
        weights = reader.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=marks, partial_restore=True))
    return config, weights["params"], weights["router"]


def _is_axes(x) -> bool:
    return isinstance(x, tuple)
