"""What a run changes as it goes on: the pool of tasks, the sampling temperature and the output
length.
"""

from __future__ import annotations

from glm_jax.envs.episode import SamplingSpec
from glm_jax.rl.config import RlConfig
from glm_jax.rl.curriculum import Curriculum
from glm_jax.rl.output_length import output_length
from glm_jax.rl.tasks import Tasks
from glm_jax.rl.temperature import TemperatureControl
from glm_jax.rollouts.task import Task


class Controllers:
    """Observe each step's mean reward, and say how the next step samples. All of their state is in
    get_state.
    """

    def __init__(self, config: RlConfig, tasks: Tasks):
        self.config, self.tasks, control = config, tasks, config.control
        window, gain = control.plateau_window, control.plateau_gain
        pools = tasks.pools(config)
        self.curriculum = Curriculum(control.curriculum, len(tasks.train), pools, window, gain)
        self.temperature = TemperatureControl(
            control.temperatures, control.temperature_loss, window, gain
        )

    def spec(self, step: int) -> SamplingSpec:
        """How the rollouts of a step are sampled."""
        config = self.config
        return SamplingSpec(
            group_size=config.rollout.group_size,
            max_new_tokens=output_length(config.control.length_stages, step),
            temperature=self.temperature.temperature,
            seed=config.loop.seed,
            thinking=config.tasks.thinking,
        )

    def evaluation_spec(self, temperature: float) -> SamplingSpec:
        """How the held-out tasks are sampled."""
        config = self.config
        return SamplingSpec(
            group_size=config.loop.eval_samples,
            max_new_tokens=max(tokens for _, tokens in config.control.length_stages),
            temperature=temperature,
            seed=config.loop.seed,
            thinking=config.tasks.thinking,
        )

    def take(self, count: int) -> list[Task]:
        """The next tasks of the curriculum's pool."""
        pool = self.curriculum.pool
        return self.tasks.take(count, pool, self.curriculum.pools[pool])

    @property
    def pool(self) -> int:
        """Number of the pool that the next step takes from, for the record."""
        return sorted(self.curriculum.pools).index(self.curriculum.pool)

    def observe(self, reward: float) -> bool:
        """Returns whether the temperatures are to be compared on the held-out tasks now."""
        self.curriculum.observe(reward)
        return self.temperature.observe(reward)

    def get_state(self) -> dict:
        return {
            "positions": self.tasks.order.get_state(),
            "curriculum": self.curriculum.get_state(),
            "temperature": self.temperature.get_state(),
        }

    def set_state(self, saved: dict):
        self.tasks.order.set_state(saved["positions"])
        self.curriculum.set_state(saved["curriculum"])
        self.temperature.set_state(saved["temperature"])
