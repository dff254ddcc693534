"""What the server's tests and the soak share: a tiny model, an engine that follows a script, a
server on a real socket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
import types

import httpx
import openai
from flax import nnx
from prometheus_client.parser import text_string_to_metric_families

from data.tokenizer import Tokenizer, train_tokenizer
from glm_jax import hf
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.infer.request import Request
from glm_jax.serve.server import Server, ServerConfig, bound_socket, create_app
from glm_jax.serve.service import Service, ServiceConfig
from tests.model.oracle import random_state, tiny_config, to_jax

MODEL = "tiny"
USER = {"role": "user", "content": "größer?"}
CHAT = {"model": MODEL, "messages": [USER]}
TEXT = {"model": MODEL, "prompt": "x"}
# One width of page table, batches of 1 and 4, chunks of 1 and 4: few programs to compile.
SIZES = dict(
    context=128, num_rows=4, page_size=32, num_pages=16, prefill_chunk=4, min_rows=1, min_chunk=1,
    decode_steps=4, draft_tokens=0, weights="compute",
    cache_dtype="compute", keep_experts=False,
)  # fmt: skip
SERVICE = dict(queue_limit=60, request_seconds=60.0)
SERVER = dict(
    model_name=MODEL,
    api_key=None,
    max_new_tokens=128,
    max_body_bytes=2**20,
    max_requests=512,
    cors_origins=(),
)


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["def add(a, b):\n    return a + b\n", "größer 変数 😀\n"] * 20, 320)


def tiny_state(seed: int = 0) -> nnx.State:
    return to_jax(random_state(model_config(), seed))


def model_config():
    return tiny_config(vocab_size=tiny_tokenizer().vocab_size, num_layers=2, num_dense_layers=1)


def tiny_engine(**changes) -> Engine:
    model = nnx.merge(nnx.graphdef(hf.abstract_model(model_config())), tiny_state())
    return Engine(model, EngineConfig(**SIZES | changes), decode_text=tiny_tokenizer().decode)


class ScriptedEngine:
    """Has what the service needs of an engine, and draws the tokens of `script`, one a step, once
    `go` is set.
    """

    def __init__(self, context: int = 4096, num_rows: int = 2):
        tokenizer = tiny_tokenizer()
        self.config = types.SimpleNamespace(context=context, num_rows=num_rows)
        self.model_config = types.SimpleNamespace(vocab_size=tokenizer.vocab_size)
        self.decode_text = tokenizer.decode
        self.waiting, self.running, self.prompts, self.version = [], [], [], 0
        self.ids = itertools.count()
        self.script: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.failure: BaseException | None = None

    @property
    def num_free_pages(self) -> int:
        return self.config.num_rows - len(self.running)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, prompt, params) -> Request:
        request = Request(next(self.ids), list(prompt), params)
        self.waiting.append(request)
        self.prompts.append(request.prompt)
        return request

    def abort(self, request):
        self._finish(request, "abort")

    def set_weights(self, state, *, recompute):
        self.version += 1

    def step(self):
        if self.failure:
            raise self.failure
        while self.waiting and len(self.running) < self.config.num_rows:
            self.running.append(self.waiting.pop(0))
        if not self.go.is_set():
            time.sleep(0.002)
            return
        for request in list(self.running):
            token = self.script[len(request.tokens)]
            request.tokens.append(token)
            request.logprobs.append(-0.5)
            if token in request.params.stop_tokens or any(
                s in self.decode_text(request.tokens) for s in request.params.stop_strings
            ):
                self._finish(request, "stop")
            elif len(request.tokens) == request.params.max_new_tokens:
                self._finish(request, "length")

    def _finish(self, request, reason):
        if request.status != "finished":
            for group in (self.waiting, self.running):
                if request in group:
                    group.remove(request)
            request.status, request.finish_reason = "finished", reason


@dataclasses.dataclass
class Running:
    """A server that answers, and what is behind it."""

    url: str
    engine: Engine | ScriptedEngine
    service: Service
    server: Server

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def wait_until(self, condition, seconds: float = 30):
        """Raises AssertionError where the condition does not come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.service.status, "not within", seconds)
            time.sleep(0.005)


@contextlib.contextmanager
def serving(engine, drain_seconds: float = 5, **changes):
    """A server on a free port of this machine, in a thread. changes: of SERVICE and SERVER."""
    unknown = changes.keys() - SERVICE.keys() - SERVER.keys()
    assert not unknown, unknown
    service = Service(engine, ServiceConfig(**{k: changes.get(k, v) for k, v in SERVICE.items()}))
    config = ServerConfig(**{k: changes.get(k, v) for k, v in SERVER.items()})
    ready, urls = threading.Event(), []
    app = create_app(service, tiny_tokenizer(), config)
    server = Server(
        app,
        service,
        bound_socket("127.0.0.1", 0),
        drain_seconds,
        lambda url: (urls.append(url), ready.set()),
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30)
        yield Running(urls[0], engine, service, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def stalled(**options):
    """A server whose engine draws nothing until `engine.go` is set."""
    engine = ScriptedEngine(num_rows=1)
    engine.go.clear()
    with serving(engine, **options) as running:
        say(running, "ok")
        yield running


def say(running: Running, text: str):
    """What the scripted engine writes: special tokens where they are spelled, then the end of
    text.
    """
    tokenizer = tiny_tokenizer()
    running.engine.script = [*tokenizer.encode(text, allow_special=True), tokenizer.eos_id]


def client(running: Running, **options) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{running.url}/v1", **{"api_key": "none", "max_retries": 0} | options
    )


def chat(running: Running, **body):
    return client(running).chat.completions.create(**{"model": MODEL, "messages": [USER]} | body)


def complete(running: Running, **body):
    return client(running).completions.create(**{"model": MODEL, "prompt": "def "} | body)


def metrics(running: Running) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{running.url}/metrics").text)
    return {
        f"{s.name}{sorted(s.labels.values()) or ''}": s.value
        for family in families
        for s in family.samples
    }


def assert_idle(running: Running):
    """Soon nothing waits, nothing runs, and no page is held."""
    running.wait_until(lambda: running.engine.idle)
    if not isinstance(running.engine, ScriptedEngine):
        assert running.engine.num_free_pages == running.engine.config.num_pages
