"""What stands in front of the server's application: who may ask, and how many at a time."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm_jax.serve.protocol import ApiError


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """What the server asks of requests."""

    model_name: str
    api_key: str | None  # that /v1 asks for as `Authorization: Bearer`; None: it asks for none
    max_new_tokens: int  # most that a request may ask for; the context limits it, too
    max_body_bytes: int
    max_requests: int  # in work at a time, whatever they ask for; more get 503
    # of web pages that may use the server, as http://localhost:3000; '*': of all
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("max_new_tokens", "max_body_bytes", "max_requests"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.api_key is not None and (
            not self.api_key or not self.api_key.isascii() or self.api_key != self.api_key.strip()
        ):
            raise ValueError("api_key must be ASCII without white space around it, and not empty")


class Guard:
    """Turns web pages away from a server that asks for no key: only its own machine's programs may
    use it then.

    A page cannot hide its Origin; and one whose host name now stands for this machine (DNS
    rebinding) shows that name as Host.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig):
        self._app, self._config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        refusal = (
            self._refusal(scope)
            if scope["type"] == "http" and self._config.api_key is None
            else None
        )
        if refusal is None:
            return await self._app(scope, receive, send)
        await JSONResponse(ApiError(403, refusal).body, 403)(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        origin = headers.get("origin")
        allowed = self._config.cors_origins
        local_host = (scope.get("server") or ("",))[0]
        if (
            _is_loopback(local_host)
            and host
            and not _is_loopback(_host_name(host))
            and scope["path"] != "/health"
        ):
            return (
                f"Host {host!r:.100} is none of this machine's own names, and the server asks for"
                " no key: use localhost, or set a key"
            )
        if (
            origin is not None
            and "*" not in allowed
            and origin not in allowed
            and origin.partition("://")[2] != host
        ):
            return (
                f"Origin {origin!r:.100} is not allowed; allowed:"
                f" {', '.join(allowed) or 'none, see --cors_origins'}"
            )
        return None


def _host_name(host: str) -> str:
    """Without the port; IPv6 addresses stand in brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower().rstrip(".") == "localhost" or name.lower().endswith(".localhost")


class Gate:
    """In front of the application: turns requests away while too many are in work, and counts every
    answer.
    """

    def __init__(
        self, app: ASGIApp, max_requests: int, paths: list[str], count: Callable[[str, int], None]
    ):
        self._app, self._room, self._paths, self._count = app, max_requests, paths, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        # names of models are not told apart
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Message):
            if message["type"] == "http.response.start":
                self._count(path, message["status"])
            await send(message)

        if self._room == 0 and path != "/health":
            error = ApiError(503, "too many requests at a time, try again later", retry=True)
            return await JSONResponse(error.body, 503, error.headers)(scope, receive, counting)
        self._room -= 1
        try:
            await self._app(scope, receive, counting)
        finally:
            self._room += 1
