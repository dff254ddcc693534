"""Where a run's first weights come from: initialized from the seed, or those of another run (the
stage before, an import).
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from data.tokenizer import Tokenizer
from glm_jax.config import ModelConfig, check_types, from_mapping
from glm_jax.run.checkpoints import finished_steps, newest_step, read_config, reading
from glm_jax.train.state import TrainSpec, TrainState, logical_axes

# What a later stage may change of the model: how it computes, and how far it reaches; not what it
# is.
CHANGEABLE = (
    "compute_dtype", "remat", "attention", "grouped_matmul", "expert_exchange", "expert_buffer",
    "scan_layers", "max_length", "rope_theta",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StartConfig:
    # of the run whose weights begin this one, with a new optimizer state; '': from the seed
    workdir: str
    step: int  # its checkpoint; -1: the newest

    def __post_init__(self):
        check_types(self)
        if self.step < -1:
            raise ValueError(
                f"start.step={self.step} must be a checkpoint's step, or -1 for the newest"
            )


def check_start(start: StartConfig, model: ModelConfig, tokenizer: Tokenizer | None = None):
    """Raises ValueError where there is no such checkpoint, or its model or tokenizer is another
    one.

    tokenizer: of the run's data; None where the run takes the start's own.
    """
    if not start.workdir:
        return
    theirs = from_mapping(
        ModelConfig, read_config(start.workdir)["model"], f"{start.workdir}: model"
    )
    for field in dataclasses.fields(ModelConfig):
        before, now = getattr(theirs, field.name), getattr(model, field.name)
        if before != now and field.name not in CHANGEABLE:
            raise ValueError(
                f"start.workdir={start.workdir!r} has model.{field.name}={before!r}, not {now!r}"
            )
    step = newest_step(start.workdir) if start.step < 0 else start.step
    if step not in (steps := finished_steps(start.workdir)):
        raise ValueError(
            f"start.step={start.step}: {start.workdir} holds no such finished checkpoint, but"
            f" {', '.join(map(str, steps))}"
        )
    if tokenizer is not None and starting_tokenizer(start).to_json() != tokenizer.to_json():
        raise ValueError(
            f"start.workdir={start.workdir!r} has another tokenizer than this run's data"
        )


def load_weights(
    workdir: str | pathlib.Path,
    step: int | None = None,
    shardings: dict | None = None,
    *,
    dtype: str | None = "float32",
) -> tuple[ModelConfig, dict, dict]:
    """(config, params, router) of a run's newest checkpoint or the given step; no optimizer state.

    shardings: trees of `params` and `router`; None: on the default device. dtype: None keeps the
    types of the checkpoint, which are those of the Hugging Face folder where it was imported from
    one.
    Raises ValueError where the directory holds no finished checkpoint.
    """
    config = from_mapping(ModelConfig, read_config(workdir)["model"], "model")
    step = newest_step(workdir) if step is None else step
    path = pathlib.Path(workdir).absolute() / "checkpoints" / str(step) / "state"
    if step not in (steps := finished_steps(workdir)):
        raise ValueError(
            f"{workdir} holds no finished checkpoint of step {step}; it has"
            f" {', '.join(map(str, steps)) or 'none'}"
        )
    params, router = logical_axes(config, stacked=False)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = shardings or jax.tree.map(
        lambda _: device, {"params": params, "router": router}, is_leaf=_is_axes
    )
    restored = None if dtype is None else jnp.dtype(dtype)
    marks = jax.tree.map(
        lambda sharding: ocp.ArrayRestoreArgs(sharding=sharding, dtype=restored), shardings
    )
    item = jax.tree.map(lambda _: 0, {"params": params, "router": router}, is_leaf=_is_axes)
    with ocp.PyTreeCheckpointer() as reader:
        args = ocp.args.PyTreeRestore(item=item, restore_args=marks, partial_restore=True)
        weights = reading(path.parent, lambda: reader.restore(path, args=args))
    return config, weights["params"], weights["router"]


def _is_axes(x) -> bool:
    return isinstance(x, tuple)


def starting_tokenizer(start: StartConfig) -> Tokenizer:
    """The other run's."""
    return Tokenizer.load(pathlib.Path(start.workdir) / "tokenizer.json")


def starting_state(start: StartConfig, spec: TrainSpec, mesh: Mesh, seed: int) -> TrainState:
    """The state before the first step, every array on its own devices."""
    if not start.workdir:
        return spec.create_state(mesh, seed)
    abstract = spec.abstract_state(mesh)
    placed = jax.tree.map(lambda x: x.sharding, abstract)
    step = None if start.step < 0 else start.step
    _, params, router = load_weights(
        start.workdir, step, shardings={"params": placed.params, "router": placed.router}
    )
    with jax.set_mesh(mesh):
        opt_state = jax.jit(spec.optimizer.init, out_shardings=placed.opt_state)(params)
        return TrainState(
            jax.device_put(jnp.zeros((), jnp.int32), placed.step), params, router, opt_state
        )
