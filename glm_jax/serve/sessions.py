"""Addresses for agents that speak OpenAI's chat API: one for each session, whose calls go to
whoever owns the engine.

What is sampled is the owner's to say: temperature, seed and nucleus of a call are read and have no
effect. What would change the form of an answer without the owner's knowledge is refused.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from data import chat_messages, chat_output
from data.tokenizer import Tokenizer
from glm_jax.infer.request import Request
from glm_jax.serve.answers import ChatAnswer
from glm_jax.serve.protocol import ApiError, ChatRequest, read_request
from glm_jax.serve.server import api_error, bound_socket, event_bytes, events, read_body
from glm_jax.serve.service import Piece
from glm_jax.serve.text_stream import TextStream

MAX_BODY_BYTES = 64 << 20
START_SECONDS = 30.0
# Fields of a call that must be left out, or say what they say by default.
NEUTRAL = (
    "n", "stop", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias",
    "response_format", "continue_final_message", "top_logprobs",
)  # fmt: skip

# A call -> its finished request; an ApiError is the call's answer.
Submit = Callable[[str, ChatRequest], concurrent.futures.Future[Request]]


class SessionServer:
    """Answers in a thread of its own, on an address of this machine alone. submit: called on that
    thread with the session and the call; raises ApiError.
    """

    def __init__(self, tokenizer: Tokenizer, model_name: str, submit: Submit):
        self._tokenizer, self._model_name, self._submit = tokenizer, model_name, submit
        self._control = chat_output.control_tokens(tokenizer)
        routes = [
            Route("/sessions/{session}/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/sessions/{session}/v1/models", self._models),
        ]
        handlers: dict[Any, Any] = {ApiError: api_error}
        app = Starlette(routes=routes, exception_handlers=handlers)
        bound = bound_socket("127.0.0.1", 0)
        self._address = "http://{}:{}".format(*bound.getsockname())
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, loop="asyncio", ws="none", lifespan="off", log_config=None,
                log_level="warning", access_log=False, server_header=False,
            )
        )  # fmt: skip
        thread = threading.Thread(
            target=self._server.run, args=([bound],), name="sessions", daemon=True
        )
        thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the server of sessions at {self._address} has not started")
            time.sleep(0.005)

    def new_session(self) -> tuple[str, str]:
        """Name and base URL of a session. Who knows the URL may use it: the name is a secret."""
        session = secrets.token_urlsafe(16)
        return session, f"{self._address}/sessions/{session}/v1"

    def stop(self):
        self._server.should_exit = True

    async def _models(self, http: HttpRequest) -> Response:
        del http
        model = {"id": self._model_name, "object": "model", "created": 0, "owned_by": "glm_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _chat(self, http: HttpRequest) -> Response:
        body = read_request(ChatRequest, await read_body(http, MAX_BODY_BYTES))
        self._check(body)
        future = self._submit(http.path_params["session"], body)
        request = await asyncio.wrap_future(future)
        answer = ChatAnswer(
            self._model_name, [len(request.prompt)], 1, logprobs=body.logprobs,
            tools=body.offered_tools, control=self._control, tokenizer=self._tokenizer,
        )  # fmt: skip
        text = TextStream(self._tokenizer.decode)
        shown = zip(request.text_tokens, request.logprobs, strict=False)
        tokens = [token for pair in shown for token in text.push(*pair)] + text.finish()
        piece = Piece(0, tokens, len(request.tokens), request.finish_reason)
        if body.stream:
            chunks = events(_alone(piece), answer, body.include_usage)
            lines = (event_bytes(chunk) async for chunk in chunks)
            return StreamingResponse(lines, media_type="text/event-stream")
        answer.take(piece)
        return JSONResponse(answer.whole())

    def _check(self, body: ChatRequest):
        fields = type(body).model_fields
        for name in NEUTRAL:
            default = fields[name].get_default(call_default_factory=True)
            if (value := getattr(body, name)) != default:
                raise ApiError(
                    400, f"{name}: {value!r:.100} has no place in a recorded session; valid:"
                    f" {default!r}", param=name,
                )  # fmt: skip
        if body.must_call:
            raise ApiError(
                400, "tool_choice: a recorded session takes 'auto' and 'none'", param="tool_choice"
            )
        try:
            chat_messages.check_tools(body.tools)
            chat_messages.check_messages(body.messages)
        except chat_messages.TemplateError as error:
            raise ApiError(400, str(error), param=error.field) from None
        if body.messages[-1]["role"] == "assistant":
            raise ApiError(
                400, "messages: end with the assistant's turn; its own must be next",
                param="messages",
            )  # fmt: skip


async def _alone(piece: Piece) -> AsyncGenerator[Piece]:
    """A session's answers are judged as a whole before any of it is sent."""
    yield piece
