"""Sampled tokens to text while more are being sampled: never half a character, never the beginning
of a stop string.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what `decode` makes of bytes that are no character, or not yet one


@dataclasses.dataclass(frozen=True)
class Token:
    """A token and its text; a character that several tokens make up is the last one's. logprob:
    None where nothing was before it.
    """

    id: int
    logprob: float | None
    text: str
    is_cut: bool = False  # by a stop string


class Detokenizer:
    """Token ids one by one to text. The parts add up to the text of all ids at once."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        """decode: ids to text, bytes that are no UTF-8 as U+FFFD."""
        self._decode = decode
        self._ids: list[int] = []  # those whose text is not all out
        self._out = 0  # characters of their text that are

    @property
    def incomplete(self) -> bool:
        """The last id may have begun a character that the next one completes."""
        return bool(self._ids)

    def push(self, token: int) -> tuple[str, str]:
        """The text that is certain now and was not before: of the ids before `token`, and its
        own.
        """
        rest = ""
        if self._ids:
            own = self._decode([token])
            if not own:  # an id that stands for nothing
                return "", ""
            if self._decode([*self._ids, token]) == self._decode(self._ids) + own:
                # no character lies across: what came before stays as broken as it is
                rest = self.finish()
        self._ids.append(token)
        text = self._decode(self._ids)
        # The bytes of an incomplete character make one U+FFFD at the end; what precedes it is
        # certain.
        certain = len(text) - text.endswith(_BROKEN)
        new, self._out = text[self._out : certain], certain
        if certain == len(text):
            self._ids, self._out = [], 0
        return rest, new

    def finish(self) -> str:
        """The rest, where no more ids come."""
        rest = self._decode(self._ids)[self._out :]
        self._ids, self._out = [], 0
        return rest


class TextStream:
    """Tokens one by one to tokens with text, held back while they may be part of a stop string.

    `stopped` once there was one: the text ends in front of the first, the token that it begins in
    is cut.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()):
        self._detokenizer = Detokenizer(decode)
        self._stops = stop_strings
        self._held: list[Token] = []
        self._half = 0  # of the tokens held, the last ones that share an incomplete character
        self.stopped = False

    def push(self, token: int, logprob: float | None) -> list[Token]:
        """The tokens that are certain now and were not before."""
        if self.stopped:
            return []
        rest, own = self._detokenizer.push(token)
        if rest:
            self._held[-1] = dataclasses.replace(self._held[-1], text=self._held[-1].text + rest)
        self._held.append(Token(token, logprob, own))
        self._half = self._half + 1 if self._detokenizer.incomplete else 0
        if self._stops_now():
            return self._cut()
        text = "".join(t.text for t in self._held)
        certain, count = len(text) - self._possible_stop(text), 0
        for held in self._held[: len(self._held) - self._half]:
            certain -= len(held.text)
            if certain < 0:
                break
            count += 1
        out, self._held = self._held[:count], self._held[count:]
        return out

    def finish(self) -> list[Token]:
        """The tokens that were held back, where no more come."""
        if self._held:
            last = self._held[-1]
            self._held[-1] = dataclasses.replace(last, text=last.text + self._detokenizer.finish())
        if self._stops_now():
            return self._cut()
        out, self._held = self._held, []
        return out

    def _stops_now(self) -> bool:
        text = "".join(t.text for t in self._held)
        self.stopped = self.stopped or any(stop in text for stop in self._stops)
        return self.stopped

    def _cut(self) -> list[Token]:
        """The tokens held in front of the first stop string; nothing is held any more."""
        text, out = "".join(t.text for t in self._held), []
        room = min((text.index(stop) for stop in self._stops if stop in text), default=0)
        for held in self._held:
            if room <= 0:
                break
            out.append(
                dataclasses.replace(held, text=held.text[:room], is_cut=len(held.text) > room)
            )
            room -= len(held.text)
        self._held = []
        return out

    def _possible_stop(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-n:]) for s in self._stops)
            ),
            0,
        )
