"""Episodes on an engine: when a request of the engine ends, its episode goes on, whatever the
others do. Tokens are the truth: an episode's next prompt is its own tokens and what was added.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data import chat_output, chat_template
from data.tokenizer import Tokenizer
from glm_jax.envs.environment import NO_REWARD, Environment, Start, Step, answer_of
from glm_jax.envs.registry import made_for
from glm_jax.infer.engine import Engine
from glm_jax.infer.request import Request
from glm_jax.infer.sampling import SamplingParams
from glm_jax.rewards import verifiers
from glm_jax.rollouts.rollout import ALONG_TOKENS, Group, Rollout, RolloutStatus
from glm_jax.rollouts.task import Reward, Task

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """How the rollouts of a call are sampled."""

    group_size: int  # rollouts of a task
    max_new_tokens: int  # that the model may sample in all turns of an episode together
    temperature: float
    seed: int  # of the run
    thinking: bool
    max_turns: int = 32  # of the model, then the episode ends as MAX_TURNS
    step_seconds: float = 60.0  # that an environment may take to answer, then it ends as TIMEOUT


def prompt_of(tokenizer: Tokenizer, task: Task, *, thinking: bool) -> list[int]:
    """Token ids of a task's messages, up to where the model goes on."""
    return chat_template.encode(tokenizer, task.messages, task.tools, thinking=thinking)


@dataclasses.dataclass(eq=False)
class _Episode:
    """One rollout under way. tokens and what is along them as in Rollout; experts: of the tokens
    that the engine has computed, in parts.
    """

    task: Task
    spec: SamplingSpec
    seed: int
    environment: Environment | None
    tools: Sequence[Mapping] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    mask: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    experts: list[np.ndarray] = dataclasses.field(default_factory=list)
    turns: int = 0
    status: RolloutStatus | None = None
    message: Mapping | None = None  # the only turn's, for its verifier
    reward: Reward = NO_REWARD

    def give(self, tokens: Sequence[int]):
        """Adds tokens that the model did not sample."""
        self.tokens += tokens
        self.mask += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.versions += [-1] * len(tokens)

    def take(self, request: Request, num_moe_layers: int):
        """Adds what a finished request sampled."""
        self.tokens += request.tokens
        self.mask += [True] * len(request.tokens)
        self.logprobs += request.logprobs
        self.versions += request.versions
        if request.experts is not None:
            known = sum(map(len, self.experts))  # as they were when the token was first computed
            self.experts.append(request.experts[known:, :num_moe_layers])
        self.turns += 1

    def earn(self, reward: Reward):
        parts = collections.Counter(self.reward.parts)
        parts.update(reward.parts)
        self.reward = Reward(self.reward.value + reward.value, dict(parts))

    def rollout(self) -> Rollout:
        assert self.status is not None, "it has ended"
        along: dict[str, Any] = {name: getattr(self, name) for name in ALONG_TOKENS}
        return Rollout(
            task=self.task, **along, status=self.status, reward=self.reward,
            experts=np.concatenate(self.experts) if self.experts else None,
        )  # fmt: skip


