"""Rollouts for a step: drawn in waves by the engine, judged, and sorted into groups that teach and
groups that do not.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from data import chat_output, chat_template
from data.tokenizer import Tokenizer
from glm_jax.infer.engine import Engine, Request, SamplingParams
from glm_jax.rewards import verifiers
from glm_jax.rewards.task import Reward, Task
from glm_jax.rl.config import RolloutConfig
from glm_jax.rl.rollout import Group, Rollout, RolloutStatus

NO_REWARD = Reward(0.0, {})


@dataclasses.dataclass(frozen=True)
class Draw:
    """How the rollouts of a call are drawn."""

    group_size: int
    max_new_tokens: int
    temperature: float
    seed: int  # of the run
    thinking: bool


class Roller:
    """Turns tasks into groups of judged rollouts. Counts the seconds of `generate` and `score` in
    `seconds`.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
        self.stop_tokens = tuple(map(tokenizer.special, chat_template.STOP_TOKENS))
        self.seconds: collections.Counter = collections.Counter()

    def roll(
        self,
        tasks: Sequence[Task],
        draw: Draw,
        first: int,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[Group]:
        """A group for each task, in order. first: number of the first of them among all that the
        run has drawn; with the run's seed it decides every rollout. progress: told how many
        rollouts have ended.
        """
        started = time.perf_counter()
        requests = []
        for number, task in enumerate(tasks, first):
            prompt = chat_template.encode(
                self.tokenizer, task.messages, task.tools, thinking=draw.thinking
            )
            seeds = np.random.SeedSequence([draw.seed, number]).generate_state(draw.group_size)
            for seed in seeds:
                params = SamplingParams(
                    max_new_tokens=draw.max_new_tokens, temperature=draw.temperature,
                    seed=int(seed), stop_tokens=self.stop_tokens,
                    logprob_temperature=draw.temperature,
                )  # fmt: skip
                requests.append(self.engine.submit(prompt, params))
        while not self.engine.idle:
            progress(len(self.engine.step()))
        generated = time.perf_counter()
        owners = [task for task in tasks for _ in range(draw.group_size)]
        rollouts = self.judge(owners, requests)
        self.seconds["generate"] += generated - started
        self.seconds["score"] += time.perf_counter() - generated
        return [
            Group(task, rollouts[i * draw.group_size : (i + 1) * draw.group_size])
            for i, task in enumerate(tasks)
        ]

    def judge(self, tasks: Sequence[Task], requests: Sequence[Request]) -> list[Rollout]:
        """Rollouts of finished requests: their status, and the verifiers' rewards for those that
        can be read.
        """
        read = [self.read(task, request) for task, request in zip(tasks, requests, strict=True)]
        readable = [i for i, (status, _) in enumerate(read) if status is RolloutStatus.COMPLETED]
        scores = verifiers.score([tasks[i] for i in readable], [read[i][1] for i in readable])
        rewards = dict(zip(readable, scores, strict=True))
        out = []
        for i, (task, request) in enumerate(zip(tasks, requests, strict=True)):
            status, reward = read[i][0], rewards.get(i, NO_REWARD)
            if reward.parts.get("environment_error"):
                status = RolloutStatus.ENVIRONMENT_ERROR
            out.append(self.rollout(task, request, status, reward))
        return out

    def read(self, task: Task, request: Request) -> tuple[RolloutStatus, dict | None]:
        """How a finished request ended, and the message that it wrote, where that can be read."""
        if request.finish_reason != "stop":
            return (
                RolloutStatus.TRUNCATED
                if request.finish_reason == "length"
                else RolloutStatus.ABORTED
            ), None
        try:
            return RolloutStatus.COMPLETED, chat_output.parse_tokens(
                self.tokenizer, request.tokens, task.tools or None
            )
        except chat_output.MalformedOutput:
            return RolloutStatus.FORMAT_ERROR, None

    def rollout(
        self, task: Task, request: Request, status: RolloutStatus, reward: Reward
    ) -> Rollout:
        given, experts = len(request.prompt), request.experts
        if experts is not None:
            experts = experts[:, : self.engine.model_config.num_moe_layers]
        return Rollout(
            task=task, tokens=request.sequence, mask=[False] * given + [True] * len(request.tokens),
            logprobs=[0.0] * given + request.logprobs, versions=[-1] * given + request.versions,
            status=status, reward=reward,
            experts=experts,
        )  # fmt: skip


@dataclasses.dataclass
class Collected:
    """groups: to train on. all_groups: everything that was drawn for the step. counts: what became
    of the groups.
    """

    groups: list[Group]
    all_groups: list[Group]
    counts: dict[str, int]


class Collector:
    """Collects a step's groups. State: how many tasks were drawn so far, and the groups that wait
    in the buffer.
    """

    def __init__(self, roller: Roller, config: RolloutConfig, max_staleness: int):
        self.roller, self.config, self.max_staleness = roller, config, max_staleness
        self.num_drawn = 0  # tasks
        self.buffer: list[Group] = []

    def collect(
        self, take: Callable[[int], list[Task]], draw: Draw, version: int, progress=lambda _: None
    ) -> Collected:
        """take(count): the next tasks. version: of the weights that will be trained, which the
        engine has.

        Groups from the buffer come first; those too old are dropped. Then waves of new ones until
        there are enough that have variance. Whole waves are waited for: taking what ends first
        would prefer short answers. Raises RuntimeError where a rollout's version is not as old as
        it may be.
        """
        config, counts = self.config, collections.Counter()
        fresh = [
            g
            for g in self.buffer
            if version - min(r.oldest for r in g.rollouts) <= self.max_staleness
        ]
        counts["groups_stale"] = len(self.buffer) - len(fresh)
        counts["groups_from_buffer"] = len(fresh)
        chosen, drawn, self.buffer = fresh, [], []
        for _ in range(config.max_waves):
            wanted = config.prompts_per_step - len(chosen)
            if wanted <= 0:
                break
            tasks = take(math.ceil(wanted * config.over_sampling))
            wave = self.roller.roll(tasks, draw, self.num_drawn, progress)
            self.num_drawn += len(tasks)
            drawn += wave
            for group in wave:
                counts[f"groups_{verdict(group)}"] += 1
            chosen += [g for g in wave if g.has_variance or not config.dynamic_sampling]
            counts["waves"] += 1
        chosen, left = chosen[: config.prompts_per_step], chosen[config.prompts_per_step :]
        if self.max_staleness:
            self.buffer, counts["groups_buffered"] = left, len(left)
        else:
            counts["groups_surplus"] = len(left)
        check_versions(chosen, version, self.max_staleness)
        return Collected(chosen, drawn, dict(counts))


def verdict(group: Group) -> str:
    """`mixed` teaches; all `solved` alike or all `unsolved` alike do not; `failed`: fewer than two
    rollouts that count.
    """
    rewards = [r.reward.value for r in group.learnable]
    if len(rewards) < 2:
        return "failed"
    if group.has_variance:
        return "mixed"
    return "solved" if rewards[0] > 0 else "unsolved"


def check_versions(groups: Sequence[Group], version: int, max_staleness: int):
    """Raises RuntimeError where a drawn token is older than max_staleness updates, or newer than
    the weights.
    """
    for group in groups:
        for rollout in group.rollouts:
            for drawn, mine in zip(rollout.mask, rollout.versions, strict=True):
                if drawn and not 0 <= version - mine <= max_staleness:
                    raise RuntimeError(
                        f"task {rollout.task.id!r}: a token of version {mine} to train version"
                        f" {version}, max_staleness={max_staleness}"
                    )
