"""What the model writes in its turn -> a message: reasoning, content, tool calls. The inverse of
`data.chat_template`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from data import json_schema
from data.chat_messages import TemplateError, check_tools, from_json, to_json
from data.chat_template import STOP_TOKENS, split
from data.tokenizer import SPECIAL_TOKENS, Tokenizer

# Where a special token leads from one part of the turn into the next.
_NEXT = {
    ("opening", "<think>"): "reasoning",
    ("reasoning", "</think>"): "content",
    ("opening", "<tool_call>"): "call",
    ("content", "<tool_call>"): "call",
    ("after a call", "<tool_call>"): "call",
}
_CALL_TAGS = (
    "<tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "</tool_call>",
)
_ARGUMENT = _CALL_TAGS[1:-1]
# Out of place they break the turn; other special tokens (`<|begin_of_box|>`) may stand in its text.
_STRUCTURE = {
    "<think>",
    "</think>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|assistant|>",
    *STOP_TOKENS,
    *_CALL_TAGS,
}


class MalformedOutput(ValueError):
    """What breaks the format; `part` says which part of the message, like
    `tool_calls[0].arguments.city`, `problem` what is wrong there.
    """

    def __init__(self, part: str, problem: str):
        super().__init__(f"{part}: {problem}")
        self.part, self.problem = part, problem


@dataclasses.dataclass(frozen=True)
class Delta:
    """More of a message: text of its `reasoning_content` or `content`, or one whole call of its
    `tool_calls`.
    """

    field: str
    value: str | dict


def parse(text: str, tools: Sequence[Mapping] | None = None) -> dict:
    """The message of an assistant's turn, from what follows the generation prompt, with or without
    the token that stopped it.

    tools: those offered; an argument is a raw string where its schema says so, else JSON. None: any
    name goes, and what is JSON counts as JSON. `reasoning_content` and `content` are there, maybe
    empty; `tool_calls` where there are any. Every special token that the text spells counts as one:
    `parse_tokens` can tell them from text that only looks so. Raises MalformedOutput.
    """
    return message_of(split(text), tools)


def parse_tokens(
    tokenizer: Tokenizer, ids: Iterable[int], tools: Sequence[Mapping] | None = None
) -> dict:
    """`parse` for token ids: text that spells a special token stays text."""
    return message_of(split_tokens(tokenizer, ids), tools)


def split_tokens(tokenizer: Tokenizer, ids: Iterable[int]) -> list[tuple[str, bool]]:
    """Token ids as pieces of text: (piece, whether it is a special token), none empty, no two plain
    ones side by side.
    """
    control = control_tokens(tokenizer)
    pieces, run = [], []
    for token in ids:
        if token in control:
            pieces += [(tokenizer.decode(run), False), (control[token], True)]
            run = []
        else:
            run.append(token)
    return [piece for piece in [*pieces, (tokenizer.decode(run), False)] if piece[0]]


def control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> spelling of the special tokens."""
    return {tokenizer.special(name): name for name in SPECIAL_TOKENS}


def message_of(pieces: Sequence[tuple[str, bool]], tools: Sequence[Mapping] | None = None) -> dict:
    """`parse` for pieces as `split_tokens` gives them."""
    if pieces and pieces[-1][1] and pieces[-1][0] in STOP_TOKENS:
        pieces = pieces[:-1]
    reader = OutputReader(tools, strict=True)
    deltas = [delta for piece in pieces for delta in reader.feed(*piece)] + reader.finish()
    joined = {
        f: "".join(str(d.value) for d in deltas if d.field == f)
        for f in ("reasoning_content", "content")
    }
    calls = [d.value for d in deltas if d.field == "tool_calls"]
    return {"role": "assistant", **joined} | ({"tool_calls": calls} if calls else {})


