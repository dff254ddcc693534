"""The format of an assistant's turn, whatever it says: reasoning, tool calls, end, boxed answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from data.chat_output import MalformedOutput, OutputReader, parse_tokens, split_tokens
from data.chat_template import STOP_TOKENS
from data.tokenizer import Tokenizer

_BOX = "\\boxed{"
# Marks around a whole answer that say nothing: what opens and what closes them.
_MARKS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("**", "**"),
    ("*", "*"),
    ("`", "`"),
)
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathsf|mathtt)\s*\{"
)


def boxed_answer(content: str) -> str | None:
    r"""What stands in the last `\boxed{...}`; None where there is none, its braces do not close, or
    it is empty.

    Without the marks around the whole of it: see `unwrapped`. `\{` and `\}` are characters of the
    answer and match nothing.
    """
    _, found, rest = content.rpartition(_BOX)
    place = _closing(rest) if found else None
    return None if place is None else unwrapped(rest[:place]) or None


def unwrapped(answer: str) -> str:
    r"""An answer without what is around the whole of it: `\text{}` and its like, dollars,
    Markdown's marks, a final full stop.
    """
    before = None
    while answer != before:
        before, answer = answer, answer.strip()
        if re.search(r"(?<!\\right)(?<!\\left)(?<![.\\])(?<=.)\.$", answer):
            answer = answer[:-1]
        words = _WORDS.match(answer)
        if words and _closing(answer[words.end() :]) == len(answer) - words.end() - 1:
            answer = answer[words.end() : -1]
        for opening, closing in _MARKS:
            inside = answer[len(opening) : -len(closing)]
            if (
                answer == opening + inside + closing
                and inside.strip()
                and opening not in inside
                and closing not in inside
            ):
                answer = inside
    return answer


def _closing(text: str) -> int | None:
    """Place of the brace that closes one opened before the text; None where there is none."""
    depth, escaped = 1, False
    for place, character in enumerate(text):
        if not escaped:
            depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return place
        escaped = character == "\\" and not escaped
    return None


def format_parts(
    tokenizer: Tokenizer,
    ids: Iterable[int],
    tools: Sequence[Mapping] | None = None,
    *,
    thinking: bool,
) -> dict[str, float]:
    """1 or 0 for each demand on a turn, from the tokens after the generation prompt, the one that
    stopped it included.

    readable: `data.chat_output.parse_tokens` takes it, so that nothing is out of place. thinking:
    it begins with a reasoning that ends, maybe empty; with thinking off, it has none. tool_calls:
    those that it makes are well-formed, and of `tools` where given.
    ended: by the stop token that fits, `<|observation|>` after tool calls and else another, which
    comes last. boxed: its content has a boxed answer.
    """
    ids = list(ids)
    pieces = split_tokens(tokenizer, ids)
    reader = OutputReader(tools, strict=False)
    stopped = bool(pieces) and pieces[-1][1] and pieces[-1][0] in STOP_TOKENS
    deltas = [
        delta for piece in (pieces[:-1] if stopped else pieces) for delta in reader.feed(*piece)
    ] + reader.finish()
    content = "".join(str(delta.value) for delta in deltas if delta.field == "content")
    calls = any(delta.field == "tool_calls" for delta in deltas)
    try:
        parse_tokens(tokenizer, ids, tools)
        wrong = ""
    except MalformedOutput as error:
        wrong = error.part
    parts = {
        "readable": not wrong,
        "thinking": _thinks(pieces, thinking),
        "tool_calls": not wrong.startswith("tool_calls"),
        "ended": stopped and (pieces[-1][0] == "<|observation|>") == calls,
        "boxed": boxed_answer(content) is not None,
    }
    return {name: float(value) for name, value in parts.items()}


def _thinks(pieces: Sequence[tuple[str, bool]], thinking: bool) -> bool:
    tags = [
        piece for piece, is_control in pieces if is_control and piece in ("<think>", "</think>")
    ]
    if not thinking:
        return not tags
    first = next((piece for piece in pieces if piece[1] or piece[0].strip()), None)
    return first == ("<think>", True) and tags == ["<think>", "</think>"]
