"""Connections of the server: deadlines for those that say nothing, a limit on their number, and
clients that only stopped sending.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import resource
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

# descriptors of the process that are no connections: weights, logs, the event loop
RESERVED_FILES = 64
BACKLOG = 2048  # connections that the kernel holds until they are accepted
PROBE_SECONDS = (0.05, 0.3, 1.0, 5.0)  # after a client stopped sending; the last again and again
PROBE = b"HTTP/1.1 102 Processing\r\n\r\n"
# in the scope of a request whose answer is a stream: bytes that may stand anywhere in it and mean
# nothing
COMMENT = "glm_jax.comment"


def connection_limits() -> tuple[int, int]:
    """(most open connections, backlog) that the process's limit of open files allows. An accept
    loop takes a backlog at a time.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    backlog = max(8, min(BACKLOG, files // 8))
    return max(8, files - RESERVED_FILES - backlog), backlog


class Connections:
    """All that are open, and the rules for them. The oldest silent one makes room where there are
    too many.
    """

    def __init__(self, most: int, head_seconds: float):
        """most: open connections. head_seconds: for a request's head, from its first byte or the
        connection's begin to its end.
        """
        self.most, self.head_seconds = most, head_seconds
        self.silent: collections.OrderedDict[Connection, None] = collections.OrderedDict()
        self.num_open = 0

    def make_room(self) -> bool:
        """Whether one more may stay; closes the one that has been silent for the longest where it
        must.
        """
        if self.num_open <= self.most:
            return True
        for connection in self.silent:
            connection.transport.abort()
            self.silent.pop(connection)
            return True
        return False

    def protocol(self, *args, **kwargs) -> Connection:
        return Connection(self, *args, **kwargs)


class Connection(H11Protocol):
    """uvicorn's, under the rules of Connections."""

    def __init__(self, connections: Connections, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._all, self._deadline, self._probe = connections, None, None

    def connection_made(self, transport: asyncio.Transport):
        super().connection_made(transport)
        self._all.num_open += 1
        if not self._all.make_room():
            logger.warning(
                "%d connections are open, all with requests in work: a new one is closed",
                self._all.num_open,
            )
            transport.abort()
            return
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None):
        self._all.num_open -= 1
        self._stop_waiting()
        self._stop_probing()
        super().connection_lost(exc)

    def data_received(self, data: bytes):
        super().data_received(data)
        if self._in_work:
            self._stop_waiting()
        elif self._deadline is None and not self.transport.is_closing():
            self._wait_for_head()

    def on_response_complete(self):
        self._stop_probing()
        super().on_response_complete()
        if not self._in_work:
            self._all.silent[self] = None  # until keep-alive ends, or data of the next request come
            if self.conn.trailing_data[0]:
                self._wait_for_head()
            if self._eof and not self.transport.is_closing():
                self.transport.close()

    # asyncio reads what it returns, though its base class here says None
    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The client sends no more. It may still read, as `nc -N` does, or be gone, which only
        writing to it tells.
        """
        self._eof = True
        if not self._in_work:
            return False
        self._schedule_probe(0)
        return True

    _eof = False

    @property
    def _in_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_head(self):
        self._stop_waiting()
        self._all.silent[self] = None
        self._deadline = self.loop.call_later(self._all.head_seconds, self.transport.abort)

    def _stop_waiting(self):
        self._all.silent.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _schedule_probe(self, number: int):
        seconds = PROBE_SECONDS[min(number, len(PROBE_SECONDS) - 1)]
        self._probe = self.loop.call_later(seconds, self._send_probe, number)

    def _send_probe(self, number: int):
        """Something that means nothing: a client that is gone answers it with a reset, and the next
        one then fails.
        """
        if not self._in_work or self.transport.is_closing():
            return
        # which knows no interim responses
        if self.conn.our_state is h11.SEND_RESPONSE and self.scope["http_version"] != "1.0":
            self.transport.write(PROBE)
        elif self.conn.our_state is h11.SEND_BODY and COMMENT in self.scope:
            self.transport.write(self.conn.send(h11.Data(data=self.scope[COMMENT])))
        self._schedule_probe(number + 1)

    def _stop_probing(self):
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None


class OnceAMinute(logging.Filter):
    """Lets a message through once a minute, however many clients cause it."""

    def __init__(self):
        super().__init__()
        self._last: dict[tuple, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, record.msg, record.exc_info and record.exc_info[0])
        now = time.monotonic()
        if now - self._last.get(key, -60.0) < 60:
            return False
        self._last[key] = now
        return True


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict):
    """asyncio reports each accept that fails with a traceback, and tries 'backlog' of them at a
    time.
    """
    if "socket.accept()" in context.get("message", ""):
        logger.warning("no more connections can be accepted: %s", context.get("exception"))
    else:
        loop.default_exception_handler(context)
