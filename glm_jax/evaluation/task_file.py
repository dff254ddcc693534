"""Tasks of a file, with their verifiers or environments: pass@1, and how it grows with the turns
that an episode may take (arXiv 2508.06471, Figure 8).
"""

from __future__ import annotations

import functools
import pathlib

from glm_jax.envs import registry
from glm_jax.evaluation import chat
from glm_jax.evaluation.subject import Measurement, Settings, Subject, mean_and_error, result
from glm_jax.rollouts.rollout import Rollout, RolloutStatus
from glm_jax.rollouts.task import Task, read_tasks


def is_task_file(name: str) -> bool:
    return name.endswith(".jsonl")


def prepare(name: str, settings: Settings) -> Measurement:
    """Raises ValueError for a file that cannot be read, or a task that its verifier cannot use."""
    tasks = read_tasks(name)[: settings.limit]
    registry.check(tasks)
    return functools.partial(run_tasks, name, tasks)


def run_tasks(name: str, tasks: list[Task], subject: Subject) -> dict[str, dict]:
    """Every task answered once for each of settings.max_turns. An episode that was cut short or
    did not end earns what it had; one that could not be read or did not fit, nothing.

    Metrics: `reward`; `turns` of the model; the share of each status that occurred. Verifiers judge
    one turn, so that without an environment the limit changes nothing.
    """
    found = {}
    for turns in subject.settings.max_turns:
        label = f"{pathlib.Path(name).stem}, {turns} turns"
        rollouts = chat.rollouts(tasks, subject, label, max_turns=turns)
        part = name if len(subject.settings.max_turns) == 1 else f"{name}/max_turns={turns}"
        found[part] = rollouts_result(rollouts)
    return found


def rollouts_result(rollouts: list[Rollout | None]) -> dict:
    """The metrics of `run_tasks`; None: a task that did not fit."""
    there = [rollout for rollout in rollouts if rollout is not None]
    rewards = [0.0 if r is None else r.reward.value for r in rollouts]
    metrics: dict = {
        "reward": mean_and_error(rewards),
        "turns": mean_and_error([float(r.num_turns) for r in there] or [0.0]),
        "did_not_fit": 1 - len(there) / len(rollouts),
    }
    for status in RolloutStatus:
        if share := sum(r.status is status for r in there) / len(rollouts):
            metrics[status.value] = share
    return result(metrics, len(rollouts), "tasks")
