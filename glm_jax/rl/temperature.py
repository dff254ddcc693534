"""The sampling temperature (arXiv 2508.06471, section 3.2): when the reward stops rising, the
highest that costs at most 1% on held-out prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def has_plateaued(rewards: Sequence[float], window: int, gain: float) -> bool:
    """Whether the mean reward of the last `window` steps exceeds that of the `window` before by
    less than `gain`.
    """
    if len(rewards) < 2 * window:
        return False
    last, before = rewards[-window:], rewards[-2 * window : -window]
    return (sum(last) - sum(before)) / window < gain


def choose_temperature(scores: Mapping[float, float], loss: float) -> float:
    """The highest temperature whose score is at most the share `loss` below the best score."""
    best = max(scores.values())
    return max(t for t, score in scores.items() if score >= best * (1 - loss))


class TemperatureControl:
    """The temperature of the next step. State: `temperature` and the rewards since it was last
    chosen.
    """

    def __init__(self, temperatures: Sequence[float], loss: float, window: int, gain: float):
        self.temperatures = tuple(temperatures)
        self.loss = loss
        self.window = window
        self.gain = gain
        self.temperature = self.temperatures[0]
        self.rewards: list[float] = []

    def observe(self, reward: float) -> bool:
        """Takes a step's mean reward. True: it has plateaued, and a sweep over the temperatures is
        due.
        """
        self.rewards = [*self.rewards, reward][-2 * self.window :]
        return len(self.temperatures) > 1 and has_plateaued(self.rewards, self.window, self.gain)

    def choose(self, scores: Mapping[float, float]):
        """Takes the sweep's scores on held-out prompts by temperature."""
        self.temperature = choose_temperature(scores, self.loss)
        self.rewards = []

    def get_state(self) -> dict:
        return {"temperature": self.temperature, "rewards": list(self.rewards)}

    def set_state(self, state: dict):
        self.temperature, self.rewards = state["temperature"], list(state["rewards"])
