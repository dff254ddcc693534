"""Asks the real TPU compiler whether a program fits a pod, what it takes there, and where its time
goes. Needs libtpu, no TPU.

    python -m experiments.plan --config=configs/glm45.py --topology=v5p:4x4x4 --weights=fp8 \\
        --config.mesh.data=2 --config.mesh.fsdp=1 --config.mesh.expert=32
    python -m experiments.plan --config=configs/glm45.py --topology=v5p:8x8x8 --mode=train \
        --num_rows=4096 --config.mesh.expert=8
    python -m experiments.plan --config=configs/glm45.py --topology=v5p:4x4x4 --mode=swap \
        --weights=fp8 --config.mesh.expert=8 --engine_mesh=data=2,expert=32

Modes: `train`, a step of one microbatch of --num_rows rows of data.sequence_length tokens;
`decode`, a token of every row over a cache of --num_rows rows of --context tokens; `verify`, the
same with drafts: one pass over the last token and --draft_tokens drafts of every row, which yields
one token more than it accepts drafts, and drafts the next; `prefill`, the last --prefill_chunk
tokens of every row; `swap`, new weights for the engine on --engine_mesh from the trainer on
config.mesh. Bytes and cycles are the compiler's, of one chip; the rest is estimated from them
(glm_jax/plan/estimate.py says what is left out); nothing here is measured on hardware.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from experiments import entry
from glm_jax.config import check_choice
from glm_jax.infer.config import EngineConfig
from glm_jax.plan.page import page
from glm_jax.plan.plan import Plan, plan_engine, plan_swap, plan_train, worst
from glm_jax.plan.program import Operation
from glm_jax.plan.programs import ENGINE_MODES
from glm_jax.sharding import MESH_AXES, MeshConfig
from pallas_kernels.compiler import tpu_devices

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The model and mesh to plan: a file of configs/."
)
MODE = flags.DEFINE_enum(
    "mode",
    "decode",
    ["train", *ENGINE_MODES, "swap"],
    "The program to plan: a training step, a call of the engine, or the swap of its weights. decode"
    " samples without drafts; with --draft_tokens the engine runs verify in its place.",
)
TOPOLOGY = flags.DEFINE_string("topology", None, "The kind and shape of the pod, as in v5p:4x4x4.")
NUM_ROWS = flags.DEFINE_integer(
    "num_rows", 0, "The number of rows of the batch; 0 means one on each chip.", lower_bound=0
)
CONTEXT = flags.DEFINE_integer(
    "context", 8192, "The maximum number of tokens of a request.", lower_bound=2
)
PAGE_SIZE = flags.DEFINE_integer(
    "page_size", 128, "The number of tokens in a page of the cache.", lower_bound=1
)
PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk", 512, "The number of tokens of a row in one prefill call.", lower_bound=1
)
DECODE_STEPS = flags.DEFINE_integer(
    "decode_steps", 16, "The number of tokens sampled in one call.", lower_bound=1
)
DRAFT_TOKENS = flags.DEFINE_integer(
    "draft_tokens",
    0,
    "The number of tokens that the MTP block drafts, for --mode=verify and --mode=prefill.",
    lower_bound=0,
)
WEIGHTS = flags.DEFINE_string(
    "weights", "compute", "The format of the weights: compute precision, fp8 or int8."
)
CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype",
    "compute",
    "The type of cached keys and values: compute precision, bfloat16 or float8_e4m3fn.",
)
ENGINE_MESH = flags.DEFINE_string(
    "engine_mesh",
    None,
    "The engine's mesh for --mode=swap, as in data=2,expert=32, other axes being 1. By default it"
    " is the trainer's, config.mesh.",
)
JSON = flags.DEFINE_string("json", None, "Writes the same figures to this file.")
HTML = flags.DEFINE_string(
    "html", None, "Writes a page that shows where the time goes to this file."
)


def check_files(*paths: str | None):
    """Makes the folders of the files to write. Raises OSError or ValueError where that cannot be:
    a compilation takes minutes.
    """
    for path in map(pathlib.Path, filter(None, paths)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder; --json and --html name files")


def engine_mesh(trainer: MeshConfig) -> MeshConfig:
    """Of --engine_mesh. Raises ValueError for an axis or a size that is none."""
    if ENGINE_MESH.value is None:
        return trainer
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    for part in ENGINE_MESH.value.split(","):
        axis, _, size = part.partition("=")
        check_choice("--engine_mesh axis", axis, MESH_AXES)
        if not size.isdecimal():
            raise ValueError(f"--engine_mesh={ENGINE_MESH.value!r}: {part!r} is not AXIS=SIZE")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def planned() -> tuple[Plan, list[tuple[Operation, int]], dict]:
    """Compiles what the flags say: the plan, its worst operations, and figures of the mode's
    own.
    """
    run, mode, more = entry.run_config(CONFIG.value), MODE.value, {}
    topology = entry.given(TOPOLOGY)
    rows = NUM_ROWS.value or len(tpu_devices(topology))
    if mode == "train":
        balance, length = run.schedule.balance_weight, run.data.sequence_length
        plan, program = plan_train(
            run.model, run.optimizer, balance, run.mesh, topology, rows, length
        )
    else:
        engine = EngineConfig(
            context=CONTEXT.value, num_rows=rows, page_size=PAGE_SIZE.value,
            prefill_chunk=PREFILL_CHUNK.value, min_rows=1, min_chunk=1,
            decode_steps=DECODE_STEPS.value,
            num_pages=rows * -(-(CONTEXT.value + DRAFT_TOKENS.value) // PAGE_SIZE.value),
            draft_tokens=DRAFT_TOKENS.value,
            weights=WEIGHTS.value, cache_dtype=CACHE_DTYPE.value, keep_experts=False,
        )  # fmt: skip
        if mode == "swap":
            meshes = run.mesh, engine_mesh(run.mesh)
            plan, program, more = plan_swap(run.model, run.optimizer, engine, *meshes, topology)
        else:
            plan, program, more = plan_engine(run.model, engine, run.mesh, topology, mode)
    tokens_loop = int(mode in ENGINE_MODES)
    return plan, [] if program is None else worst(program, outer_loops=tokens_loop), more


def show(plan: Plan, operations: list[tuple[Operation, int]], figures: dict):
    for key, value in figures.items():
        size = f"{value / 2**30:,.2f} GiB" if "bytes" in key and "token" not in key else value
        if key not in ("parts", "collectives"):
            print(f"{key:24} {size}")
    if not operations:
        return
    print("\nwhere the time goes: seconds, share")
    for name, seconds in plan.parts.items():
        print(f"{seconds:12.6f} {seconds / plan.estimated_step_seconds:7.1%}  {name}")
    print("\ncollectives: times, GiB that a chip receives, seconds, of which exposed, kind, axes")
    for row in plan.collectives:
        numbers = (
            f"{row['bytes'] / 2**30:9.3f} {row['seconds']:10.6f} {row['exposed_seconds']:10.6f}"
        )
        print(f"{row['count']:6} x {numbers}  {row['kind']:18} {row['axes']}")
    print("\nmost of XLA's cycles: times, cycles of one, kind, shape, line")
    for operation, times in operations:
        shape = operation.shape.partition("{")[0]
        where = operation.source or operation.op_name[-60:]
        print(f"{times:6} x {operation.cycles:12,}  {operation.kind:10} {shape:32} {where}")


def main():
    # the program is for the pod, never for what this machine has
    jax.config.update("jax_platforms", "cpu")
    check_files(JSON.value, HTML.value)
    plan, operations, more = planned()
    figures = dataclasses.asdict(plan) | more
    show(plan, operations, figures)
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=1))
    if HTML.value:
        pathlib.Path(HTML.value).write_text(page(plan, operations))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    entry.run(main)
