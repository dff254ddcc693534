"""Episodes on an engine: when a request of the engine ends, its episode goes on, whatever the
others do. Tokens are the truth: an episode's next prompt is its own tokens and what was added.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data import chat_output, chat_template
from data.tokenizer import Tokenizer
from glm_jax.envs.environment import NO_REWARD, Harness, Start, Step, answer_of
from glm_jax.envs.episode import Episode, SamplingSpec
from glm_jax.envs.harness import Call, HarnessCalls
from glm_jax.envs.registry import made_for
from glm_jax.infer.engine import Engine
from glm_jax.infer.request import Request
from glm_jax.infer.sampling import SamplingParams
from glm_jax.rewards import verifiers
from glm_jax.rollouts.rollout import Group, RolloutStatus
from glm_jax.rollouts.task import Reward, Task

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 16  # more than text has, as JSON


def prompt_of(tokenizer: Tokenizer, task: Task, *, thinking: bool) -> list[int]:
    """Token ids of a task's messages, up to where the model goes on."""
    return chat_template.encode(tokenizer, task.messages, task.tools, thinking=thinking)


class RolloutWorker:
    """Turns tasks into groups of judged rollouts, by events: `begin` and `cancel` groups at any
    time, call `advance` for what has ended; or wait for all `rollouts` of some tasks, which counts
    the seconds of `generate`, and of `score` after it, in `seconds`. Verifiers judge in a thread
    beside the engine. Not thread-safe.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
        self.stops = {tokenizer.special(name): name for name in chat_template.STOP_TOKENS}
        self.stop_tokens = tuple(self.stops)
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._groups: dict[int, list[Episode]] = {}  # that have not ended, by number
        self._running: dict[int, tuple[Request, Episode]] = {}  # by the id of the request
        # What environments are asked, with what goes on when they answer.
        self._waiting: dict[concurrent.futures.Future, tuple[Episode, Callable]] = {}
        self._calls = HarnessCalls(tokenizer)
        self._judge = concurrent.futures.ThreadPoolExecutor(1, "judge")
        self._judged: dict[concurrent.futures.Future, int] = {}  # the groups being judged
        self._finished: list[tuple[int, Group]] = []

    @property
    def idle(self) -> bool:
        """No group is under way and none is left to fetch."""
        return not self._groups and not self._finished

    def begin(self, number: int, task: Task, spec: SamplingSpec):
        """Starts a group of rollouts. number: of the task among all that the run has sampled; with
        the run's seed it decides every rollout. Raises ValueError for the number of a group that is
        under way.
        """
        if number in self._groups:
            raise ValueError(f"group {number} is under way")
        seeds = np.random.SeedSequence([spec.seed, number]).generate_state(spec.group_size)
        group = [Episode(task, spec, int(seed), made_for(task)) for seed in seeds]
        self._groups[number] = group
        self._begin(task, group)

    def cancel(self, number: int):
        """Drops a group, with all that it waits for; nothing happens where it has ended."""
        group = self._groups.pop(number, [])
        for episode in group:
            if episode.status is None:
                self._end(episode, RolloutStatus.ABORTED)
        self._drop(group)
        self._judged = {f: judged for f, judged in self._judged.items() if judged != number}

    def advance(self, timeout: float = 0.05) -> list[tuple[int, Group]]:
        """One step of the engine, and of every environment that has answered. Returns the groups
        that have ended, judged, with their numbers. timeout: seconds to wait for an answer where
        the engine has nothing to do.
        """
        for call in self._calls.take():
            self._called(call)
        if not self.engine.idle:
            self.engine.step()
        # Those that were cancelled are none of the step's.
        for request, episode in [r for r in self._running.values() if r[0].status == "finished"]:
            if self._running.pop(request.id, None):  # else its episode has just been dropped
                self._ended(episode, request)
        waits = self.engine.idle and self._waiting
        self._environments(timeout if waits else 0.0)
        judged = set(self._judged.values())
        for number, group in self._groups.items():
            if number not in judged and all(episode.status is not None for episode in group):
                self._judged[self._judge.submit(self.judge, group)] = number
        if self.engine.idle and not self._waiting:
            concurrent.futures.wait(
                self._judged, timeout, return_when=concurrent.futures.FIRST_COMPLETED
            )
        for future in [future for future in self._judged if future.done()]:
            future.result()  # raises what the verifier has raised
            number = self._judged.pop(future)
            group = self._groups.pop(number)
            rollouts = [rollout for i, e in enumerate(group) for rollout in e.rollouts(i)]
            self._finished.append((number, Group(group[0].task, rollouts)))
        finished, self._finished = self._finished, []
        return finished

    def rollouts(
        self,
        tasks: Sequence[Task],
        spec: SamplingSpec,
        first: int,
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[Group]:
        """A group for each task, in order. first: number of the first of them among all that the
        run has sampled. progress: told how many rollouts have ended.
        """
        started = generated = time.perf_counter()
        numbers = range(first, first + len(tasks))
        for number, task in zip(numbers, tasks, strict=True):
            self.begin(number, task, spec)
        episodes = [episode for number in numbers for episode in self._groups[number]]
        found, others, left = {}, [], len(episodes)
        while len(found) < len(numbers):
            for number, group in self.advance():
                if number in numbers:
                    found[number] = group
                else:
                    others.append((number, group))
            before, left = left, sum(episode.status is None for episode in episodes)
            progress(before - left)
            if left:
                generated = time.perf_counter()
        self._finished += others
        self.seconds["generate"] += generated - started
        self.seconds["score"] += time.perf_counter() - generated
        return [found[number] for number in numbers]

    def judge(self, episodes: Sequence[Episode]):
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

    def _begin(self, task: Task, group: Sequence[Episode]):
        prompt = None
        for episode in group:
            if isinstance(episode.environment, Harness):
                episode.session, address = self._calls.open(episode)
                run = episode.environment.run
                self._ask(episode, self._harness_ended, run, task, address, episode.seed)
                continue
            if episode.environment is not None:
                reset = episode.environment.reset
                self._ask(episode, self._started, reset, task, episode.seed)
                continue
            prompt = prompt or prompt_of(self.tokenizer, task, thinking=episode.spec.thinking)
            episode.tools = task.tools
            episode.give(prompt)
            self._sample(episode)

    def _started(self, episode: Episode, start: Start):
        self._check_size(start.messages)
        episode.tools = tuple(start.tools)
        thinking = episode.spec.thinking
        episode.give(
            chat_template.encode(self.tokenizer, start.messages, episode.tools, thinking=thinking)
        )
        if len(episode.tokens) >= (context := self.engine.config.context):
            raise ValueError(f"it begins with {len(episode.tokens)} tokens; {context=}")
        self._sample(episode)

    def _sample(self, episode: Episode):
        """The model's next turn, as far as the episode's tokens and the context reach."""
        left = episode.spec.max_new_tokens - sum(episode.mask)
        if episode.environment is not None:
            left = min(left, self.engine.config.context - len(episode.tokens))
        if left <= 0:
            self._end(episode, RolloutStatus.TRUNCATED)
            return
        request = self.engine.submit(list(episode.tokens), self._sampling(episode, left))
        self._running[request.id] = request, episode

    def _sampling(self, episode: Episode, max_new_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens, temperature=episode.spec.temperature, seed=episode.seed,
            sample_index=episode.turns, stop_tokens=self.stop_tokens,
            logprob_temperature=episode.spec.temperature or 1.0,
        )  # fmt: skip

    def _called(self, call: Call):
        """A harness asks for the model's next turn."""
        episode, session = call.episode, call.episode.session
        assert session is not None, "a harness has one"
        spec, context = episode.spec, self.engine.config.context
        if episode.turns >= spec.max_turns:
            return self._refuse(call, RolloutStatus.MAX_TURNS)
        try:
            self._check_size(call.messages)
            call.node, tokens = session.ask(call.messages, call.tools, thinking=spec.thinking)
        except ValueError as error:
            return call.refuse(str(error))
        room = context - len(tokens)
        left = min(spec.max_new_tokens - session.num_sampled, room, call.max_tokens or room)
        if left <= 0:
            # A first call that does not fit is none of the model's doing.
            status = RolloutStatus.TRUNCATED if episode.turns else RolloutStatus.ENVIRONMENT_ERROR
            return self._refuse(call, status)
        request = self.engine.submit(tokens, self._sampling(episode, left))
        self._running[request.id] = request, episode
        self._calls.begin(call, request)
        episode.turns += 1
        episode.deadline = math.inf  # while the model writes

    def _turn_ended(self, episode: Episode, request: Request):
        """The model has written a turn for a harness."""
        call = self._calls.pop(request)
        assert episode.session is not None and call.node is not None
        status, message = self.read(call.tools, request)
        if message is not None and len(message.get("tool_calls", ())) > episode.spec.max_calls:
            status, message = RolloutStatus.TOO_MANY_CALLS, None
        layers = self.engine.model_config.num_moe_layers
        episode.session.add(call.node, request, message, layers)
        if status is not RolloutStatus.COMPLETED:
            return self._refuse(call, status)
        call.future.set_result(request)
        if not self._calls.is_waiting(episode):
            episode.deadline = time.monotonic() + episode.spec.step_seconds

    def _refuse(self, call: Call, status: RolloutStatus):
        """Ends a harness's episode at a call of the model."""
        self._end(call.episode, status)
        call.refuse_ended()

    def _harness_ended(self, episode: Episode, reward: Reward):
        episode.earn(reward)
        self._end(episode, RolloutStatus.COMPLETED)

    def _ended(self, episode: Episode, request: Request):
        if episode.session is not None:
            return self._turn_ended(episode, request)
        episode.take(request, self.engine.model_config.num_moe_layers)
        status, message = self.read(episode.tools, request)
        if episode.environment is None or status is not RolloutStatus.COMPLETED:
            self._end(episode, status)
            episode.message = message if episode.environment is None else None
        elif message is not None and len(message.get("tool_calls", ())) > episode.spec.max_calls:
            self._end(episode, RolloutStatus.TOO_MANY_CALLS)
        else:
            assert not isinstance(episode.environment, Harness), "it has a session"
            self._ask(episode, self._answered, episode.environment.step, message)

    def _answered(self, episode: Episode, step: Step):
        self._check_size(step.messages)
        episode.earn(step.reward)
        if step.done:
            self._end(episode, RolloutStatus.COMPLETED)
        elif episode.turns >= episode.spec.max_turns:
            self._end(episode, RolloutStatus.MAX_TURNS)
        else:
            stop, thinking = self.stops[episode.tokens[-1]], episode.spec.thinking
            episode.give(
                chat_template.encode_reply(self.tokenizer, step.messages, stop, thinking=thinking)
            )
            self._sample(episode)

    def _check_size(self, messages: Sequence[Mapping]):
        """Raises ValueError for more text than the context could hold, before the engine's thread
        spends its time on tokenizing it; and for messages that are not JSON.
        """
        context = self.engine.config.context
        characters, most = len(json.dumps(list(messages))), CHARACTERS_PER_TOKEN * context
        if characters > most:
            raise ValueError(
                f"it answers with {characters} characters; {context=} holds at most {most}"
            )

    def _end(self, episode: Episode, status: RolloutStatus):
        episode.status = status
        if not status.keeps_reward:
            episode.reward = NO_REWARD
        if episode.session is not None:
            self._calls.close(episode)
            self._drop([episode])
        if close := getattr(episode.environment, "close", None):
            threading.Thread(target=_closed, args=(episode.task.id, close), daemon=True).start()

    def _drop(self, episodes: Sequence[Episode]):
        """Takes back what episodes that have ended have in the engine or wait for."""
        ended = set(map(id, episodes))
        for request, episode in list(self._running.values()):
            if id(episode) in ended:
                del self._running[request.id]
                if request.status != "finished":
                    self.engine.abort(request)
        waiting = self._waiting.items()
        self._waiting = {f: entry for f, entry in waiting if id(entry[0]) not in ended}

    def _ask(self, episode: Episode, then: Callable, function: Callable, *args):
        future = concurrent.futures.Future()
        # A daemon: an environment that never answers must not keep the process from its end.
        threading.Thread(target=_finish, args=(future, function, *args), daemon=True).start()
        self._waiting[future] = episode, then
        episode.deadline = time.monotonic() + episode.spec.step_seconds

    def _environments(self, timeout: float):
        """Goes on with the episodes whose environments have answered, and ends those whose have
        failed or take too long.
        """
        if not self._waiting:
            return
        waited_for = [*self._waiting, self._calls.arrival]
        concurrent.futures.wait(waited_for, timeout, return_when=concurrent.futures.FIRST_COMPLETED)
        now = time.monotonic()
        for future, (episode, then) in list(self._waiting.items()):
            if episode.status is not None:
                continue  # ended by another that this loop has looked at
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
                    self._end(episode, RolloutStatus.ENVIRONMENT_ERROR)
            elif now > episode.deadline:
                del self._waiting[future]
                self._end(episode, RolloutStatus.TIMEOUT)


def _finish(future: concurrent.futures.Future, function: Callable, *args):
    try:
        future.set_result(answer_of(function, *args))
    except BaseException as error:  # handed on to whoever asks the future
        future.set_exception(error)


def _closed(task: str, close: Callable):
    try:
        answer_of(close)
    except Exception as error:  # the episode has ended, whatever its environment has left
        logger.warning("task %r: its environment cannot be closed", task, exc_info=error)
