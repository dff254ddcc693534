"""GLM-4.5: embedding, dense layers, MoE layers, final norm, head, and the MTP block."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.config import ModelConfig
from glm_jax.model.attention import Attention
from glm_jax.model.cache import Cache
from glm_jax.model.layers import MLP, RMSNorm, few_rows_product, has_few_rows, in_stack, rope_angles
from glm_jax.model.moe import MoE, RouterObservation
from glm_jax.model.mtp import MTP, Weight
from glm_jax.sharding import by_device, constrain, dealt, gathered


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, dense or MoE."""

    def __init__(self, config: ModelConfig, moe: bool, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, config.hidden_size, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size, rngs=rngs)
        self.mlp = MoE(config, rngs=rngs) if moe else MLP(config, config.dense_ffn_size, rngs=rngs)

    def __call__(
        self, x_BLD, segment_ids_BL, angles, cache: Cache | None = None, layer=None, replay_BLK=None
    ):
        """Returns x [B, L, D], a RouterObservation (None for a dense layer), and the updated
        cache.
        """
        x_BLD = constrain(x_BLD, "batch", "length", "act_embed")
        attended, cache = self.self_attn(
            self.input_layernorm(x_BLD), segment_ids_BL, angles, cache, layer
        )
        x_BLD = x_BLD + attended
        normed = self.post_attention_layernorm(x_BLD)
        if isinstance(self.mlp, MoE):
            y_BLD, observation = self.mlp(normed, segment_ids_BL, replay_BLK)
            if cache is not None:
                cache = cache.write_experts(layer, observation.experts)
        else:
            y_BLD, observation = self.mlp(normed), None
        return constrain(x_BLD + y_BLD, "batch", "length", "act_embed"), observation, cache


