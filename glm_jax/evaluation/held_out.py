"""Held-out text: loss, perplexity and bits per byte, of the MTP block as well."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from data.held_out import HeldOutBatches
from data.pipeline import DataConfig
from data.tokenizer import Tokenizer
from glm_jax.config import from_mapping
from glm_jax.evaluation.subject import Settings, Subject, result
from glm_jax.losses import LOSS_CHUNK, chunked_cross_entropy, mtp_targets
from glm_jax.model.moe import RouterBias
from glm_jax.run.checkpoints import read_config
from glm_jax.sharding import MeshConfig, make_mesh
from glm_jax.train.evaluation import Evaluator
from glm_jax.train.state import TrainState, build_model

DEFAULT_ROW = 512  # tokens of held-out text, for a model that does not say how it was trained


def held_out_batches(
    path: pathlib.Path, paths: Sequence[str], tokenizer: Tokenizer, settings: Settings
) -> HeldOutBatches:
    """The held-out text of the run's data, or of `paths`, in rows as the run was trained on, or
    else of the context's length.
    """
    recorded = read_config(path)
    if "data" in recorded:
        config = from_mapping(DataConfig, recorded["data"], "data")
    elif paths:
        length = settings.context or DEFAULT_ROW
        config = DataConfig(
            paths=tuple(paths), weights=(1.0,) * len(paths),
            batch_size=max(1, settings.batch_tokens // length), sequence_length=length,
            packing="concat_then_split", num_packing_bins=1, virtual_shards=1, seed=0, fim_rate=0.0,
            fim_psm_fraction=0.0,
            fim_level="character", epochs=0, verify_checksums=True,
        )  # fmt: skip
    else:
        raise ValueError(
            f"held_out: {path} does not say what data it was trained on; give --data=DIR"
        )
    if paths:
        config = dataclasses.replace(config, paths=tuple(paths), weights=(1.0,) * len(paths))
    batches = HeldOutBatches(config, 0, 1, settings.limit)
    if batches.tokenizer.to_json() != tokenizer.to_json():
        raise ValueError(
            f"held_out: {', '.join(config.paths)} was made with another tokenizer than that of"
            f" {path}"
        )
    return batches


class SecondHeadEvaluator(Evaluator):
    """The same pass for the MTP block: the token after the next, wherever both are of one
    document.
    """

    def _sums(self, params, router, batch):
        model = build_model(self.config, params, router)
        h = model.trunk(batch["tokens"], batch["segment_ids"], batch["positions"]).h
        x, _, _ = model.mtp_hidden(h, batch["targets"], batch["segment_ids"], batch["positions"])
        targets, weights = mtp_targets(batch)
        nats = chunked_cross_entropy(x, model.mtp_head.weight[...], targets, weights, LOSS_CHUNK)
        text_bytes = jnp.pad(batch["target_bytes"][:, 1:], ((0, 0), (0, 1)))
        return nats, jnp.sum(weights), jnp.sum(jnp.where(weights > 0, text_bytes, 0))


def run_held_out(batches: HeldOutBatches, subject: Subject) -> dict[str, dict]:
    """Loss in nats a token, its exponential, bits per byte; loss and bits per byte of the MTP block
    where there is one.
    """
    config = subject.model.config
    mesh = make_mesh(
        MeshConfig(data=1, fsdp=1, expert=1, context=1, tensor=1), jax.local_devices()[:1]
    )
    params, router = (
        nnx.to_pure_dict(part) for part in nnx.state(subject.model, nnx.Param, RouterBias)
    )
    state = TrainState(jnp.zeros((), jnp.int32), params, router, opt_state=())
    metrics = {}
    with jax.set_mesh(mesh):
        first = Evaluator(config, mesh, tqdm(batches, desc="held_out", unit="batch"))(state)
        metrics |= {"loss": first["held_out_loss"], "perplexity": np.exp(first["held_out_loss"])}
        metrics["bits_per_byte"] = first["held_out_bits_per_byte"]
        if subject.model.mtp is not None:
            second = SecondHeadEvaluator(
                config, mesh, tqdm(batches, desc="held_out, MTP", unit="batch")
            )(state)
            metrics |= {
                "mtp_loss": second["held_out_loss"],
                "mtp_bits_per_byte": second["held_out_bits_per_byte"],
            }
    return {"held_out": result(metrics, len(batches), "batches")}
