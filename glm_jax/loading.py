"""A trained model for a notebook, from either kind of folder."""

from __future__ import annotations

import collections
import json
import pathlib


def load(path: str | pathlib.Path):
    """(model, tokenizer) of a run's work directory (its newest checkpoint) or of a Hugging Face
    folder.

    The model has float32 parameters on the default device. From a Hugging Face folder it computes
    in float32 on a CPU and in bfloat16 elsewhere, and the tokenizer is None where the folder has no
    tokenizer.json. Raises ValueError naming the path where it is neither, or where what it holds is
    missing or damaged.
    """
    # Imported here, so that a part of the package can be imported without the whole.
    from data.tokenizer import Tokenizer
    from glm_jax.devices import choose_platforms

    choose_platforms()
    folder = pathlib.Path(path)
    keys = _config_keys(folder)
    if "model" in keys:
        from glm_jax.train.start import load_weights
        from glm_jax.train.state import build_model

        return build_model(*load_weights(folder)), Tokenizer.load(folder / "tokenizer.json")
    if "model_type" in keys:
        tokenizer = folder / "tokenizer.json"
        return _import_model(folder), Tokenizer.load(tokenizer) if tokenizer.is_file() else None
    raise ValueError(
        f"{str(folder)!r}: its config.json is neither a run's (no 'model') nor a Hugging Face"
        " model's (no 'model_type')"
    )


def _config_keys(folder: pathlib.Path) -> set[str]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} is neither a run's work directory nor a Hugging Face folder: it has"
            " no config.json"
        )
    try:
        return set(json.loads(file.read_text("utf-8-sig")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error


def _import_model(folder: pathlib.Path):
    import jax
    from flax import nnx

    from glm_jax import hf

    device = jax.local_devices()[0]
    runtime = {
        "compute_dtype": "float32" if device.platform == "cpu" else "bfloat16",
        "scan_layers": True,
        "remat": "none",
        "attention": "xla",  # takes any length
        "grouped_matmul": "auto",
        "expert_exchange": "all_to_all",
        "expert_buffer": 1.25,
    }
    on_device = jax.sharding.SingleDeviceSharding(device)
    config, state = hf.import_checkpoint(
        folder, runtime, shardings=collections.defaultdict(lambda: on_device)
    )
    return nnx.merge(nnx.graphdef(hf.abstract_model(config)), state)
