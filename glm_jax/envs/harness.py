"""The calls of agents that others wrote: from the server's thread, where each session has an
address, to the rollout worker's, which has the engine.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import queue
import threading
from collections.abc import Mapping, Sequence

from data.tokenizer import Tokenizer
from glm_jax.envs.episode import Episode
from glm_jax.infer.request import Request
from glm_jax.serve.protocol import ApiError, ChatRequest
from glm_jax.serve.recorder import Node, Session
from glm_jax.serve.sessions import SessionServer

MODEL_NAME = "policy"


@dataclasses.dataclass(eq=False)
class Call:
    """Of the model, by a harness. future: gets the finished request, or the error that the harness
    is answered. node: of its history, once it is known.
    """

    episode: Episode
    messages: Sequence[Mapping]
    tools: Sequence[Mapping]
    max_tokens: int | None
    future: concurrent.futures.Future[Request]
    node: Node | None = None

    def refuse(self, problem: str, status: int = 400):
        self.future.set_exception(ApiError(status, problem))

    def refuse_ended(self):
        assert self.episode.status is not None
        # No status that clients take as a reason to try again.
        self.refuse(f"the episode has ended: {self.episode.status.value}", 403)


class HarnessCalls:
    """`open` and `close` sessions, `take` the calls that have come. Belongs to the worker's thread,
    but for _submit. The server starts with the first session.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._server: SessionServer | None = None
        self._episodes: dict[str, Episode] = {}
        self._arrived: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over `arrival`
        self._answered: dict[int, Call] = {}  # by the id of the request that answers it
        # Done where a call has come.
        self.arrival: concurrent.futures.Future[None] = concurrent.futures.Future()

    def open(self, episode: Episode) -> tuple[Session, str]:
        """A session for the episode, and its address."""
        if self._server is None:
            self._server = SessionServer(self._tokenizer, MODEL_NAME, self._submit)
        name, address = self._server.new_session()
        self._episodes[name] = episode
        return Session(self._tokenizer), address

    def close(self, episode: Episode):
        """Refuses the episode's calls from now on, those that wait for an answer included."""
        self._episodes = {name: e for name, e in self._episodes.items() if e is not episode}
        for number, call in list(self._answered.items()):
            if call.episode is episode:
                del self._answered[number]
                call.refuse_ended()

    def take(self) -> list[Call]:
        """The calls that have come since, those aside that nobody waits for any more."""
        with self._lock:
            if self.arrival.done():
                self.arrival = concurrent.futures.Future()
        found = []
        while not self._arrived.empty():
            call = self._arrived.get()
            if not call.future.set_running_or_notify_cancel():
                continue  # the client has gone
            if call.episode.status is not None:
                call.refuse_ended()
            else:
                found.append(call)
        return found

    def begin(self, call: Call, request: Request):
        self._answered[request.id] = call

    def pop(self, request: Request) -> Call:
        return self._answered.pop(request.id)

    def is_waiting(self, episode: Episode) -> bool:
        """A call of the episode is in the engine."""
        return any(call.episode is episode for call in self._answered.values())

    def _submit(self, session: str, body: ChatRequest) -> concurrent.futures.Future[Request]:
        episode = self._episodes.get(session)
        if episode is None:
            raise ApiError(404, f"session {session!r:.100} is unknown, or has ended")
        length = body.asked_length()[1]
        call = Call(episode, body.messages, body.offered_tools, length, concurrent.futures.Future())
        with self._lock:
            self._arrived.put(call)
            if not self.arrival.done():
                self.arrival.set_result(None)
        return call.future
