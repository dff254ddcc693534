"""What an agent's conversation was as tokens, when the agent itself keeps only messages.

Every call of a chat API sends the whole history again. A session finds how much of it the model has
already seen, and adds tokens for the rest alone: its nodes form a tree, each holds the tokens that
it adds to its parent's, and a path from the root is exactly what the model saw. Nothing that the
model wrote is ever tokenized again. A history that was edited or shortened begins a new path.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data import chat_template
from data.chat_messages import arguments_of, check_messages, to_json, visible_text
from data.tokenizer import Tokenizer
from glm_jax.infer.request import Request


@dataclasses.dataclass(eq=False)
class Node:
    """Messages that were given to the model, or one that it wrote.

    tokens: that it adds. key: of the history up to its end. logprobs, versions, experts: of what
    the model wrote, `experts` from the first token on that no node above knows; none of what it was
    given.
    """

    parent: Node | None
    key: bytes
    tokens: list[int]
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    experts: np.ndarray | None = None
    sampled: bool = False
    is_leaf: bool = True  # no message of the model comes after it

    def path(self) -> list[Node]:
        """From the root to here."""
        return [*(self.parent.path() if self.parent else ()), self]


@dataclasses.dataclass
class Path:
    """A conversation as the model saw it; along the tokens as in Rollout, experts in parts. mask:
    True where the model sampled the token and no path before this one has it.
    """

    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]
    versions: list[int]
    experts: list[np.ndarray]


class Session:
    """The calls of one agent."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stops = {tokenizer.special(name): name for name in chat_template.STOP_TOKENS}
        self._given: dict[tuple[Node | None, bytes], Node] = {}
        self._written: dict[bytes, Node] = {}  # by the key of the history that each ends
        self._nodes: list[Node] = []  # what the model wrote, in order

    @property
    def num_sampled(self) -> int:
        """Tokens that the model sampled, on all paths."""
        return sum(len(node.tokens) for node in self._nodes)

    def ask(
        self, messages: Sequence[Mapping], tools: Sequence[Mapping], *, thinking: bool
    ) -> tuple[Node, list[int]]:
        """The node of a history that the model is to go on with, and all tokens up to there. The
        same history is the same node: another sample of it is a brother. Raises TemplateError.
        """
        check_messages(messages)
        keys = list(_keys(messages, tools, thinking))
        # The longest beginning that ends with what the model wrote itself, and the rest.
        known, rest = None, messages
        for count in range(len(messages) - 1, 0, -1):
            if node := self._written.get(keys[count]):
                known, rest = node, messages[count:]
                break
        if known is not None and all(message["role"] in ("user", "tool") for message in rest):
            stop = self._stops[known.tokens[-1]]
            added = lambda: chat_template.encode_reply(
                self._tokenizer, rest, stop, thinking=thinking
            )
        else:
            known = None
            added = lambda: chat_template.encode(
                self._tokenizer, messages, tools, thinking=thinking
            )
        node = self._given.get((known, keys[-1]))
        if node is None:
            node = self._given[known, keys[-1]] = Node(known, keys[-1], added())
        return node, [token for part in node.path() for token in part.tokens]

    def add(self, node: Node, request: Request, message: Mapping | None, num_moe_layers: int):
        """Records what the model wrote after a node. message: what the agent is answered; None: it
        cannot be gone on from.
        """
        written = Node(
            node, b"", list(request.tokens), list(request.logprobs), list(request.versions),
            sampled=True,
        )  # fmt: skip
        if request.experts is not None:
            known = sum(len(n.experts) for n in node.path() if n.experts is not None)
            written.experts = request.experts[known:, :num_moe_layers]
        for above in node.path():
            above.is_leaf = False
        self._nodes.append(written)
        if message is not None and written.tokens[-1] in self._stops:
            written.key = _next(node.key, {"role": "assistant"} | dict(message), "message")
            self._written[written.key] = written

    def paths(self) -> list[Path]:
        """One for each message of the model that no other comes after, in the order in which they
        were written. Every sampled token is in the mask of exactly one of them.
        """
        seen: set[Node] = set()
        found = []
        for leaf in (node for node in self._nodes if node.is_leaf):
            path = Path([], [], [], [], [])
            for node in leaf.path():
                count, is_new = len(node.tokens), node.sampled and node not in seen
                path.tokens += node.tokens
                path.mask += [is_new] * count
                path.logprobs += node.logprobs if is_new else [0.0] * count
                path.versions += node.versions if is_new else [-1] * count
                path.experts += [] if node.experts is None else [node.experts]
                seen.add(node)
            found.append(path)
        return found


def _keys(messages: Sequence[Mapping], tools: Sequence[Mapping], thinking: bool) -> Iterator[bytes]:
    """Of every beginning of a history, that of no message first."""
    head = to_json({"tools": list(tools), "thinking": thinking}, "tools")
    key = hashlib.sha256(head.encode()).digest()
    yield key
    for i, message in enumerate(messages):
        key = _next(key, message, f"messages[{i}]")
        yield key


def _next(key: bytes, message: Mapping, where: str) -> bytes:
    """The key after one more message. Two messages are the same where they say the same: agents
    often drop the model's reasoning, write null for no text, or arguments as text.
    """
    calls = [
        [call["function"]["name"], dict(arguments_of(call["function"], where))]
        for call in message.get("tool_calls") or ()
    ]
    text = visible_text(message, where)
    if message["role"] == "assistant":  # the template strips it, too
        text = text.strip()
    said = to_json([message["role"], text, calls], where)
    return hashlib.sha256(key + said.encode()).digest()
