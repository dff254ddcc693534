"""Which parameter gets which optimizer, and the transformation that does it."""

from __future__ import annotations

import dataclasses

import jax
import optax

from glm_jax.config import check_choice, check_types
from glm_jax.optim.muon import scale_by_muon

OPTIMIZERS = ("muon", "adamw")
GROUPS = ("muon", "embedding", "vector")  # matrices; word embeddings; biases and norms


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """GLM-4.5's optimizer (docs/glm45.md, "Muon"), or AdamW everywhere as the ablation."""

    name: str  # 'muon': matrices on Muon, the rest on AdamW; 'adamw': everything on AdamW
    momentum: float
    nesterov: bool
    ns_steps: int
    ns_dtype: str
    update_rms: float
    split_heads: bool  # orthogonalise q, k, v and o per head
    weight_decay: float  # on matrices and embeddings; biases and norms do not decay
    adam_b1: float
    adam_b2: float
    adam_eps: float
    max_grad_norm: float  # global norm at which gradients are clipped; 0: never

    def __post_init__(self):
        check_types(self)
        check_choice("optimizer.name", self.name, OPTIMIZERS)
        check_choice("optimizer.ns_dtype", self.ns_dtype, ("float32", "bfloat16"))
        positive, fraction = (lambda x: x > 0), (lambda x: 0 <= x < 1)
        valid = {  # a parameter whose gradient is 0 would be divided by adam_eps alone
            "adam_eps": (positive, "positive"), "adam_b1": (fraction, "in [0, 1)"),
            "adam_b2": (fraction, "in [0, 1)"),
            "momentum": (fraction, "in [0, 1)"), "ns_steps": (positive, "positive"),
            "update_rms": (positive, "positive"),
            "weight_decay": (lambda x: x >= 0, "at least 0"),
            "max_grad_norm": (lambda x: x >= 0, "at least 0; 0 clips nothing"),
        }  # fmt: skip
        for field, (is_valid, meaning) in valid.items():
            if not is_valid(getattr(self, field)):
                raise ValueError(f"optimizer.{field}={getattr(self, field)} must be {meaning}")


def group_of(path: tuple[str, ...], axes: tuple[str | None, ...]) -> str:
    """Group of a parameter from its path and logical axes (without `layers`): the LM head and the
    router are matrices.
    """
    if len(axes) < 2:
        return "vector"
    return "embedding" if "embed_tokens" in path else "muon"


def head_split(
    axes: tuple[str | None, ...], shape: tuple[int, ...], head_size: int
) -> tuple[int, int] | None:
    """(axis, number of heads) of an attention projection, None for any other matrix."""
    for axis in (-1, -2):
        if len(axes) >= 2 and axes[axis] in ("heads", "kv_heads"):
            return axis, shape[axis] // head_size
    return None


def make_optimizer(
    config: OptimizerConfig, axes, shapes, head_size: int
) -> optax.GradientTransformation:
    """The update direction with weight decay, before the learning rate: params -= learning_rate *
    update.

    Args:
      axes, shapes: trees like the parameters (nested dicts) whose leaves are tuples of logical axes
        / of sizes.
      head_size: for the per-head split.
    """
    is_leaf = lambda x: isinstance(x, tuple)
    groups = group_tree(axes)
    splits = None
    if config.split_heads:
        splits = jax.tree.map(
            lambda a, s: head_split(a, s, head_size), axes, shapes, is_leaf=is_leaf
        )
        splits = jax.tree.map(
            lambda g, s: s if g == "muon" else optax.MaskedNode(),
            groups,
            splits,
            is_leaf=lambda x: isinstance(x, str),
        )
    placed = jax.tree.map(
        lambda g, a: a if g == "muon" else optax.MaskedNode(),
        groups,
        axes,
        is_leaf=lambda x: isinstance(x, str),
    )
    muon = scale_by_muon(
        momentum=config.momentum, nesterov=config.nesterov, ns_steps=config.ns_steps,
        ns_dtype=config.ns_dtype,
        update_rms=config.update_rms, head_splits=splits, axes=placed,
    )  # fmt: skip
    adam = optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps)
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.partition(
        {
            "muon": optax.chain(muon if config.name == "muon" else adam, decay),
            "embedding": optax.chain(adam, decay),
            "vector": adam,
        },
        groups,
    )


def group_tree(axes):
    """Tree of group names like the parameters."""
    return jax.tree.map_with_path(
        lambda path, a: group_of(tuple(str(k.key) for k in path), a),
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def group_rms(tree, groups) -> dict[str, jax.Array]:
    """Root mean square of all elements of each group of GROUPS that occurs."""
    out = {}
    leaves = list(zip(jax.tree.leaves(groups), jax.tree.leaves(tree), strict=True))
    for group in GROUPS:
        chosen = [x for g, x in leaves if g == group]
        if chosen:
            out[group] = optax.tree.norm(chosen) / sum(x.size for x in chosen) ** 0.5
    return out
