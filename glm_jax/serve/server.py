"""An HTTP server with OpenAI's API on a `Service`: chat and text completions, streamed or not,
models, health and metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from data import chat_messages, chat_output, chat_template
from data.tokenizer import Tokenizer
from glm_jax.serve.answers import Answer, ChatAnswer, CompletionAnswer
from glm_jax.serve.connections import (
    COMMENT,
    Connections,
    OnceAMinute,
    connection_limits,
    on_loop_error,
)
from glm_jax.serve.gates import Gate, Guard, ServerConfig
from glm_jax.serve.metrics import ServerMetrics
from glm_jax.serve.protocol import (
    AnyRequest,
    ApiError,
    ChatRequest,
    CompletionRequest,
    read_request,
)
from glm_jax.serve.service import Piece, QueueFull, Service, ServiceDown, Stream, TimedOut

HEAD_SECONDS = 15  # for a client to send a request's head
BODY_SECONDS = 60  # for a client to send its body
SEND_SECONDS = 60  # for a client to take what is sent to it
# for the answers to those whose requests did not end before the server shut down
FAREWELL_SECONDS = 5
CLIENT_GONE = 499  # in the metrics only; nobody is there to read it


def create_app(service: Service, tokenizer: Tokenizer, config: ServerConfig) -> ASGIApp:
    """The application. Raises ValueError for a tokenizer that is not the model's."""
    if tokenizer.vocab_size > service.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {service.vocab_size}"
        )
    api = _Api(service, tokenizer, config)
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
    ]
    handlers = {
        ApiError: api_error,
        HTTPException: _http_error,
        ClientDisconnect: _client_gone,
        Exception: _unexpected,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    gate = Gate(
        Guard(app, config), config.max_requests, [route.path for route in routes], api.count
    )
    if not config.cors_origins:
        return gate
    return CORSMiddleware(
        gate, allow_origins=config.cors_origins, allow_methods=("GET", "POST"), allow_headers=("*",)
    )


class _Api:
    """The endpoints."""

    def __init__(self, service: Service, tokenizer: Tokenizer, config: ServerConfig):
        self._service, self._tokenizer, self._config = service, tokenizer, config
        self._metrics = ServerMetrics(service)
        self._control = chat_output.control_tokens(tokenizer)
        self._stop_tokens = tuple(map(tokenizer.special, chat_template.STOP_TOKENS))

    def count(self, path: str, status: int):
        """A request has been answered."""
        self._metrics.requests.labels(path, str(status)).inc()

    async def health(self, request: Request) -> Response:
        refusal = self._service.refusal
        return JSONResponse({"status": refusal or "ok"}, 503 if refusal else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model)

    @property
    def _model(self) -> dict:
        return {
            "id": self._config.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "glm_jax",
            "context": self._service.context,
        }

    def _check_model(self, name: str):
        if name != self._config.model_name:
            message = f"model: {name!r:.100} is not served here; valid: {self._config.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def completions(self, request: Request) -> ASGIApp:
        body = await self._read(request, CompletionRequest)
        texts = [p for p in body.prompt if isinstance(p, str)]
        encoded = iter(await asyncio.to_thread(self._tokenizer.encode_batch, texts))
        start = self._tokenizer.start_ids
        prompts = [[*start, *next(encoded)] if isinstance(p, str) else p for p in body.prompt]
        for i, prompt in enumerate(prompts):
            wrong = next((t for t in prompt if not 0 <= t < self._service.vocab_size), None)
            if wrong is not None:
                raise ApiError(
                    400,
                    f"prompt: [{i}] holds token {wrong}; valid are"
                    f" 0..{self._service.vocab_size - 1}",
                    param="prompt",
                )
        echoed = [
            p[len(start) if isinstance(given, str) else 0 :]
            for p, given in zip(prompts, body.prompt, strict=True)
        ]
        answer = functools.partial(
            CompletionAnswer, logprobs=body.logprobs is not None, decode=self._tokenizer.decode,
            prompts_only=body.max_tokens == 0,
            echo=[prompt for prompt in echoed for _ in range(body.n)] if body.echo else None,
        )  # fmt: skip
        return await self._answer(request, body, "prompt", prompts, answer)

    async def chat(self, request: Request) -> ASGIApp:
        body = await self._read(request, ChatRequest)
        try:
            # The tools are checked even where tool_choice keeps them from the model.
            chat_messages.check_tools(body.tools)
            encode = (
                chat_template.encode_to_continue if body.continue_final_message else _encode_whole
            )
            prompt, begun = await asyncio.to_thread(
                encode, self._tokenizer, body.messages, body.offered_tools, thinking=body.thinks
            )
        except chat_messages.TemplateError as error:
            raise ApiError(400, str(error), param=error.field) from None
        answer = functools.partial(
            ChatAnswer, logprobs=body.logprobs, tools=body.offered_tools, control=self._control,
            tokenizer=self._tokenizer,
            parallel=body.parallel_tool_calls, begun=begun,
        )  # fmt: skip
        constraint = await asyncio.to_thread(body.constraint, self._tokenizer, begun)
        return await self._answer(request, body, "messages", [prompt], answer, constraint)

    def _check_key(self, request: Request):
        key = self._config.api_key
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if key is not None and not (
            scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())
        ):
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    async def _read(self, request: Request, kind: type[AnyRequest]) -> AnyRequest:
        """The request in the body. Raises ApiError."""
        self._check_key(request)
        kind_of_body = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # what a web page may send elsewhere without asking is anything but this
        if kind_of_body != "application/json":
            raise ApiError(
                415, f"Content-Type: must be application/json, not {kind_of_body!r:.100}"
            )
        body = read_request(kind, await read_body(request, self._config.max_body_bytes))
        self._check_model(body.model)
        return body

    async def _answer(
        self,
        request: Request,
        body,
        field: str,
        prompts: list[list[int]],
        new_answer: Callable[..., Answer],
        constraint=None,
    ) -> ASGIApp:
        """Submits n samples of each prompt, and answers with what becomes of them. field: where the
        prompts came from.
        """
        if len(prompts) * body.n > self._service.capacity:
            param = field if body.n == 1 else "n"
            raise ApiError(
                400,
                f"{param}: {len(prompts) * body.n} samples; at most {self._service.capacity} fit at"
                " a time",
                param=param,
            )
        wrong = next(
            (token for token in body.logit_bias if int(token) >= self._service.vocab_size), None
        )
        if wrong is not None:
            raise ApiError(
                400,
                f"logit_bias: token {wrong} is unknown; valid are"
                f" 0..{self._service.vocab_size - 1}",
                param="logit_bias",
            )
        requests = []
        for prompt in prompts:
            length = body.length(
                len(prompt), self._service.context, self._config.max_new_tokens, field
            )
            seed = secrets.randbits(63) if body.seed is None else body.seed
            params = body.sampling(length, self._stop_tokens, seed)
            requests += [
                (prompt, dataclasses.replace(params, sample_index=i, constraint=constraint))
                for i in range(body.n)
            ]
        answer = new_answer(self._config.model_name, [len(p) for p in prompts], len(requests))
        try:
            stream = self._service.submit(requests)
        except (QueueFull, ServiceDown) as error:
            raise _as_api_error(error) from None
        if body.stream:
            chunks = events(stream, answer, body.include_usage)
            return _Events(stream, chunks, self._observe)
        try:
            whole = await _unless_gone(request.receive, _whole(stream, answer))
        finally:
            stream.close()
            self._observe(stream)
        return JSONResponse(whole) if whole else _client_gone(request, None)

    def _observe(self, stream: Stream):
        if stream.first_token_seconds is not None:
            self._metrics.first_token_seconds.observe(stream.first_token_seconds)


