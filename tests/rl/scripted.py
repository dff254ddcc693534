"""An engine that writes what it is told, so that outputs reach the true parser and the true
verifiers: a toy model cannot write GLM-4.5's format.
"""

import collections
import types
from collections.abc import Callable, Iterable

from data.tokenizer import Tokenizer
from glm_jax.infer.request import Request
from glm_jax.infer.sampling import SamplingParams

Output = tuple[str, str]  # text, special tokens spelled out; finish_reason

# What ends a rollout, and how: as its parser and its verifier must see it.
RIGHT = ("<think>so</think>\\boxed{A}<|user|>", "stop")
WRONG = ("<think>so</think>\\boxed{B}<|user|>", "stop")
MALFORMED = ("<think>so\\boxed{A}<|user|>", "stop")
CUT = ("<think>so</think>\\boxed{A}", "length")
TAKEN_BACK = ("<think>so</think>\\boxed{A}<|user|>", "abort")


def write(request: Request, output: Output, tokenizer: Tokenizer, version: int):
    """Finishes a request with an output of one version of the weights."""
    text, request.finish_reason = output
    request.tokens = tokenizer.encode(text, allow_special=True)
    request.logprobs = [-1.0 - 0.5 * i for i in range(len(request.tokens))]
    request.versions = [version] * len(request.tokens)
    request.status = "finished"


class ScriptedEngine:
    """Engine.submit, abort, idle and step. Requests finish three a step, the last one first."""

    def __init__(self, tokenizer: Tokenizer, outputs: Iterable[Output], num_layers: int = 2):
        """outputs: of the requests in the order in which they are submitted."""
        self.tokenizer = tokenizer
        self.outputs = collections.deque(outputs)
        self.version = 0
        self.model_config = types.SimpleNamespace(num_moe_layers=num_layers)
        self.requests: list[Request] = []
        self.finish: Callable[[Request], None] = lambda request: None  # a last change
        self._open: list[Request] = []

    def submit(self, prompt, params: SamplingParams) -> Request:
        request = Request(len(self.requests), list(prompt), params)
        self.requests.append(request)
        self._open.append(request)
        write(request, self.outputs.popleft(), self.tokenizer, self.version)
        request.status = "running"
        return request

    def abort(self, request: Request):
        self._open.remove(request)
        request.status, request.finish_reason = "finished", "abort"

    @property
    def idle(self) -> bool:
        return not self._open

    def step(self) -> list[Request]:
        done = [self._open.pop() for _ in range(min(3, len(self._open)))]
        for request in done:
            request.status = "finished"
            self.finish(request)
        return done
