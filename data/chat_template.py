"""GLM-4.5's chat format: messages to text or token ids. `data.chat_output` reads what the model
writes back.

Messages, tools and tool calls are those of OpenAI's chat API, as parsed JSON: a message has a
`role` (system, user, assistant, tool) and `content`; an assistant's also `reasoning_content` and
`tool_calls`, whose `arguments` are a JSON object or its text.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from data.chat_messages import (
    TemplateError,
    arguments_of,
    as_object,
    check_messages,
    check_tools,
    to_json,
    visible_text,
)
from data.tokenizer import SPECIAL_TOKENS, Tokenizer

# any of them ends the assistant's turn
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")

TOOLS_BEFORE = """<|system|>
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
TOOLS_AFTER = """</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
<arg_key>{arg-key-2}</arg_key>
<arg_value>{arg-value-2}</arg_value>
...
</tool_call>"""
_SPECIAL = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a conversation, as long as one special token or as the plain text between
    two.
    """

    text: str
    is_control: bool  # one special token, spelled out; else plain text, whatever it spells
    # whose turn it belongs to, of ROLES; the start of the conversation counts as the system's
    role: str


def render(
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    *,
    thinking: bool = True,
    generation_prompt: bool = True,
) -> str:
    """The conversation as text, special tokens spelled out.

    thinking: whether the model is asked to reason. generation_prompt: ends where the assistant goes
    on. Raises TemplateError naming the field that is wrong.
    """
    return "".join(
        s.text
        for s in segments(messages, tools, thinking=thinking, generation_prompt=generation_prompt)
    )


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    *,
    thinking: bool = True,
    generation_prompt: bool = True,
) -> list[int]:
    """Token ids of the conversation, in which only the template's own markers are special tokens.
    Arguments as for `render`.
    """
    parts = segments(messages, tools, thinking=thinking, generation_prompt=generation_prompt)
    return list(itertools.chain.from_iterable(_ids(tokenizer, parts)))


def encode_to_continue(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    *,
    thinking: bool = True,
) -> tuple[list[int], str]:
    """Token ids up to the last character of the last message, which the assistant has begun, and
    the field of it that is to be continued: `content`, or `reasoning_content` where there is no
    content yet; "" where there is neither.

    Raises TemplateError as `render` does, and where the last message is not the assistant's or is
    finished, as it calls tools.
    """
    parts = segments(messages, tools, thinking=thinking, generation_prompt=False)
    last, where = messages[-1], f"messages[{len(messages) - 1}]"
    if last["role"] != "assistant":
        raise TemplateError(
            f"{where}.role",
            f"only the assistant's message can be continued, not that of the {last['role']}",
        )
    if last.get("tool_calls"):
        raise TemplateError(f"{where}.tool_calls", "a message that calls tools cannot be continued")
    content, reasoning = visible_text(last, where), last.get("reasoning_content")
    opened = (
        reasoning is None and "</think>" not in content and content.lstrip().startswith("<think>")
    )
    if opened:  # a client that sends back the raw output of a model that was still reasoning
        content, reasoning = "", content.lstrip().removeprefix("<think>")
    text = content.rpartition("</think>")[2] if reasoning is None else content
    reasoned = (reasoning or "").lstrip()
    field = "content" if text.strip() else "reasoning_content" if reasoned else ""
    if field == "content":
        parts.append(_plain(text[len(text.rstrip()) :], "assistant"))
    else:
        turn = max(
            i for i, part in enumerate(parts) if part.is_control and part.text == "<|assistant|>"
        )
        parts = parts[:turn] + _generation_prompt(thinking or bool(field))
        if field:
            parts += [*_own("\n<think>", "assistant"), _plain(reasoned, "assistant")]
    return list(itertools.chain.from_iterable(_ids(tokenizer, _joined(parts)))), field


def encode_reply(
    tokenizer: Tokenizer, messages: Sequence[Mapping], stop: str, *, thinking: bool = True
) -> list[int]:
    """Token ids to put after an assistant's turn that the model ended with the stop token `stop`,
    so that the model goes on after the new messages, the user's or the tools'.

    The turn's own ids stay as they were sampled. With thinking they are followed by what `encode`
    gives for the whole conversation from there on. Raises TemplateError naming the field that is
    wrong.
    """
    if not messages:
        raise TemplateError("messages", "must be a list of at least one message")
    parts = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = as_object(message, where).get("role")
        if role == "user":
            parts += _user(visible_text(message, where), thinking)
        elif role == "tool":
            parts += _tool(message, where, starts_run=i == 0 or messages[i - 1]["role"] != "tool")
        else:
            raise TemplateError(f"{where}.role", f"{role!r} is unknown; valid: user, tool")
    parts = _joined([*parts, *_generation_prompt(thinking)])
    if parts[0] == Segment(stop, True, parts[0].role):
        parts = parts[1:]  # the model has written it
    return list(itertools.chain.from_iterable(_ids(tokenizer, parts)))


def encode_for_training(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    *,
    thinking: bool,
) -> tuple[list[int], list[bool]]:
    """Token ids of a finished conversation, and for each whether the model is to learn to predict
    it.

    What is trained on of an assistant's turn is what the engine would have sampled: all after
    `<|assistant|>`, or after `</think>` where that was given (thinking off) or the template has
    dropped the reasoning (turns before the last user's); then the token that stops the turn,
    `<|observation|>` after tool calls and else `<|user|>`, where the conversation goes on with it.
    The last turn's is appended. In front of every turn after the last user's, the ids are those of
    `encode` for the messages up to there. Raises TemplateError where the last turn is not the
    assistant's, and for reasoning that would have to be kept with thinking off.
    """
    parts = segments(messages, tools, thinking=thinking, generation_prompt=False)
    last = len(messages) - 1
    if messages[last]["role"] != "assistant":
        raise TemplateError(
            f"messages[{last}].role",
            f"a finished conversation ends with the assistant, not {messages[last]['role']}",
        )
    parts += _own(_stop_of(messages[last]), "user")
    trained = _learnt(parts, messages, thinking)
    ids = _ids(tokenizer, parts)
    flags = itertools.chain.from_iterable(
        [flag] * len(own) for flag, own in zip(trained, ids, strict=True)
    )
    return list(itertools.chain.from_iterable(ids)), list(flags)


def _learnt(parts: Sequence[Segment], messages: Sequence[Mapping], thinking: bool) -> list[bool]:
    last_user = _last_user(messages)
    turns = iter([i for i, m in enumerate(messages) if m["role"] == "assistant"])
    flags, turn, stop, written = [], -1, None, False  # written: by the model, not given to it
    for part in parts:
        if part.is_control and part.text == "<|assistant|>":
            turn = next(turns)
            stop, written = _stop_of(messages[turn]), thinking and turn > last_user
            flags.append(False)
        elif part.role == "assistant":
            if not (written or part.is_control or part.text == "\n"):
                raise TemplateError(
                    f"messages[{turn}].reasoning_content", "must be empty where thinking is off"
                )
            flags.append(written)
            written = written or (part.is_control and part.text == "</think>")
        else:
            # Whatever else stands after a turn (a system message, another turn) is nothing that
            # the engine stops at.
            flags.append(part.is_control and part.text == stop)
            stop = None
    return flags


def _stop_of(message: Mapping) -> str:
    return "<|observation|>" if message.get("tool_calls") else "<|user|>"


def _ids(tokenizer: Tokenizer, parts: Sequence[Segment]) -> list[list[int]]:
    """Token ids of each segment."""
    # A user who types `<|assistant|>` must not be able to speak for the assistant. The rendered
    # text cannot tell his from ours, so it is never tokenized as a whole: plain segments go through
    # the tokenizer that knows no special token. As a segment reaches from one special token to the
    # next, honest text gets the same ids as it would from the whole.
    plain = iter(tokenizer.encode_batch([s.text for s in parts if not s.is_control]))
    return [[tokenizer.special(s.text)] if s.is_control else next(plain) for s in parts]


def segments(
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    *,
    thinking: bool = True,
    generation_prompt: bool = True,
) -> list[Segment]:
    """The conversation in segments, none empty, no two plain ones side by side. Arguments and
    errors as for `render`.
    """
    check_tools(tools or ())
    check_messages(messages)
    parts = _own("[gMASK]<sop>", "system")
    if tools:
        schemas = [
            _plain(f"{to_json(tool, f'tools[{i}]')}\n", "system") for i, tool in enumerate(tools)
        ]
        parts += [*_own(TOOLS_BEFORE, "system"), *schemas, *_own(TOOLS_AFTER, "system")]
    last_user = _last_user(messages)
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message["role"] == "assistant":
            parts += _assistant(message, where, keep_reasoning=i > last_user)
        elif message["role"] == "user":
            parts += _user(visible_text(message, where), thinking)
        elif message["role"] == "tool":
            parts += _tool(message, where, starts_run=messages[i - 1]["role"] != "tool")
        else:
            parts += [
                *_own("<|system|>\n", "system"),
                _plain(visible_text(message, where), "system"),
            ]
    if generation_prompt:
        parts += _generation_prompt(thinking)
    return _joined(parts)


def _generation_prompt(thinking: bool) -> list[Segment]:
    return _own("<|assistant|>" if thinking else "<|assistant|>\n<think></think>", "assistant")


def _last_user(messages: Sequence[Mapping]) -> int:
    return max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)


def _user(text: str, thinking: bool) -> list[Segment]:
    switch = [] if thinking else _own("/nothink", "user")
    # Who typed the switch himself gets no second one.
    return [
        *_own("<|user|>\n", "user"),
        _plain(text if thinking else text.removesuffix("/nothink"), "user"),
        *switch,
    ]


def _tool(message: Mapping, where: str, *, starts_run: bool) -> list[Segment]:
    return [
        *_own("<|observation|>" * starts_run + "\n<tool_response>\n", "tool"),
        _plain(visible_text(message, where), "tool"),
        *_own("\n</tool_response>", "tool"),
    ]


def _assistant(message: Mapping, where: str, *, keep_reasoning: bool) -> list[Segment]:
    content, reasoning = visible_text(message, where), message.get("reasoning_content")
    if reasoning is None and "</think>" in content:  # a client that sends back the raw output
        before, _, content = content.rpartition("</think>")
        reasoning = before.partition("</think>")[0].rpartition("<think>")[2]
    parts = _own("<|assistant|>\n<think>", "assistant")
    parts += [
        _plain((reasoning or "").strip() if keep_reasoning else "", "assistant"),
        *_own("</think>", "assistant"),
    ]
    if content.strip():
        parts.append(_plain("\n" + content.strip(), "assistant"))
    for i, call in enumerate(message.get("tool_calls") or ()):
        parts += _tool_call(call["function"], f"{where}.tool_calls[{i}].function")
    return parts


def _tool_call(function: Mapping, where: str) -> list[Segment]:
    parts = [*_own("\n<tool_call>", "assistant"), _plain(f"{function['name']}\n", "assistant")]
    for key, value in arguments_of(function, where).items():
        # Strings are written raw, so that code needs no escaping.
        text = value if isinstance(value, str) else to_json(value, f"{where}.arguments.{key}")
        parts += [
            *_own("<arg_key>", "assistant"),
            _plain(key, "assistant"),
            *_own("</arg_key>\n<arg_value>", "assistant"),
        ]
        parts += [_plain(text, "assistant"), *_own("</arg_value>\n", "assistant")]
    return [*parts, *_own("</tool_call>", "assistant")]


def _own(text: str, role: str) -> list[Segment]:
    """The template's own text, in which special tokens are control tokens."""
    return [Segment(piece, is_control, role) for piece, is_control in split(text)]


def _plain(text: str, role: str) -> Segment:
    return Segment(text, False, role)


def _joined(parts: list[Segment]) -> list[Segment]:
    joined = []
    for part in parts:
        before = joined[-1] if joined else None
        if before and not before.is_control and not part.is_control:
            # A turn starts with a special token, so that what stands side by side is of one turn.
            assert before.role == part.role, (before, part)
            joined[-1] = _plain(before.text + part.text, part.role)
        elif part.text:
            joined.append(part)
    return joined


def split(text: str) -> list[tuple[str, bool]]:
    """`text` cut at the special tokens that it spells: (piece, whether it is one)."""
    return [(piece, i % 2 == 1) for i, piece in enumerate(_SPECIAL.split(text)) if piece]