def _encode_whole(*arguments, **options) -> tuple[list[int], str]:
    """The conversation's token ids; nothing of the answer is begun."""
    return chat_template.encode(*arguments, **options), ""


async def read_body(request: Request, limit: int) -> bytes:
    """The body, unless it is longer than `limit` bytes: then the answer does not wait for its end,
    and nothing of it is kept.

    Raises ApiError.
    """
    too_long = ApiError(413, f"the body is longer than {limit} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS} s") from None
    return bytes(body)


# --- answers ---


async def _whole(stream: Stream, answer: Answer) -> dict:
    try:
        async for piece in stream:
            answer.take(piece)
    except (TimedOut, ServiceDown, ValueError) as error:
        raise _as_api_error(error) from None
    return answer.whole()


async def events(
    stream: AsyncIterable[Piece], answer: Answer, include_usage: bool
) -> AsyncGenerator[dict | str, None]:
    """What a stream sends: chunks, and then the word that it is done; or an error, and nothing
    more.
    """
    for chunk in answer.opening():
        yield chunk
    try:
        async for piece in stream:
            chunk = answer.take(piece)
            if chunk:
                yield chunk
    except (TimedOut, ServiceDown, ValueError) as error:
        yield _as_api_error(error).body
        return
    if include_usage:
        yield answer.usage_chunk()
    yield "[DONE]"


