"""Token ids of a whole conversation -> its messages, tools and switch. The inverse of
`data.chat_template.encode`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data.chat_messages import TemplateError, check_tools, from_json
from data.chat_output import MalformedOutput, message_of, split_tokens
from data.chat_template import TOOLS_AFTER, TOOLS_BEFORE
from data.tokenizer import Tokenizer

MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")  # each begins a turn
Pieces = Sequence[tuple[str, bool]]  # as chat_output.split_tokens gives them


class Conversation(NamedTuple):
    """Arguments of `data.chat_template.encode`."""

    messages: list[dict]
    tools: list[dict]
    thinking: bool


def read_conversation(tokenizer: Tokenizer, ids: Iterable[int]) -> Conversation:
    """The conversation that `encode` or `encode_for_training` wrote, with or without the token that
    stops its last turn.

    It comes in normal form, which lacks what the template never writes: reasoning in front of the
    last user's turn, white space around reasoning and content, names, ids of calls, a `/nothink`
    that the user typed where thinking is off. Content is one text; an assistant's message always
    has `reasoning_content` and `content`, maybe empty; arguments are JSON text. As the template
    writes strings raw, an argument to which its schema gives no type, or string among others, is a
    string only where it is no JSON of a type that will do. thinking: whether the users' turns lack
    `/nothink`; True where there are none. Raises MalformedOutput naming what the template cannot
    have written, like `messages[2].content`.
    """
    pieces = split_tokens(tokenizer, ids)
    if pieces[:2] != [("[gMASK]", True), ("<sop>", True)]:
        raise MalformedOutput("messages", "[gMASK]<sop> must come first")
    turns = _turns(pieces[2:])
    tools = []
    if turns and turns[0][0] == "<|system|>" and any(is_control for _, is_control in turns[0][1]):
        tools = _tools(turns.pop(0)[1])
    if [marker for marker, _ in turns[-2:-1]] == ["<|assistant|>"] and turns[-1] in (
        ("<|user|>", []),
        ("<|observation|>", []),
    ):
        turns.pop()
    messages, switches = [], []
    for marker, body in turns:
        where = f"messages[{len(messages)}]"
        if marker == "<|assistant|>":
            messages.append(_assistant(body, tools, where))
        elif marker == "<|observation|>":
            messages += _responses(body, where)
        elif marker == "<|user|>":
            switches.append(body[-1:] == [("/nothink", True)])
            if switches[-1] != switches[0]:
                raise MalformedOutput(
                    where, "must have /nothink if and only if the user's turns before it have it"
                )
            messages.append(
                {"role": "user", "content": _content(body[:-1] if switches[-1] else body, where)}
            )
        else:
            messages.append({"role": "system", "content": _content(body, where)})
    return Conversation(messages, tools, thinking=not any(switches))


def _turns(pieces: Pieces) -> list[tuple[str, Pieces]]:
    """(marker, what follows it) of each turn."""
    turns = []
    for text, is_control in pieces:
        if is_control and text in MARKERS:
            turns.append((text, []))
        elif turns:
            turns[-1][1].append((text, is_control))
        else:
            raise MalformedOutput("messages[0].role", f"{text!r} in front of the first turn")
    return turns


def _tools(body: Pieces) -> list[dict]:
    text = "".join(piece for piece, _ in body)
    before = TOOLS_BEFORE.removeprefix("<|system|>")
    if not text.startswith(before) or not text.endswith(f"\n{TOOLS_AFTER}"):
        raise MalformedOutput(
            "tools", "special tokens in a system message that is not the template's list of tools"
        )
    tools = []
    for i, line in enumerate(
        text.removeprefix(before).removesuffix(f"\n{TOOLS_AFTER}").split("\n")
    ):
        try:
            tools.append(from_json(line))
        except ValueError as error:
            raise MalformedOutput(f"tools[{i}]", f"is not JSON: {error}") from None
    try:
        check_tools(tools)
    except TemplateError as error:
        raise MalformedOutput("tools", str(error)) from None
    return tools


def _assistant(body: Pieces, tools: list[dict], where: str) -> dict:
    try:
        return message_of(body, tools or None)
    except MalformedOutput as error:
        raise MalformedOutput(f"{where}.{error.part}", error.problem) from None


def _responses(body: Pieces, where: str) -> list[dict]:
    """The tool messages of a run."""
    expected = (("\n", False), ("<tool_response>", True), None, ("</tool_response>", True))
    found = []
    for start in range(0, len(body), len(expected)):
        run = tuple(body[start : start + len(expected)])
        text = run[2][0] if len(run) == len(expected) else ""
        if (
            run[:2] + run[3:] != expected[:2] + expected[3:]
            or len(text) < 2
            or text[0] + text[-1] != "\n\n"
        ):
            raise MalformedOutput(
                where, "an observation is a run of \\n<tool_response>\\n...\\n</tool_response>"
            )
        found.append({"role": "tool", "content": text[1:-1]})
    if not found:
        raise MalformedOutput(where, "an observation without a <tool_response>")
    return found


def _content(body: Pieces, where: str) -> str:
    """Text of a turn that has no special token in it."""
    wrong = next((piece for piece, is_control in body if is_control), None)
    if wrong is not None:
        raise MalformedOutput(f"{where}.content", f"{wrong} out of place")
    text = body[0][0] if body else ""
    if not text.startswith("\n"):
        raise MalformedOutput(f"{where}.content", "must begin after a line break")
    return text[1:]
