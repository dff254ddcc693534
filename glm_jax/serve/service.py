"""The engine on a thread of its own: requests from an event loop in, tokens and text out as they
are sampled.

One daemon thread owns the engine, which is not thread-safe, and does everything with it between two
of its steps: what other threads want of it comes as commands through a queue.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence

from glm_jax.infer.engine import Engine
from glm_jax.infer.request import Request
from glm_jax.infer.sampling import SamplingParams
from glm_jax.serve.text_stream import TextStream, Token


class QueueFull(RuntimeError):
    """More requests than the service takes at a time; later there may be room."""


class ServiceDown(RuntimeError):
    """The service takes no requests, or gave this one up: it is shutting down, or its engine
    failed.
    """


class TimedOut(RuntimeError):
    """The request took longer than the service allows."""


@dataclasses.dataclass(frozen=True)
class ServiceConfig:
    """What the service takes on."""

    queue_limit: int  # requests that wait while the batch is full
    request_seconds: float  # a request may take, waiting included

    def __post_init__(self):
        if self.queue_limit < 0 or not self.request_seconds > 0:
            raise ValueError(
                f"queue_limit={self.queue_limit} must be at least 0,"
                f" request_seconds={self.request_seconds} above 0"
            )


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a prompt's tokens, each given those before it (None for the first): log-probabilities, and
    the most likely tokens with theirs, best first.
    """

    logprobs: list[float | None]
    top_logprobs: list[list[tuple[int, float]] | None]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What came of one sample since its last piece."""

    index: int  # of the sample in its submission
    tokens: list[Token]  # without the stop token, and without what belongs to a stop string
    num_sampled: int  # tokens sampled, those included
    # stop, length or (a constraint that could not go on) abort in the last piece
    finish_reason: str | None
    # where requested, of each of `tokens`
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt: Scores | None = None  # in the first piece, where requested


@dataclasses.dataclass(frozen=True)
class Status:
    """The engine after its latest step, and totals since the service began."""

    waiting: int = 0
    running: int = 0
    free_pages: int = 0
    weights_version: int = 0
    prompt_tokens: int = 0
    sampled_tokens: int = 0
    passes: int = 0  # of the trunk in which tokens were sampled, prefill aside
    accepted_drafts: int = 0
    finished: tuple[tuple[str, int], ...] = ()  # requests by what ended them: stop, length, abort


@dataclasses.dataclass(frozen=True)
class _Sampled:
    """From the engine's thread to a stream: what one sample drew."""

    index: int
    ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    num_sampled: int
    finish_reason: str | None
    prompt: Scores | None


class Stream:
    """The samples of one submission, piece by piece in the order in which they come, for one task
    of one event loop.

    Iterating raises TimedOut, ServiceDown, or ValueError for what the engine refuses. Who stops
    before the end closes it.
    """

    def __init__(self, service: Service, params: Sequence[SamplingParams], seconds: float):
        self.num_samples = len(params)
        self.first_token_seconds: float | None = None  # from submission to the first token
        self.closed = False
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + seconds
        self._submitted = time.monotonic()
        self._seconds = seconds
        self._events: asyncio.Queue[_Sampled | Exception] = asyncio.Queue()
        self._texts = [TextStream(service.decode_text, p.stop_strings) for p in params]
        self._tops = [collections.deque() for _ in params]  # of the tokens that the texts hold back
        self._open = set(range(len(params)))

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        while self._open:
            event = await self._next_event()
            if isinstance(event, Exception):
                self.close()
                raise event
            if event.index in self._open:
                return self._piece(event)
        raise StopAsyncIteration

    def close(self):
        """Gives up what is not finished: its rows and pages are free after the engine's current
        step.
        """
        if not self.closed:
            self.closed = True
            self._open.clear()
            self._service.give_up(self)

    def post(self, event: _Sampled | Exception):
        """From the engine's thread. Raises RuntimeError where the event loop is closed."""
        if isinstance(event, _Sampled) and event.num_sampled and self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self._submitted
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _next_event(self) -> _Sampled | Exception:
        try:
            async with asyncio.timeout_at(self._deadline):
                if self._loop.time() >= self._deadline:
                    raise TimeoutError  # also where events come so fast that nobody ever waits
                return await self._events.get()
        except TimeoutError:
            return TimedOut(f"the request took longer than {self._seconds:g} s")

    def _piece(self, event: _Sampled) -> Piece:
        text, tokens, reason = self._texts[event.index], [], event.finish_reason
        self._tops[event.index].extend(event.top_logprobs)
        for token, logprob in zip(event.ids, event.logprobs, strict=True):
            tokens += text.push(token, logprob)
        if reason:
            tokens += text.finish()
        if text.stopped:
            reason = "stop"
        if reason:
            self._open.discard(event.index)
            if not self._open:
                self.close()
        tops = self._tops[event.index]
        return Piece(
            event.index,
            tokens,
            event.num_sampled,
            reason,
            [tops.popleft() for _ in tokens if tops],
            event.prompt,
        )


