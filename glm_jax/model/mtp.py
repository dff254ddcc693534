"""Multi-token prediction: one more MoE block that predicts the token after the next (docs/glm45.md,
"Multi-token prediction").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.config import ModelConfig
from glm_jax.model.cache import Cache
from glm_jax.model.layers import Linear, RMSNorm, normal, param, rope_angles


class Weight(nnx.Module):
    """A bare matrix: the word embedding [V, D] or the output head [D, V]."""

    def __init__(self, config: ModelConfig, axes: tuple[str, str], *, rngs: nnx.Rngs):
        sizes = {"vocab": config.vocab_size, "embed": config.hidden_size}
        self.weight = param(rngs, tuple(sizes[a] for a in axes), axes, normal(config))


class SharedHead(nnx.Module):
    """The norm before the second head and, in checkpoints that bring their own, that head [D,
    V].
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(config, config.hidden_size, rngs=rngs)
        self.head = (
            Weight(config, ("embed", "vocab"), rngs=rngs)
            if config.mtp_embeddings == "own"
            else None
        )


class MTP(nnx.Module):
    """x = eh_proj([enorm(embed(t_{i+1})), hnorm(h_i)]), a block, a norm. Embedding first:
    DeepSeek-V3 writes the hidden state first, the released checkpoints want the embedding first.
    h_i is the trunk's state after its final norm.
    """

    def __init__(self, config: ModelConfig, block: nnx.Module, *, rngs: nnx.Rngs):
        self.config = config
        self.enorm = RMSNorm(config, config.hidden_size, rngs=rngs)
        self.hnorm = RMSNorm(config, config.hidden_size, rngs=rngs)
        self.eh_proj = Linear(
            config, 2 * config.hidden_size, config.hidden_size, (None, "embed"), rngs=rngs
        )
        self.block = block
        self.shared_head = SharedHead(config, rngs=rngs)
        self.embed_tokens = (
            Weight(config, ("vocab", "embed"), rngs=rngs)
            if config.mtp_embeddings == "own"
            else None
        )

    def __call__(
        self,
        h_BLD: jax.Array,
        next_embedding_BLD: jax.Array,
        segment_ids_BL,
        positions_BL,
        cache: Cache | None = None,
    ):
        """Normed state [B, L, D] whose product with the head predicts t_{i+2}, the router's
        observation, and the cache: its layer after the trunk's is this block's.
        """
        x_BLD = self.eh_proj(
            jnp.concatenate([self.enorm(next_embedding_BLD), self.hnorm(h_BLD)], axis=-1)
        )
        angles = rope_angles(self.config, positions_BL)
        x_BLD, observation, cache = self.block(
            x_BLD, segment_ids_BL, angles, cache, self.config.num_layers
        )
        return self.shared_head.norm(x_BLD), observation, cache
