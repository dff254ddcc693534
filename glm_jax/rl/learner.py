"""The trainer's side of reinforcement learning: the state, and a step's updates of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from glm_jax.model.transformer import GLM
from glm_jax.rl.advantages import advantages
from glm_jax.rl.batch import PolicyBatch, pack
from glm_jax.rl.config import RlConfig
from glm_jax.rl.step import PolicyScalars, compile_policy_step, trainer_logprobs
from glm_jax.rollouts.rollout import Group
from glm_jax.run.workdir import WorkDir
from glm_jax.train.metrics import load_statistics
from glm_jax.train.state import TrainSpec, TrainState, build_model


class Learner:
    """Owns the train state. version: of the weights, the number of updates so far."""

    def __init__(
        self, config: RlConfig, mesh: Mesh, spec: TrainSpec, state: TrainState, folder: WorkDir
    ):
        self.config, self.mesh, self.state, self.folder = config, mesh, state, folder
        self.version = int(state.step)
        self._update = compile_policy_step(spec, config.grpo, mesh)

    def model(self) -> GLM:
        return build_model(self.config.model, self.state.params, self.state.router)

    def weights(self) -> nnx.State:
        return nnx.state(self.model())

    def learn(self, groups: Sequence[Group], temperature: float, step: int) -> dict:
        """The updates of a step. Returns their mean metrics; only their number where there was
        nothing to learn from. Raises recorder.NonFinite before weights that are not finite are used
        or saved.
        """
        grpo, updates = self.config.grpo, []
        dealt = [groups[i :: grpo.updates_per_step] for i in range(grpo.updates_per_step)]
        batches = [self.batch(part) for part in dealt if any(g.has_variance for g in part)]
        sampled_with = jnp.float32(temperature)
        with jax.set_mesh(self.mesh):
            if len(batches) > 1 and grpo.old_logprobs == "trainer":
                # All before the first update: they are the denominators of all ratios.
                weights = self.config.model, self.state.params, self.state.router
                for number, (batch, used) in enumerate(batches):
                    old = trainer_logprobs(*weights, batch, jnp.int32(used), sampled_with)
                    inputs = dataclasses.replace(batch.inputs, old_logprobs=np.asarray(old))
                    batches[number] = dataclasses.replace(batch, inputs=inputs), used
            for batch, used in batches:
                warm = min(1.0, (self.version + 1) / max(grpo.warmup_updates, 1))
                rate = jnp.float32(grpo.learning_rate * warm)
                scalars = PolicyScalars(jnp.int32(used), rate, sampled_with)
                self.state, metrics = self._update(self.state, batch, scalars)
                self.version += 1
                updates.append(jax.device_get(metrics))
                self.folder.check_finite(updates[-1], step=step, batch=batch.arrays)
        return {"updates": len(updates), **self._mean(updates)}

    def batch(self, groups: Sequence[Group]) -> tuple[PolicyBatch, int]:
        """The groups as `pack` lays them out."""
        grpo, rollout = self.config.grpo, self.config.rollout
        pairs = [p for group in groups for p in advantages(group, normalize_std=grpo.normalize_std)]
        most = rollout.prompts_per_step * rollout.group_size
        return pack(
            pairs, row_length=grpo.row_length, rows=grpo.rows,
            # Episodes of several rollouts may be more: a larger program, for as many as it takes.
            most=most * -(-len(pairs) // most),
            aggregation=grpo.aggregation, mask_truncated=rollout.mask_truncated,
            replay=grpo.replay_experts,
        )  # fmt: skip

    def _mean(self, updates: list[dict]) -> dict:
        if not updates:
            return {}
        record = {}
        counts = [u.pop("expert_counts") for u in updates if "expert_counts" in u]
        if counts:
            total = sum(counts[1:], start=counts[0])
            violation, entropy = load_statistics(total[: self.config.model.num_moe_layers])
            record |= {"max_violation": violation, "load_entropy": entropy}
        record |= {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
        # How far the trainer is from the engine, before any update has moved it.
        record |= {name: float(updates[0][name]) for name in ("difference", "difference_max")}
        return record
