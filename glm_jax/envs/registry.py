"""All environments by the name that a task gives as its verifier."""

from __future__ import annotations

from collections.abc import Sequence

from glm_jax.envs import calculator
from glm_jax.envs.environment import Environment, Harness, Kind
from glm_jax.envs.scripted import idle, play
from glm_jax.envs.search import web_search
from glm_jax.envs.software import environment as software
from glm_jax.rewards import verifiers
from glm_jax.rollouts.task import Task

ENVIRONMENTS: dict[str, Kind] = {
    "calculator": calculator.KIND,
    "search": web_search.KIND,
    "software": software.KIND,
}
PLAYED = 20  # tasks of an environment that `check` plays


def check(tasks: Sequence[Task]) -> None:
    """Raises ValueError naming the first task whose environment or verifier is unknown or cannot
    use it; or, of some tasks of each environment, one that its expert does not solve or that pays
    an agent who does nothing.
    """
    for name, kind in ENVIRONMENTS.items():
        if own := [task for task in tasks if task.verifier == name]:
            kind.check(own)
            for task in own[:: -(-len(own) // PLAYED)]:
                check_rewards(kind, task)
    verifiers.check([task for task in tasks if task.verifier not in ENVIRONMENTS])


def check_rewards(kind: Kind, task: Task) -> None:
    """Raises ValueError unless the environment's expert, where it has one, earns 1 and one who does
    nothing 0.
    """
    if kind.expert is None:
        return
    for name, agent, due in (("the expert", kind.expert(task), 1.0), ("doing nothing", idle, 0.0)):
        environment = kind.make()
        assert not isinstance(environment, Harness), "a harness brings its own agent"
        reward = play(environment, task, agent).reward
        if abs(reward - due) > 1e-6:
            raise ValueError(
                f"task {task.id!r}: with answer={task.answer!r} {name} earns {reward:g}, not"
                f" {due:g}"
            )


def made_for(task: Task) -> Environment | Harness | None:
    """The environment or harness of a task's episode; None where a verifier judges its one turn."""
    kind = ENVIRONMENTS.get(task.verifier)
    return None if kind is None else kind.make()
