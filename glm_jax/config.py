"""Model configuration, and the legend of the shape suffixes used throughout.

Tensors carry their shape in their name, `x_BLD`, `w_EDF`:

    B  batch (rows)             D  model width               E  routed experts
    L  length (queries)         V  vocabulary                K  experts a token
    M  attended length (keys)   F  feed-forward width        T  tokens, B * L
    N  query heads              G  key-value heads           R  routed rows, T * K
    P  query heads a kv head    H  head size                 C  rows of a slab or chunk

A lower-case letter is one device's share.
"""

from __future__ import annotations

import dataclasses
import difflib
import math

REMAT_POLICIES = ("none", "full", "dots", "context")
MTP_EMBEDDINGS = ("shared", "copied", "own")
DTYPES = ("float32", "bfloat16")
EXPERT_EXCHANGES = ("all_gather", "all_to_all", "ragged_all_to_all")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A GLM-4.5 architecture (arXiv 2508.06471, Table 1). Every field is set by a file in configs/;
    none has a default.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int  # dense and MoE layers, without the MTP block
    num_dense_layers: int  # the first ones; the others are MoE
    num_mtp_layers: int  # 0 or 1
    dense_ffn_size: int
    expert_ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    qk_norm: bool
    attention_bias: bool  # on q, k and v; the output projection has none
    rotary_fraction: float  # share of the head that RoPE turns
    rope_theta: float
    max_length: int  # longest context that the model is meant for
    norm_eps: float
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    num_expert_groups: int
    num_groups_per_token: int
    norm_topk_prob: bool  # expert weights of a token sum to routed_scaling_factor
    routed_scaling_factor: float
    init_std: float
    mtp_embeddings: str  # 'shared'; 'copied' in Hugging Face folders; 'own' parameters
    compute_dtype: str  # matmul inputs and activations; parameters are float32
    # one compiled layer in a loop, or all written out: longer to compile, faster on a CPU
    scan_layers: bool
    remat: str  # what the backward pass recomputes in each layer
    attention: str  # implementation, see pallas_kernels.attention.api
    grouped_matmul: str  # implementation, see pallas_kernels.moe_dispatch.api
    # Over the expert axis: every token to every device, or rows to their experts; ragged (TPU,
    # GPU): without filling up slots.
    expert_exchange: str
    # rows of an exchange's buffers over the rows a device sends; what does not fit goes in further
    # rounds
    expert_buffer: float

    def __post_init__(self):
        check_types(self)
        choices = {
            "remat": REMAT_POLICIES, "mtp_embeddings": MTP_EMBEDDINGS, "compute_dtype": DTYPES,
            "expert_exchange": EXPERT_EXCHANGES
        }  # fmt: skip
        for field, valid in choices.items():
            check_choice(field, getattr(self, field), valid)
        _require(
            self.expert_buffer > 0,
            "expert_buffer",
            self.expert_buffer,
            "positive, 1.25 for example",
        )
        for field in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "max_length",
        ):
            _require(getattr(self, field) > 0, field, getattr(self, field), "a positive integer")
        _require(
            0 <= self.num_dense_layers <= self.num_layers,
            "num_dense_layers",
            self.num_dense_layers,
            f"0..{self.num_layers}",
        )
        _require(self.num_mtp_layers in (0, 1), "num_mtp_layers", self.num_mtp_layers, "0 or 1")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            self.num_heads,
            f"a multiple of num_kv_heads={self.num_kv_heads}",
        )
        _require(
            self.rotary_size % 2 == 0 and 0 < self.rotary_size <= self.head_size,
            "rotary_fraction",
            self.rotary_fraction,
            f"a fraction of head_size={self.head_size} that gives an even number of dimensions",
        )
        if self.num_moe_layers or self.num_mtp_layers:
            self._check_experts()

    def _check_experts(self):
        groups, chosen = self.num_expert_groups, self.num_groups_per_token
        _require(
            groups >= 1 and self.num_experts % groups == 0,
            "num_expert_groups",
            groups,
            f"a divisor of num_experts={self.num_experts}",
        )
        _require(
            groups == 1 or self.num_experts // groups >= 2,
            "num_expert_groups",
            groups,
            "groups of at least two experts",
        )
        _require(1 <= chosen <= groups, "num_groups_per_token", chosen, f"1..{groups}")
        reachable = self.num_experts // groups * chosen
        _require(
            1 <= self.num_experts_per_token <= reachable,
            "num_experts_per_token",
            self.num_experts_per_token,
            f"1..{reachable}",
        )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def num_routers(self) -> int:
        """MoE layers of the trunk and of the MTP block: one row each in every per-router table."""
        return self.num_moe_layers + self.num_mtp_layers

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.rotary_fraction)


def _require(ok: bool, field: str, value, valid: str):
    if not ok:
        raise ValueError(f"{field}={value!r}: must be {valid}")


def check_choice(field: str, value: str, valid) -> str:
    """Returns value; raises ValueError naming the valid choices and the nearest one."""
    if value in valid:
        return value
    near = difflib.get_close_matches(str(value), [str(v) for v in valid], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{field}={value!r} is not one of {', '.join(map(str, valid))}.{hint}")


def check_types(config):
    """Raises ValueError where a dataclass field holds another type than declared (an int is welcome
    as a float), NaN or infinity.
    """
    scalars = {"int": int, "float": (int, float), "bool": bool, "str": str}
    for field in dataclasses.fields(config):
        value, expected = getattr(config, field.name), scalars.get(str(field.type))
        if expected is None:
            continue
        if not isinstance(value, expected) or (isinstance(value, bool) and field.type != "bool"):
            raise ValueError(
                f"{field.name}={value!r}: must be of type {field.type}, not {type(value).__name__}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name}={value}: must be a finite number")


def from_mapping(cls, mapping, where: str):
    """Builds a frozen dataclass from a mapping with exactly its fields; names the nearest field for
    an unknown key.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    for key in mapping:
        check_choice(f"{where} key", key, names)
    missing = [n for n in names if n not in mapping]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return cls(**{n: tuple(v) if isinstance(v := mapping[n], list) else v for n in names})