class RolloutWorker:
    """Turns tasks into groups of judged rollouts. Counts the seconds of `generate` and `score` in
    `seconds`.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
        self.stops = {tokenizer.special(name): name for name in chat_template.STOP_TOKENS}
        self.stop_tokens = tuple(self.stops)
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._running: dict[int, tuple[Request, _Episode]] = {}  # by the id of the request
        # What environments are asked, with what goes on when they answer, and until when they may.
        self._waiting: dict[concurrent.futures.Future, tuple[_Episode, Callable, float]] = {}

    def rollouts(
        self,
        tasks: Sequence[Task],
        spec: SamplingSpec,
        first: int,
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[Group]:
        """A group for each task, in order. first: number of the first of them among all that the
        run has sampled; with the run's seed it decides every rollout. progress: told how many
        rollouts have ended.
        """
        started = time.perf_counter()
        episodes = []
        for number, task in enumerate(tasks, first):
            seeds = np.random.SeedSequence([spec.seed, number]).generate_state(spec.group_size)
            group = [_Episode(task, spec, int(seed), made_for(task)) for seed in seeds]
            self._begin(task, group)
            episodes += group
        left = len(episodes)
        while self._running or self._waiting:
            if not self.engine.idle:
                self.engine.step()
            # Those that were cancelled are none of the step's.
            for request, episode in [
                r for r in self._running.values() if r[0].status == "finished"
            ]:
                del self._running[request.id]
                self._ended(episode, request)
            self._environments(timeout=0.05 if self.engine.idle else 0.0)
            before, left = left, sum(episode.status is None for episode in episodes)
            progress(before - left)
        generated = time.perf_counter()
        self.judge(episodes)
        self.seconds["generate"] += generated - started
        self.seconds["score"] += time.perf_counter() - generated
        rollouts = [episode.rollout() for episode in episodes]
        size = spec.group_size
        return [Group(t, rollouts[i * size : (i + 1) * size]) for i, t in enumerate(tasks)]

    def judge(self, episodes: Sequence[_Episode]):
        """Gives the verifiers' rewards to the episodes of one turn that can be read."""
        readable = [(e, e.message) for e in episodes if e.message is not None]
        scores = verifiers.score(
            [e.task for e, _ in readable], [message for _, message in readable]
        )
        for (episode, _), reward in zip(readable, scores, strict=True):
            episode.reward = reward
            if reward.parts.get("environment_error"):
                episode.status = RolloutStatus.ENVIRONMENT_ERROR

    def read(
        self, tools: Sequence[Mapping], request: Request
    ) -> tuple[RolloutStatus, Mapping | None]:
        """How a finished request ended, and the message that it wrote, where that can be read."""
        if request.finish_reason == "length":
            return RolloutStatus.TRUNCATED, None
        if request.finish_reason != "stop":
            return RolloutStatus.ABORTED, None
        try:
            message = chat_output.parse_tokens(self.tokenizer, request.tokens, tools or None)
        except chat_output.MalformedOutput:
            return RolloutStatus.FORMAT_ERROR, None
        return RolloutStatus.COMPLETED, message

    def _begin(self, task: Task, group: Sequence[_Episode]):
        prompt = None
        for episode in group:
            if episode.environment is not None:
                reset = episode.environment.reset
                self._ask(episode, self._started, reset, task, episode.seed)
                continue
            prompt = prompt or prompt_of(self.tokenizer, task, thinking=episode.spec.thinking)
            episode.tools = task.tools
            episode.give(prompt)
            self._sample(episode)

    def _started(self, episode: _Episode, start: Start):
        episode.tools = tuple(start.tools)
        thinking = episode.spec.thinking
        episode.give(
            chat_template.encode(self.tokenizer, start.messages, episode.tools, thinking=thinking)
        )
        self._sample(episode)

    def _sample(self, episode: _Episode):
        """The model's next turn, as far as the episode's tokens and the context reach."""
        left = episode.spec.max_new_tokens - sum(episode.mask)
        if episode.environment is not None:
            left = min(left, self.engine.config.context - len(episode.tokens))
        if left <= 0:
            episode.status = RolloutStatus.TRUNCATED
            return
        params = SamplingParams(
            max_new_tokens=left, temperature=episode.spec.temperature, seed=episode.seed,
            sample_index=episode.turns, stop_tokens=self.stop_tokens,
            logprob_temperature=episode.spec.temperature or 1.0,
        )  # fmt: skip
        request = self.engine.submit(list(episode.tokens), params)
        self._running[request.id] = request, episode

    def _ended(self, episode: _Episode, request: Request):
        episode.take(request, self.engine.model_config.num_moe_layers)
        status, message = self.read(episode.tools, request)
        if episode.environment is None or status is not RolloutStatus.COMPLETED:
            episode.status = status
            episode.message = message if episode.environment is None else None
        else:
            self._ask(episode, self._answered, episode.environment.step, message)

    def _answered(self, episode: _Episode, step: Step):
        episode.earn(step.reward)
        if step.done:
            episode.status = RolloutStatus.COMPLETED
        elif episode.turns >= episode.spec.max_turns:
            episode.status = RolloutStatus.MAX_TURNS
        else:
            stop, thinking = self.stops[episode.tokens[-1]], episode.spec.thinking
            episode.give(
                chat_template.encode_reply(self.tokenizer, step.messages, stop, thinking=thinking)
            )
            self._sample(episode)

    def _ask(self, episode: _Episode, then: Callable, function: Callable, *args):
        future = concurrent.futures.Future()
        # A daemon: an environment that never answers must not keep the process from its end.
        threading.Thread(target=_finish, args=(future, function, *args), daemon=True).start()
        self._waiting[future] = episode, then, time.monotonic() + episode.spec.step_seconds

    def _environments(self, timeout: float):
        """Goes on with the episodes whose environments have answered, and ends those whose have
        failed or take too long.
        """
        if not self._waiting:
            return
        concurrent.futures.wait(
            self._waiting, timeout, return_when=concurrent.futures.FIRST_COMPLETED
        )
        now = time.monotonic()
        for future, (episode, then, deadline) in list(self._waiting.items()):
            if future.done():
                del self._waiting[future]
                error = future.exception()
                if error is None:
                    try:
                        then(episode, future.result())
                    except Exception as found:  # in what it gave: it must end its episode alone
                        error = found
                if error is not None:
                    name = episode.task.id
                    logger.warning("task %r: its environment failed", name, exc_info=error)
                    episode.status = RolloutStatus.ENVIRONMENT_ERROR
            elif now > deadline:
                del self._waiting[future]
                episode.status = RolloutStatus.TIMEOUT


def _finish(future: concurrent.futures.Future, function: Callable, *args):
    try:
        future.set_result(answer_of(function, *args))
    except BaseException as error:  # handed on to whoever asks the future
        future.set_exception(error)
