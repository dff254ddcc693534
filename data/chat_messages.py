"""Messages, tools and tool calls of OpenAI's chat API, as parsed JSON: what may stand in them, and
what they hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

ROLES = ("system", "user", "assistant", "tool")
# `name` is read by nobody; what other keys hold would be lost.
MESSAGE_KEYS = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")


class TemplateError(ValueError):
    """A conversation that the template cannot write; `field` is the path of what is wrong, like
    `messages[2].role`, `problem` the rest.
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


def check_tools(tools: Sequence[Mapping]) -> dict[str, Mapping]:
    """Name -> parameter schema of each tool ({} where it has none). Raises TemplateError."""
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise TemplateError("tools", f"must be a list, not {_kind(tools)}")
    found = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        as_object(tool, where)
        if tool.get("type") != "function":
            raise TemplateError(f"{where}.type", f"{tool.get('type')!r} is not 'function'")
        function = as_object(tool.get("function"), f"{where}.function")
        name = _name(function.get("name"), f"{where}.function.name")
        if name in found:
            raise TemplateError(f"{where}.function.name", f"{name!r} is used twice")
        schema = as_object(function.get("parameters") or {}, f"{where}.function.parameters")
        as_object(schema.get("properties") or {}, f"{where}.function.parameters.properties")
        to_json(tool, where)
        found[name] = schema
    return found


def check_messages(messages: Sequence[Mapping]):
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TemplateError("messages", "must be a list of at least one message")
    calls = None  # ids of the calls that a tool message here may answer
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = as_object(message, where).get("role")
        if role not in ROLES:
            raise TemplateError(f"{where}.role", f"{role!r} is unknown; valid: {', '.join(ROLES)}")
        for key, value in message.items():
            if key not in MESSAGE_KEYS and value not in (None, [], {}):
                raise TemplateError(f"{where}.{key}", f"unknown; valid: {', '.join(MESSAGE_KEYS)}")
        if message.get("reasoning_content") is not None:
            _text(message["reasoning_content"], f"{where}.reasoning_content")
        if role == "tool":
            answered = message.get("tool_call_id")
            if calls is None:
                raise TemplateError(
                    f"{where}.role", "a tool message must follow an assistant's tool_calls"
                )
            if answered is not None and None not in calls and answered not in calls:
                raise TemplateError(
                    f"{where}.tool_call_id",
                    f"{answered!r} is none of the calls before it; valid:"
                    f" {', '.join(map(str, calls))}",
                )
        else:
            calls = _check_calls(message, where) if role == "assistant" else None


def _check_calls(message: Mapping, where: str) -> list | None:
    """Ids of an assistant's tool calls; None where it makes none."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise TemplateError(f"{where}.tool_calls", f"must be a list, not {_kind(calls)}")
    for i, call in enumerate(calls):
        function = as_object(
            as_object(call, f"{where}.tool_calls[{i}]").get("function"),
            f"{where}.tool_calls[{i}].function",
        )
        _name(function.get("name"), f"{where}.tool_calls[{i}].function.name")
        arguments_of(function, f"{where}.tool_calls[{i}].function")
    return [call.get("id") for call in calls] or None


def visible_text(message: Mapping, where: str) -> str:
    """A message's content, which may come in parts of type text; of an assistant it may be missing.
    Raises TemplateError.
    """
    content, field = message.get("content"), f"{where}.content"
    if content is None and message["role"] == "assistant":
        return ""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return _text(content, field, " or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        if as_object(part, f"{field}[{i}]").get("type") != "text":
            raise TemplateError(f"{field}[{i}].type", f"{part.get('type')!r} is not 'text'")
        texts.append(_text(part.get("text"), f"{field}[{i}].text"))
    return "".join(texts)


def arguments_of(function: Mapping, where: str) -> Mapping:
    """The arguments of a tool call's function, parsed where they are JSON text. Raises
    TemplateError.
    """
    arguments, field = function.get("arguments"), f"{where}.arguments"
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments)
        except ValueError as error:
            raise TemplateError(field, f"is not JSON: {error}") from None
    checked = as_object(arguments, field)
    for key, value in checked.items():
        _text(key, f"{field}, name of an argument")
        if isinstance(value, str):
            _text(value, f"{field}.{key}")
    return checked


def to_json(value, field: str) -> str:
    """JSON on one line, characters as they are. Raises TemplateError for what JSON cannot say."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(field, f"cannot be written as JSON: {error}") from None
    return _text(text, field)


def from_json(text: str):
    """Strict JSON: no NaN, no Infinity. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def as_object(value, field: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise TemplateError(field, f"must be an object, not {_kind(value)}")
    return value


def _text(value, field: str, alternative: str = "") -> str:
    if not isinstance(value, str):
        raise TemplateError(field, f"must be a string{alternative}, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TemplateError(
            field, f"holds half of a surrogate pair at character {error.start}"
        ) from None
    return value


def _name(value, field: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.:/-]+", value):
        raise TemplateError(
            field, f"{value!r} is no function name: letters, digits and any of _ - . : /"
        )
    return value


def _kind(value) -> str:
    return "missing" if value is None else type(value).__name__
