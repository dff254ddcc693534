"""Hugging Face folder <-> work directory.

    python -m experiments.convert --from_hf=DIR --workdir=W
    python -m experiments.convert --workdir=W --to_hf=DIR

The first writes weights and tokenizer.json of DIR as checkpoint 0 of a new W, the second W's newest
checkpoint as a folder for transformers.

The target must not exist, or be empty; it appears when it is complete. What a Hugging Face folder
does not know, how the model is run, is given by flags.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil

from absl import flags
from flax import nnx

from experiments import entry
from glm_jax import hf
from glm_jax.config import DTYPES, EXPERT_EXCHANGES, REMAT_POLICIES
from glm_jax.model.moe import RouterBias
from glm_jax.run.checkpoints import Checkpoints
from glm_jax.train.start import load_weights
from glm_jax.train.state import build_model
from pallas_kernels.attention import api as attention
from pallas_kernels.moe_dispatch import api as moe_dispatch

FROM_HF = flags.DEFINE_string("from_hf", None, "The Hugging Face folder to read.")
TO_HF = flags.DEFINE_string("to_hf", None, "The Hugging Face folder to write.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The work directory, which is read with --to_hf and written with --from_hf."
)
STEP = flags.DEFINE_integer(
    "step", None, "With --to_hf, the step of the checkpoint to export; by default the newest."
)
DTYPE = flags.DEFINE_enum(
    "dtype", "stored", hf.CHECKPOINT_TYPES,
    "With --to_hf, the type of the weights. 'stored' keeps the checkpoint's types, the others "
    "convert. Router correction biases stay float32.",
)  # fmt: skip
SHARD_GB = flags.DEFINE_float(
    "shard_gb", 5.0, "With --to_hf, the maximum size of a file, in 10^9 bytes.", lower_bound=1e-6
)
# with --from_hf: the model config's fields that no folder knows, see hf_config.RUNTIME_FIELDS
RUNTIME = {
    "compute_dtype": flags.DEFINE_enum(
        "compute_dtype", "bfloat16", DTYPES, "With --from_hf, the type of matmul inputs."
    ),
    "remat": flags.DEFINE_enum(
        "remat", "full", REMAT_POLICIES, "With --from_hf, what the backward pass recomputes."
    ),
    "attention": flags.DEFINE_enum(
        "attention",
        "auto",
        attention.IMPLEMENTATIONS,
        "With --from_hf, the implementation of attention.",
    ),
    "grouped_matmul": flags.DEFINE_enum(
        "grouped_matmul",
        "auto",
        moe_dispatch.IMPLEMENTATIONS,
        "With --from_hf, the implementation of the expert matmuls.",
    ),
    "expert_exchange": flags.DEFINE_enum(
        "expert_exchange",
        "all_to_all",
        EXPERT_EXCHANGES,
        "With --from_hf, the collective that exchanges tokens between experts; see glm_jax.config.",
    ),
    "expert_buffer": flags.DEFINE_float(
        "expert_buffer",
        1.25,
        "With --from_hf, the size of the exchange buffers; see glm_jax.config.",
    ),
    "scan_layers": flags.DEFINE_bool(
        "scan_layers",
        True,
        "With --from_hf, compiles one layer and loops over it; otherwise all layers are written "
        "out.",
    ),
}


def from_hf(source: pathlib.Path, workdir: pathlib.Path, runtime: dict):
    """A new work directory with the folder's weights as checkpoint 0 (in their own types, no
    optimizer state), config and tokenizer.

    Raises ValueError where the folder does not fit or workdir is in use; nothing is written then.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ValueError(f"{str(workdir)!r} exists and is not an empty folder: nothing was written")
    config, state = hf.import_checkpoint(source, runtime, dtype="stored")
    params, router = (
        nnx.to_pure_dict(part) for part in nnx.split_state(state, nnx.Param, RouterBias)
    )
    partial = workdir.parent / f".{workdir.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        (partial / "config.json").write_text(
            json.dumps({"model": dataclasses.asdict(config)}, indent=2) + "\n"
        )
        # without the byte order mark that some editors begin a file with
        if (source / "tokenizer.json").is_file():
            (partial / "tokenizer.json").write_text(
                (source / "tokenizer.json").read_text("utf-8-sig"), "utf-8", newline=""
            )
        checkpoints = Checkpoints(partial, keep=1)
        checkpoints.save_weights(0, params, router)
        checkpoints.wait()
        checkpoints.close()
        partial.replace(workdir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_hf(
    workdir: pathlib.Path,
    target: pathlib.Path,
    *,
    step: int | None,
    dtype: str,
    max_shard_bytes: int,
) -> str:
    """Writes a checkpoint's weights, config and tokenizer as a Hugging Face folder; errors as in
    hf.export_checkpoint.

    Returns the type of most weights written.
    """
    config, params, router = load_weights(workdir, step, dtype=None)
    tokenizer = workdir / "tokenizer.json"
    state = nnx.state(build_model(config, params, router))
    hf.export_checkpoint(
        target,
        config,
        state,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )
    return hf.main_type(state, hf.export_types(state, dtype))


def main():
    if (FROM_HF.value is None) == (TO_HF.value is None):
        raise ValueError("give one of --from_hf=DIR and --to_hf=DIR, with --workdir=W")
    workdir = pathlib.Path(entry.given(WORKDIR))
    if FROM_HF.value is not None:
        from_hf(
            pathlib.Path(FROM_HF.value),
            workdir,
            {name: flag.value for name, flag in RUNTIME.items()},
        )
        print(f"{workdir}: checkpoint 0 with the weights of {FROM_HF.value}")
    else:
        target, shard_bytes = pathlib.Path(entry.given(TO_HF)), int(SHARD_GB.value * 1e9)
        written = to_hf(
            workdir, target, step=STEP.value, dtype=DTYPE.value, max_shard_bytes=shard_bytes
        )
        print(
            f"{target}: {written} weights of"
            f" {workdir}{'' if DTYPE.value == 'stored' else ', as asked with --dtype'}"
        )


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    entry.run(main)