def remat(function, policy: str):
    """Wraps one layer so that its backward pass recomputes what the named policy
    (config.REMAT_POLICIES) does not keep.
    """
    if policy == "none":
        return function
    names = jax.checkpoint_policies.save_only_these_names
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            names("expert_products", "attention"),
        ),
        "context": names("context", "expert_rows"),
    }
    return jax.checkpoint(function, policy=policies[policy], prevent_cse=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrunkOutput:
    """h: state after the final norm [B, L, D]; routers: observations of the MoE layers, stacked;
    cache: updated or None.
    """

    h: jax.Array
    routers: RouterObservation | None
    cache: Cache | None


class GLM(nnx.Module):
    """The whole model. Layers are stacked arrays; each stack runs as one scan, so depth costs no
    compile time.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Weight(config, ("vocab", "embed"), rngs=rngs)
        self.dense_layers = stack(config, moe=False, count=config.num_dense_layers, rngs=rngs)
        self.moe_layers = stack(config, moe=True, count=config.num_moe_layers, rngs=rngs)
        self.norm = RMSNorm(config, config.hidden_size, rngs=rngs)
        self.lm_head = Weight(config, ("embed", "vocab"), rngs=rngs)
        self.mtp = (
            MTP(config, Layer(config, True, rngs=rngs), rngs=rngs)
            if config.num_mtp_layers
            else None
        )

    def __call__(self, tokens_BL, *, segment_ids=None, positions=None) -> jax.Array:
        """Logits [B, L, V] in float32. Without segment ids every row is one document; positions
        count from 0.
        """
        segment_ids, positions = self.defaults(tokens_BL, segment_ids, positions)
        return self.logits(self.trunk(tokens_BL, segment_ids, positions).h)

    def mtp_logits(self, tokens_BL, *, segment_ids=None, positions=None) -> jax.Array:
        """The second head's logits [B, L - 1, V]: position i has seen tokens up to i + 1 and
        predicts token i + 2.
        """
        segment_ids, positions = self.defaults(tokens_BL, segment_ids, positions)
        h = self.trunk(tokens_BL, segment_ids, positions).h
        x, _, _ = self.mtp_hidden(
            h[:, :-1], tokens_BL[:, 1:], segment_ids[:, :-1], positions[:, :-1]
        )
        return self.logits(x, self.mtp_head)

    def defaults(self, tokens_BL, segment_ids, positions):
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens_BL)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        return segment_ids, positions

    def trunk(
        self, tokens_BL, segment_ids_BL, positions_BL, cache: Cache | None = None, replay=None
    ) -> TrunkOutput:
        """Everything up to and with the final norm.

        replay: experts to route to, int32 [MoE layers, B, L, K], as the inference engine returns
        them; -1: the router's own choice.
        """
        x_BLD = self.embed(self.embed_tokens, tokens_BL)
        angles = rope_angles(self.config, positions_BL)
        routers = None
        for layers, first in (
            (self.dense_layers, 0),
            (self.moe_layers, self.config.num_dense_layers),
        ):
            if layers is not None:
                wishes = None if layers is self.dense_layers else replay
                x_BLD, observed, cache = scan_layers(
                    self.config, layers, first, x_BLD, segment_ids_BL, angles, cache, wishes
                )
                routers = observed if observed is not None else routers
        return TrunkOutput(h=self.norm(x_BLD), routers=routers, cache=cache)

    def mtp_hidden(
        self, h_BLD, next_tokens_BL, segment_ids_BL, positions_BL, cache: Cache | None = None
    ):
        """State [B, L, D] before the second head, the router's observation, the cache. next_tokens
        are t_{i+1}: a batch's `targets`.
        """
        block = self.mtp_block
        embedding = self.embed(block.embed_tokens or self.embed_tokens, next_tokens_BL)
        run = remat(lambda mtp, *args: nnx.merge(*mtp)(*args), self.config.remat)
        graphdef, state = nnx.split(block)
        return run((graphdef, state), h_BLD, embedding, segment_ids_BL, positions_BL, cache)

    def embed(self, table: Weight, tokens_BL) -> jax.Array:
        rows = ("batch", "length")
        run = by_device(
            functools.partial(_look_up, self.config.compute_dtype),
            (("vocab", "embed"), rows),
            (*rows, None),
        )
        return run(table.weight[...], tokens_BL)

    @property
    def mtp_block(self) -> MTP:
        """Raises ValueError where the model has none."""
        if self.mtp is None:
            raise ValueError("this model has no MTP block: num_mtp_layers=0")
        return self.mtp

    @property
    def mtp_head(self) -> Weight:
        return self.mtp_block.shared_head.head or self.lm_head

    def logits(self, h_BLD, head: Weight | None = None, *, sampling: bool = False) -> jax.Array:
        """Float32 logits [B, L, V]; for training use losses.chunked_cross_entropy, which never
        holds them whole.

        sampling: no gradient is needed, and small batches go through a kernel. Not of several
        tokens: XLA would lay out the kernel's anew.
        """
        param, implementation = (head or self.lm_head).weight, self.config.grouped_matmul
        weight = param.astype(h_BLD.dtype)
        if (
            sampling
            and h_BLD.shape[1] == 1
            and has_few_rows(h_BLD, weight, param.get_metadata("axes"), implementation)
        ):
            return few_rows_product(h_BLD, weight, jnp.float32)
        return jnp.einsum("bld,dv->blv", h_BLD, weight, preferred_element_type=jnp.float32)


def _look_up(dtype: str, table_VD, tokens_BL) -> jax.Array:
    """Each device looks up its part of the width for the tokens of all that share the table, and
    they exchange states: fewer bytes than the table, and its gradient stays where it lies.
    """
    tokens_NBL = gathered(tokens_BL[None], "embed", 0)
    x_NBLD = jnp.take(table_VD, tokens_NBL, axis=0).astype(dtype)
    return dealt(x_NBLD, "embed", 0, 3)[0]


def abstract_model(config: ModelConfig) -> GLM:
    """The model with shapes in place of arrays; `nnx.merge(nnx.graphdef(model), state)` gives a
    real one.
    """
    return nnx.eval_shape(lambda: GLM(config, rngs=nnx.Rngs(0)))


def stack(config: ModelConfig, *, moe: bool, count: int, rngs: nnx.Rngs) -> Layer | None:
    """`count` layers whose parameters carry a leading `layers` dimension."""
    if count == 0:
        return None
    return nnx.vmap(lambda r: Layer(config, moe, rngs=r), in_axes=0, out_axes=0)(rngs.split(count))


def scan_layers(
    config: ModelConfig,
    layers: Layer,
    first: int,
    x_BLD,
    segment_ids_BL,
    angles,
    cache: Cache | None,
    replay,
):
    """Runs a stack as lax.scan over its state; `first` is the number of its first layer in the
    cache; replay as in GLM.trunk.

    Returns x, stacked observations, the cache. The cache is carried whole: as a scanned input and
    output every layer's pages would be copied in every call. With a cache there is no gradient, and
    matrices are read where they lie in the stack.
    """
    graphdef, state = nnx.split(layers)
    count, in_place = jax.tree.leaves(state)[0].shape[0], cache is not None and config.scan_layers

    def body(carry, scanned):
        x_BLD, cache = carry
        layer_state, layer, replay_BLK = scanned
        layer_state = in_stack(state, layer - first) if in_place else layer_state
        x_BLD, observation, cache = nnx.merge(graphdef, layer_state)(
            x_BLD, segment_ids_BL, angles, cache, layer, replay_BLK
        )
        return (x_BLD, cache), observation

    body = remat(body, config.remat)
    carry = x_BLD, cache
    if config.scan_layers:
        carry, observations = jax.lax.scan(
            body, carry, (None if in_place else state, jnp.arange(first, first + count), replay)
        )
        return carry[0], observations, carry[1]
    outputs = []
    for layer, layer_state in enumerate(unstack(state)):
        carry, output = body(
            carry, (layer_state, first + layer, None if replay is None else replay[layer])
        )
        outputs.append(output)
    return carry[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs), carry[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PerLayer:
    """A stack's parameter as arrays of their own, one a layer: written-out layers then read them
    where they lie. See per_layer.
    """

    layers: tuple


def per_layer(state):
    """A GLM's state (nnx) with the stacks' parameters as PerLayer, for models that are run often
    with scan_layers off.
    """
    stacks = {"dense_layers", "moe_layers"}
    split = lambda variable: variable.replace(PerLayer(tuple(unstack(variable.get_value()))))
    return nnx.from_flat_state(
        [(path, split(v) if path[0] in stacks else v) for path, v in nnx.to_flat_state(state)]
    )


def unstack(tree) -> list:
    """One tree a layer. By lax.split, whose gradient is one concatenation, not a sum of padded
    arrays.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, PerLayer))
    columns = [
        x.layers
        if isinstance(x, PerLayer)
        else [part[0] for part in jax.lax.split(x, (1,) * len(x))]
        for x in leaves
    ]
    return [treedef.unflatten(layer) for layer in zip(*columns, strict=True)]
