"""The numerical oracle: transformers' Glm4MoeForCausalLM, and its MtpLayer for the MTP block,
loaded from our export.

Transformers' own MtpModel only knows the released depths (layer 46 or 92), so the MTP tensors are
given to its MtpLayer here.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import torch
from flax import nnx
from safetensors.torch import load_file
from transformers import Glm4MoeForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRMSNorm

from glm_jax import hf
from glm_jax.config import ModelConfig
from glm_jax.hf.config import RUNTIME_FIELDS

TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_dense_layers": 2,
    "num_mtp_layers": 1, "dense_ffn_size": 48,
    "expert_ffn_size": 24,
    "num_heads": 4, "num_kv_heads": 2, "head_size": 16, "qk_norm": True, "attention_bias": True,
    "rotary_fraction": 0.5, "rope_theta": 1e4,
    "max_length": 128, "norm_eps": 1e-5, "num_experts": 8, "num_experts_per_token": 3,
    "num_shared_experts": 1, "num_expert_groups": 1,
    "num_groups_per_token": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "init_std": 0.2, "mtp_embeddings": "shared",
    "compute_dtype": "float32", "remat": "none", "attention": "xla", "grouped_matmul": "batched",
    "expert_exchange": "all_to_all", "expert_buffer": 1.25,
    "scan_layers": True,
}  # fmt: skip
RUNTIME = {name: TINY[name] for name in RUNTIME_FIELDS}


def tiny_config(**changes) -> ModelConfig:
    """Every part of the architecture at toy size: two dense layers, more experts than active ones,
    an MTP block.
    """
    return ModelConfig(**TINY | changes)


def random_state(config: ModelConfig, seed: int = 0) -> nnx.State:
    """Random everything: norms around 1, biases and correction biases far enough from 0 to matter.
    NumPy arrays.
    """
    rng = np.random.default_rng(seed)
    flat = []
    for path, variable in hf.abstract_parameters(config).items():
        values = rng.standard_normal(variable.get_value().shape, np.float32)
        if "norm" in path[-2]:
            values = 1 + 0.3 * values
        else:
            values *= 0.3 if "bias" in path[-1] else config.init_std
        flat.append((path, variable.replace(values.astype(np.float32))))
    return nnx.from_flat_state(flat)


def to_jax(state: nnx.State) -> nnx.State:
    return jax.tree.map(jax.numpy.asarray, state)


torch.set_num_threads(1)  # tiny products: more threads only wait for each other


class Oracle:
    """Both heads in torch, float32, from a Hugging Face folder with one safetensors file."""

    def __init__(self, folder: pathlib.Path):
        self.main, self.loading = Glm4MoeForCausalLM.from_pretrained(
            folder,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
        config = self.main.config
        self.mtp = MtpLayer(
            config, Glm4MoeDecoderLayer, Glm4MoeRMSNorm, layer_idx=config.num_hidden_layers
        )
        self.prefix = f"model.layers.{config.num_hidden_layers}."
        tensors = {
            k.removeprefix(self.prefix): v
            for k, v in load_file(folder / hf.WEIGHTS).items()
            if k.startswith(self.prefix)
        }
        own = [
            tensors.pop(name) if name in tensors else None
            for name in ("embed_tokens.weight", "shared_head.head.weight")
        ]
        self.mtp_embedding, self.mtp_head = (
            None if t is None else torch.nn.Parameter(t) for t in own
        )
        experts = "mlp.experts"
        parts = {
            part: torch.stack(
                [
                    tensors.pop(f"{experts}.{j}.{part}.weight")
                    for j in range(config.n_routed_experts)
                ]
            )
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{experts}.gate_up_proj"] = torch.cat(
            [parts["gate_proj"], parts["up_proj"]], dim=1
        )
        tensors[f"{experts}.down_proj"] = parts["down_proj"]
        self.mtp.load_state_dict({self.in_layer(name): value for name, value in tensors.items()})

    @staticmethod
    def in_layer(name: str) -> str:
        """Name in MtpLayer of a tensor of the MTP block."""
        outside = {"shared_head.norm.weight": "post_norm.weight"} | {
            f"{n}.weight": f"{n}.weight" for n in ("enorm", "hnorm", "eh_proj")
        }
        return outside.get(name, f"mtp_block.{name}")

    def hidden(self, tokens: np.ndarray, positions=None) -> tuple[torch.Tensor, torch.Tensor]:
        """States after the final norm [B, L, D] and positions; the mask of ones keeps transformers
        from guessing documents.
        """
        tokens = torch.tensor(np.asarray(tokens), dtype=torch.long)
        positions = (
            torch.arange(tokens.shape[1])[None]
            if positions is None
            else torch.tensor(np.asarray(positions), dtype=torch.long)
        )
        out = self.main.model(
            tokens, attention_mask=torch.ones_like(tokens), position_ids=positions, use_cache=False
        )
        return out.last_hidden_state, positions

    def logits(self, tokens, positions=None) -> np.ndarray:
        """[B, L, V]."""
        with torch.no_grad():
            return self.main.lm_head(self.hidden(tokens, positions)[0]).numpy()

    def mtp_logits(self, tokens, positions=None) -> np.ndarray:
        """[B, L - 1, V]: position i predicts token i + 2 from the trunk's state i and token i +
        1.
        """
        with torch.no_grad():
            h, positions = self.hidden(tokens, positions)
            return self.second_head(
                h[:, :-1],
                torch.tensor(np.asarray(tokens)[:, 1:], dtype=torch.long),
                positions[:, :-1],
            ).numpy()

    def second_head(
        self, h: torch.Tensor, next_tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        table = (
            self.main.model.embed_tokens.weight
            if self.mtp_embedding is None
            else self.mtp_embedding
        )
        head = self.main.lm_head.weight if self.mtp_head is None else self.mtp_head
        length = h.shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        rotary = self.main.model.rotary_emb(h, positions)
        x = self.mtp(
            table[next_tokens],
            h,
            position_embeddings=rotary,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=None,
        )
        return x @ head.T

    def losses(self, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of rows [B, L + 1], of the head and of the second head (which has no
        target at the last position).
        """
        rows = torch.tensor(np.asarray(tokens), dtype=torch.long)
        h, positions = self.hidden(rows[:, :-1])
        entropy = torch.nn.functional.cross_entropy
        first = entropy(self.main.lm_head(h).flatten(0, 1), rows[:, 1:].flatten())
        second = self.second_head(h, rows[:, 1:], positions)[:, :-1]
        return first, entropy(second.flatten(0, 1), rows[:, 2:].flatten())

    def gradients(self, loss: torch.Tensor) -> dict[str, np.ndarray]:
        """Gradient of a loss by the folder's tensor names; zeros where it does not reach."""
        named = dict(self.main.named_parameters())
        inverse = {
            self.in_layer(name): name
            for name in (
                "shared_head.norm.weight",
                "enorm.weight",
                "hnorm.weight",
                "eh_proj.weight",
            )
        }
        for name, value in self.mtp.named_parameters():
            named[
                self.prefix
                + (inverse[name] if name in inverse else name.removeprefix("mtp_block."))
            ] = value
        own = {"embed_tokens.weight": self.mtp_embedding, "shared_head.head.weight": self.mtp_head}
        named |= {self.prefix + name: value for name, value in own.items() if value is not None}
        found = torch.autograd.grad(
            loss, list(named.values()), retain_graph=True, allow_unused=True
        )
        out = {}
        for (name, value), reached in zip(named.items(), found, strict=True):
            gradient = np.zeros(value.shape, np.float32) if reached is None else reached.numpy()
            out |= split_experts(name, gradient) if ".experts." in name else {name: gradient}
        return out


def split_experts(name: str, stacked: np.ndarray) -> dict[str, np.ndarray]:
    """transformers' stacked experts [E, 2F, D] or [E, D, F] by the names on disk."""
    prefix, kind = name.rsplit(".", 1)
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    parts = np.split(stacked, len(kinds), axis=1)
    return {
        f"{prefix}.{j}.{k}.weight": part[j]
        for k, part in zip(kinds, parts, strict=True)
        for j in range(len(stacked))
    }
