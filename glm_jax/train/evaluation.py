"""What is looked at during a run: held-out loss in bits per byte, and samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data.fim import fim_prompt
from data.tokenizer import Tokenizer
from glm_jax.config import ModelConfig
from glm_jax.infer.engine import generate
from glm_jax.infer.sampling import SamplingParams
from glm_jax.losses import LOSS_CHUNK, chunked_cross_entropy
from glm_jax.sharding import data_rank, named
from glm_jax.train.state import TrainState, build_model


class Evaluator:
    """Held-out loss: nats a token and bits per byte of the text, both over the same tokens."""

    def __init__(self, config: ModelConfig, mesh: Mesh, batches: Iterable[Mapping]):
        self.config, self.batches = config, batches
        self.sharding = named(mesh, ("batch", "length"))
        self.num_parts = data_rank(mesh)[1]
        self.step = jax.jit(self._sums)

    def _sums(self, params, router, batch):
        model = build_model(self.config, params, router)
        h = model.trunk(batch["tokens"], batch["segment_ids"], batch["positions"]).h
        nats = chunked_cross_entropy(
            h, model.lm_head.weight[...], batch["targets"], batch["loss_weights"], LOSS_CHUNK
        )
        return nats, jnp.sum(batch["loss_weights"]), jnp.sum(batch["target_bytes"])

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`held_out_loss` and `held_out_bits_per_byte`."""
        sums = np.zeros(3)
        for host in self.batches:
            batch = {
                n: jax.make_array_from_process_local_data(
                    self.sharding, x, (len(x) * self.num_parts, *x.shape[1:])
                )
                for n, x in host.items()
            }
            sums += np.asarray(
                jax.device_get(self.step(state.params, state.router, batch)), np.float64
            )
        nats, tokens, text_bytes = sums
        return {
            "held_out_loss": nats / tokens,
            "held_out_bits_per_byte": nats / math.log(2) / text_bytes,
        }


class Sampler:
    """The prompts of a config, continued by the model as it is."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, loop):
        self.config, self.tokenizer, self.loop = config, tokenizer, loop
        self.params = SamplingParams(
            max_new_tokens=loop.sample_length, temperature=loop.sample_temperature,
            top_p=loop.sample_top_p, seed=loop.seed,
            stop_tokens=(tokenizer.eos_id,),
        )  # fmt: skip

    def __call__(self, state: TrainState) -> str:
        """One text with every prompt and its continuation."""
        host = jax.tree.map(lambda x: np.asarray(jax.device_get(x)), (state.params, state.router))
        model = build_model(self.config, *jax.tree.map(jnp.asarray, host))
        tokenizer, loop, out = self.tokenizer, self.loop, []
        asked = [
            ("prompt", p, "", [*tokenizer.start_ids, *tokenizer.encode(p)])
            for p in loop.sample_prompts
        ]
        for pair in loop.fim_prompts:
            prefix, suffix = pair.split("|")
            asked.append(
                ("fill in the middle", prefix, suffix, fim_prompt(tokenizer, prefix, suffix))
            )
        answers = generate(model, [ids for *_, ids in asked], self.params)
        for (kind, before, after, _), answer in zip(asked, answers, strict=True):
            out.append(
                f"--- {kind} ---\n{before}[[{tokenizer.decode(answer.text_tokens)}]]{after}\n"
            )
        return "\n".join(out)