class OutputReader:
    """Reads a turn piece by piece, as it is written.

    White space around reasoning and content is dropped. strict: malformed output raises
    MalformedOutput; else the malformed part is content, as it was written, and a reasoning that
    never ends is a reasoning. begun: the field that the prompt has begun
    (`chat_template.encode_to_continue`); white space at the start of its rest counts.
    """

    def __init__(self, tools: Sequence[Mapping] | None, *, strict: bool, begun: str = ""):
        self._tools = None if tools is None else check_tools(tools)
        self._strict = strict
        self._state = {"": "opening", "reasoning_content": "reasoning", "content": "content"}[begun]
        # the pieces of the open tool call, its tag included
        self._call: list[tuple[str, bool]] = []
        self._num_calls = 0
        self._space = ""  # counts once something follows
        self._begun = bool(begun)  # the field that is being written has text

    def feed(self, text: str, is_control: bool) -> list[Delta]:
        """What a piece of output adds. is_control: it is one special token, spelled out; else plain
        text.
        """
        if self._state == "call":
            self._call.append((text, is_control))
            return self._end_call() if is_control and text == "</tool_call>" else []
        following = _NEXT.get((self._state, text)) if is_control else None
        if following == "call":
            self._call = [(text, is_control)]
            self._state = "call"
            return []
        if following:
            self._enter(following)
            return []
        if is_control and text in _STRUCTURE:
            self._complain(self._part, f"{text} out of place")
        if self._state == "after a call" and text.strip():
            self._complain("content", f"{text!r} after a tool call")
        if self._state == "opening" and text.strip():
            self._state = "content"
        return self._write(text)

    def finish(self) -> list[Delta]:
        """What the end of the output adds."""
        if self._state == "call":
            self._complain(self._part, "is not closed")
            self._state = "content"
            return self._write("".join(piece for piece, _ in self._call))
        if self._state == "reasoning":
            self._complain("reasoning_content", "<think> is not closed")
        return []

    @property
    def _part(self) -> str:
        if self._state == "call":
            return f"tool_calls[{self._num_calls}]"
        return "reasoning_content" if self._state == "reasoning" else "content"

    def _complain(self, part: str, problem: str):
        if self._strict:
            raise MalformedOutput(part, problem)

    def _enter(self, state: str):
        self._state, self._space, self._begun = state, "", False

    def _write(self, text: str) -> list[Delta]:
        text = self._space + text
        text = text if self._begun else text.lstrip()
        visible = text.rstrip()
        self._space = text[len(visible) :]
        self._begun = self._begun or bool(visible)
        return [Delta(self._part, visible)] if visible else []

    def _end_call(self) -> list[Delta]:
        try:
            call = _tool_call(
                self._call, self._tools, f"tool_calls[{self._num_calls}]", self._strict
            )
        except MalformedOutput:
            if self._strict:
                raise
            self._state = "content"
            return self._write("".join(piece for piece, _ in self._call))
        self._num_calls += 1
        self._state, self._space = "after a call", ""
        return [Delta("tool_calls", call)]


def _tool_call(
    pieces: list[tuple[str, bool]], tools: dict[str, Mapping] | None, where: str, strict: bool
) -> dict:
    """The API's tool call, without an id. Raises MalformedOutput. Unless strict, an argument of a
    wrong type is its text as it is.
    """
    tags, texts = _by_tag(pieces)
    name = texts[0].strip()
    if not name or (tools is not None and name not in tools):
        raise MalformedOutput(
            f"{where}.name",
            f"{name!r} is none of the tools" + (f": {', '.join(tools)}" if tools else ""),
        )
    schema = (tools or {}).get(name) or {}
    arguments = {}
    for start in range(1, len(tags) - 1, len(_ARGUMENT)):
        found = tuple(tags[start : start + len(_ARGUMENT)])
        if found != _ARGUMENT:
            wrong = next(i for i, tag in enumerate(_ARGUMENT) if found[i : i + 1] != (tag,))
            raise MalformedOutput(
                where, f"{tags[start + wrong]} where {_ARGUMENT[wrong]} should be"
            )
        key, between, text, after = texts[start : start + len(_ARGUMENT)]
        if key in arguments:
            raise MalformedOutput(f"{where}.arguments.{key}", "is given twice")
        if (between + after).strip():
            raise MalformedOutput(
                f"{where}.arguments.{key}", f"{(between + after).strip()!r} between the tags"
            )
        try:
            arguments[key] = _value(
                text,
                json_schema.types(json_schema.argument(schema, key), schema),
                f"{where}.arguments.{key}",
            )
        except MalformedOutput:
            if strict:
                raise
            # the client's own check says what it wants, and the model can try again
            arguments[key] = text
    try:
        return {
            "type": "function",
            "function": {"name": name, "arguments": to_json(arguments, "arguments")},
        }
    except TemplateError as error:
        raise MalformedOutput(f"{where}.arguments", error.problem) from None


def _by_tag(pieces: list[tuple[str, bool]]) -> tuple[list[str], list[str]]:
    """The tags of a tool call, from <tool_call> to </tool_call>, and the text after each."""
    tags, texts = [], []
    for piece, is_control in pieces:
        if is_control and piece in _CALL_TAGS:
            tags.append(piece)
            texts.append("")
        else:
            texts[-1] += piece
    return tags, texts


def _value(text: str, types: set[str] | None, where: str):
    """An argument: JSON of one of the types (None: any); else, where a string will do, the text as
    it is.
    """
    string_will_do = types is None or "string" in types
    try:
        value = from_json(text)
    except ValueError as error:
        if string_will_do:
            return text
        raise MalformedOutput(
            where, f"{text!r} is no JSON of type {' or '.join(sorted(types or ()))}: {error}"
        ) from None
    # Strings are written raw: one in quotes is a string that has quotes.
    fits = types is None or not string_will_do or json_schema.type_of(value) & types
    return value if fits and not (string_will_do and isinstance(value, str)) else text
