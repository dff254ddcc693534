"""Whether a short answer in words is the right one: all of it, but for case, articles, spaces and
punctuation.
"""

from __future__ import annotations

import re
import unicodedata


def normalised(text: str) -> str:
    """Lower case, without articles, and one space for all that is no letter, digit or plus."""
    words = re.findall(r"[\w+]+", unicodedata.normalize("NFKC", text).casefold().replace("_", " "))
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words)


def is_said(name: str, text: str) -> bool:
    """Whether a text has the words of a name next to each other."""
    return f" {normalised(name)} " in f" {normalised(text)} "