@dataclasses.dataclass(eq=False)
class _Job:
    """A stream's requests in the engine, by sample: those unfinished, and how many of their tokens
    the stream has got.
    """

    stream: Stream
    requests: dict[int, Request]
    sent: collections.Counter


class Service:
    """Takes requests from event loops and feeds them to the engine. Starts its thread at once;
    `shut_down` ends it.
    """

    def __init__(self, engine: Engine, config: ServiceConfig):
        """engine: with decode_text. From here on nobody else may touch it. Raises ValueError."""
        if engine.decode_text is None:
            raise ValueError("a service needs an engine with decode_text")
        self.decode_text: Callable[[Sequence[int]], str] = engine.decode_text
        self.context, self.vocab_size = engine.config.context, engine.model_config.vocab_size
        self.capacity = engine.config.num_rows + config.queue_limit  # samples in batch and queue
        self.status = Status(free_pages=engine.num_free_pages)
        self._engine, self._config = engine, config
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over the four below
        self._streams: set[Stream] = set()  # not all of whose samples have left the engine
        self._swaps: set[concurrent.futures.Future] = set()
        self._num_samples = 0
        self._refusal: str | None = None  # why no more requests are taken
        self._jobs: dict[Stream, _Job] = {}  # the engine's thread alone reads and writes these
        self._totals: collections.Counter = collections.Counter()
        self._finished: collections.Counter = collections.Counter()
        self._last_steps = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- for other threads ---

    @property
    def refusal(self) -> str | None:
        """Why no more requests are taken; None where they are."""
        return self._refusal

    def submit(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> Stream:
        """Queues samples, each a prompt and how to continue it, all or none. Called on the event
        loop that will read the stream.

        Raises QueueFull or ServiceDown.
        """
        stream = Stream(self, [params for _, params in requests], self._config.request_seconds)
        with self._lock:
            if self._refusal:
                raise ServiceDown(self._refusal)
            if self._num_samples + len(requests) > self.capacity:
                raise QueueFull(
                    f"{self._num_samples} requests are waiting or running; {self.capacity} is the"
                    " limit, try again later"
                )
            self._num_samples += len(requests)
            self._streams.add(stream)
            self._commands.put(functools.partial(self._admit, stream, list(requests)))
        return stream

    def give_up(self, stream: Stream):
        """Aborts what the engine still has of a closed stream."""
        if stream in self._streams:
            self._commands.put(functools.partial(self._abort, stream))

    def set_weights(self, state, *, recompute: bool) -> concurrent.futures.Future:
        """Engine.set_weights between two steps. The future has the new version, or the engine's
        ValueError, or ServiceDown.
        """
        future = concurrent.futures.Future()
        with self._lock:
            if self._refusal:
                raise ServiceDown(self._refusal)
            self._swaps.add(future)
            self._commands.put(functools.partial(self._swap, state, recompute, future))
        return future

    def shut_down(self, seconds: float):
        """Takes no more requests, ends those it has, those that are unfinished after `seconds` by
        force. Blocks until all is done.
        """
        with self._lock:
            self._refusal = self._refusal or "the server is shutting down"
        self._commands.put(self._finish_up)
        self._thread.join(seconds)
        self._commands.put(self._abort_all)
        self._thread.join()

    # --- the engine's thread ---

    def _run(self):
        try:
            while not (self._last_steps and not self._jobs):
                self._obey()
                if not self._engine.idle:
                    self._engine.step()
                self._deliver()
        finally:  # with or without an error, which threading reports
            self._leave_nobody_waiting()

    def _obey(self):
        """Runs the commands that have come; where the engine has nothing to do, waits for one."""
        if self._engine.idle:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _admit(self, stream: Stream, requests: list[tuple[Sequence[int], SamplingParams]]):
        if stream.closed:
            return self._forget(stream)
        job = _Job(stream, {}, collections.Counter())
        self._jobs[stream] = job
        for index, (prompt, params) in enumerate(requests):
            try:
                job.requests[index] = self._engine.submit(prompt, params)
            except ValueError as error:
                self._abort(stream)
                return self._post(stream, error)
            self._totals["prompt_tokens"] += len(prompt)

    def _abort(self, stream: Stream):
        job = self._jobs.pop(stream, None)
        if job is not None:
            for index, request in job.requests.items():
                self._engine.abort(request)
                self._count(request, len(request.tokens) - job.sent[index])
        self._forget(stream)

    def _swap(self, state, recompute: bool, future: concurrent.futures.Future):
        try:
            self._engine.set_weights(state, recompute=recompute)
        except ValueError as error:
            future.set_exception(error)
        else:
            future.set_result(self._engine.version)
        with self._lock:
            self._swaps.discard(future)

    def _finish_up(self):
        self._last_steps = True

    def _abort_all(self):
        for stream in list(self._jobs):
            self._abort(stream)
            self._post(stream, ServiceDown("the server is shutting down"))

    def _deliver(self):
        """Posts what the last step drew, and takes stock."""
        for stream, job in list(self._jobs.items()):
            for index, request in list(job.requests.items()):
                done = request.status == "finished"
                num_sampled = len(request.tokens) - job.sent[index]
                if not (num_sampled or done):
                    continue
                shown = request.text_tokens
                start, end = job.sent[index], len(shown)
                scored = request.params.prompt_logprobs and start == 0
                sampled = _Sampled(
                    index, shown[start:], request.logprobs[start:end],
                    request.top_logprobs[start:end], num_sampled,
                    request.finish_reason,
                    Scores(request.prompt_logprobs,
                           request.prompt_top_logprobs) if scored else None,
                )  # fmt: skip
                job.sent[index] += num_sampled
                if done:
                    del job.requests[index]
                self._count(request, num_sampled)
                if not self._post(stream, sampled):
                    break
            if not job.requests:
                self._jobs.pop(stream, None)
                self._forget(stream)
        engine = self._engine
        self.status = Status(
            waiting=len(engine.waiting), running=len(engine.running),
            free_pages=engine.num_free_pages, weights_version=engine.version,
            finished=tuple(sorted(self._finished.items())), **self._totals,
        )  # fmt: skip

    def _count(self, request: Request, num_sampled: int):
        self._totals["sampled_tokens"] += num_sampled
        if request.status == "finished":
            self._totals.update(passes=request.passes, accepted_drafts=request.accepted)
            self._finished[request.finish_reason] += 1

    def _post(self, stream: Stream, event: _Sampled | Exception) -> bool:
        """False, and the stream is aborted, where its event loop is closed: nobody will read it or
        close it.
        """
        try:
            stream.post(event)
        except RuntimeError:
            self._abort(stream)
            return False
        return True

    def _forget(self, stream: Stream):
        """Its places are free."""
        with self._lock:
            if stream in self._streams:
                self._streams.discard(stream)
                self._num_samples -= stream.num_samples

    def _leave_nobody_waiting(self):
        with self._lock:
            self._refusal = self._refusal or "the engine failed; the server's log says why"
            streams, self._streams, self._num_samples = list(self._streams), set(), 0
            swaps, self._swaps = list(self._swaps), set()
        for stream in streams:
            self._post(stream, ServiceDown(self._refusal))
        for future in swaps:
            future.set_exception(ServiceDown(self._refusal))
