"""Asks the real TPU compiler whether a program fits a pod, what it takes there, and where its time
goes. Needs libtpu, no TPU.

    python -m experiments.plan --config=configs/glm45.py --topology=v5p:4x4x4 --weights=fp8 \\
        --config.mesh.data=2 --config.mesh.fsdp=1 --config.mesh.expert=32
    python -m experiments.plan --config=configs/glm45.py --topology=v5p:8x8x8 --mode=train \
        --num_rows=4096 --config.mesh.expert=8

Modes: `train`, a step of one microbatch of --num_rows rows of data.sequence_length tokens;
`decode`, a token of every row over a cache of --num_rows rows of --context tokens; `prefill`, the
last --prefill_chunk tokens of every row. Bytes and cycles are the compiler's, of one chip; the rest
is estimated from them (glm_jax/plan/plan.py says what is left out); nothing here is measured on
hardware.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from experiments import entry
from glm_jax.infer.config import EngineConfig
from glm_jax.plan.page import page
from glm_jax.plan.plan import plan_engine, plan_train, worst
from pallas_kernels.compiler import tpu_devices

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The model and mesh to plan: a file of configs/."
)
MODE = flags.DEFINE_enum("mode", "decode", ["train", "decode", "prefill"], "The program to plan.")
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
    "draft_tokens", 0, "The number of tokens that the MTP block drafts.", lower_bound=0
)
WEIGHTS = flags.DEFINE_string(
    "weights", "compute", "The format of the weights: compute precision, fp8 or int8."
)
CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype",
    "compute",
    "The type of cached keys and values: compute precision, bfloat16 or float8_e4m3fn.",
)
JSON = flags.DEFINE_string("json", None, "Writes the same figures to this file.")
HTML = flags.DEFINE_string(
    "html", None, "Writes a page that shows where the time goes to this file."
)


def main():
    # the program is for the pod, never for what this machine has
    jax.config.update("jax_platforms", "cpu")
    run = entry.run_config(CONFIG.value)
    model = run.model
    topology = entry.given(TOPOLOGY)
    rows = NUM_ROWS.value or len(tpu_devices(topology))
    more = {}
    if MODE.value == "train":
        balance, length = run.schedule.balance_weight, run.data.sequence_length
        plan, program = plan_train(model, run.optimizer, balance, run.mesh, topology, rows, length)
    else:
        engine = EngineConfig(
            context=CONTEXT.value, num_rows=rows, page_size=PAGE_SIZE.value,
            prefill_chunk=PREFILL_CHUNK.value, min_rows=1, min_chunk=1,
            decode_steps=DECODE_STEPS.value,
            num_pages=rows * -(-(CONTEXT.value + DRAFT_TOKENS.value) // PAGE_SIZE.value),
            draft_tokens=DRAFT_TOKENS.value,
            weights=WEIGHTS.value, cache_dtype=CACHE_DTYPE.value, keep_experts=False,
        )  # fmt: skip
        plan, program, more = plan_engine(model, engine, run.mesh, topology, MODE.value)
    result = dataclasses.asdict(plan) | more
    gib = {
        key: f"{value / 2**30:,.2f} GiB"
        for key, value in result.items()
        if "bytes" in key and "token" not in key
    }
    for key, value in (result | gib).items():
        if key != "parts":
            print(f"{key:24} {value}")
    operations = [] if program is None else worst(program, outer_loops=int(MODE.value != "train"))
    if program is not None:
        print("\nwhere the time goes: seconds, share")
        for name, seconds in plan.parts.items():
            print(f"{seconds:12.6f} {seconds / plan.estimated_step_seconds:7.1%}  {name}")
        print("\nmost of XLA's cycles: times, cycles of one, kind, shape, line")
        for operation, times in operations:
            shape = operation.shape.partition("{")[0]
            where = operation.source or operation.op_name[-60:]
            print(f"{times:6} x {operation.cycles:12,}  {operation.kind:10} {shape:32} {where}")
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(result, file, indent=1)
    if HTML.value:
        pathlib.Path(HTML.value).write_text(page(plan, operations))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    entry.run(main)