def event_bytes(event: dict | str) -> bytes:
    """As a stream has it. ASCII: some clients break lines at U+2028 and its like."""
    text = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class _Events:
    """A response of server-sent events. It ends, and closes the stream, when the client goes away
    or stops reading.
    """

    def __init__(
        self,
        stream: Stream,
        events: AsyncGenerator[dict | str, None],
        observe: Callable[[Stream], None],
    ):
        self._stream, self._events, self._observe = stream, events, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        scope[COMMENT] = b":\n\n"
        try:
            await _unless_gone(receive, self._send(send))
        except TimeoutError:
            pass  # the client does not take what is sent; the connection is closed
        finally:
            self._stream.close()
            self._observe(self._stream)

    async def _send(self, send: Send):
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(
                        {
                            "type": "http.response.body",
                            "body": event_bytes(event),
                            "more_body": True,
                        }
                    )
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(receive: Receive, work: Coroutine):
    """The result of `work`; None, and it is cancelled, when the client goes away before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive):
    while (await receive())["type"] != "http.disconnect":
        pass


# --- errors ---


def _as_api_error(error: Exception) -> ApiError:
    status = {QueueFull: 429, ServiceDown: 503, TimedOut: 504}.get(type(error), 400)
    return ApiError(status, str(error), retry=status in (429, 503))


async def api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse(
        ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body,
        error.status_code,
        error.headers,
    )


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed; its log says why").body, 500)


def _client_gone(request: Request, error: ClientDisconnect | None) -> Response:
    return Response(status_code=CLIENT_GONE)


# --- the server ---


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the address (port 0: any free port) and does not listen yet. Raises OSError
    where it cannot be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound


class Server(uvicorn.Server):
    """`run` answers until SIGTERM or `should_exit`, then ends what it has begun, and the
    service.
    """

    def __init__(
        self, app: ASGIApp, service: Service, bound: socket.socket, drain_seconds: float,
        when_ready: Callable[[str], None],
        head_seconds: float = HEAD_SECONDS,
    ):  # fmt: skip
        """service: the app's. drain_seconds: requests have to end in at shutdown. when_ready: gets
        the address once it answers.
        head_seconds: for a client to send a request's head. As many connections as the process may
        have open files are kept.
        """
        self._service = service
        self._socket = bound
        self._drain_seconds = drain_seconds
        self._when_ready = when_ready
        most, backlog = connection_limits()
        self.connections = Connections(most, head_seconds)
        super().__init__(
            uvicorn.Config(
                app,
                # it calls what it is given
                http=self.connections.protocol,  # pyright: ignore[reportArgumentType]
                loop="asyncio", ws="none", lifespan="off",
                backlog=backlog, log_config=None,
                log_level="warning", access_log=False, server_header=False,
                # a timeout of asyncio's, which need not be whole
                timeout_graceful_shutdown=(
                    drain_seconds + FAREWELL_SECONDS  # pyright: ignore[reportArgumentType]
                ),
            )
        )  # fmt: skip

    def run(self, sockets: list[socket.socket] | None = None):
        super().run(sockets or [self._socket])

    async def startup(self, sockets: list[socket.socket] | None = None):
        asyncio.get_running_loop().set_exception_handler(on_loop_error)
        for name in ("uvicorn.error", "glm_jax.serve.connections"):
            logging.getLogger(name).addFilter(OnceAMinute())
        await super().startup(sockets)
        host, port = self._socket.getsockname()[:2]
        self._when_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None):
        # Together: what the service gives up gets its answer while the connections are still there.
        await asyncio.gather(
            asyncio.to_thread(self._service.shut_down, self._drain_seconds),
            super().shutdown(sockets),
        )
