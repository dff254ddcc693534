"""The two tools of the web search environment, as text: what a call is answered with. A bad call
is answered with an error that says what is valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.chat_messages import TemplateError, arguments_of
from glm_jax.envs.search.engine import Corpus

MAX_CALLS = 8  # of a turn; further ones are not made
MAX_QUERY = 500  # characters
MAX_RESULTS, RESULTS = 20, 5
WINDOW = 4000  # characters of a page that a call shows


def _tool(name: str, about: str, properties: Mapping[str, Any], required: str) -> Mapping[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [required]}
    function = {"name": name, "description": about, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _tool(
        "search",
        "Searches the corpus: page numbers, titles and snippets, the best first. Pages that link to"
        ' a page are found by its title and number as a phrase: "bash 1848".',
        {
            "query": {"type": "string", "description": "Words; a phrase in double quotes."},
            "k": {"type": "integer", "description": f"Results, 1 to {MAX_RESULTS}."},
        },
        "query",
    ),
    _tool(
        "open",
        "Reads a page. Numbers in brackets are those of other pages.",
        {
            "page": {"type": "integer", "description": "Its number."},
            "from": {"type": "integer", "description": "The character to begin with."},
        },
        "page",
    ),
]


def result(corpus: Corpus, call: Mapping) -> str:
    """What a tool call, as data.chat_output.parse gives it, is answered with."""
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in ANSWERS or not isinstance(function, Mapping):
        return f"error: no tool {name!r}; valid: {', '.join(ANSWERS)}"
    try:
        return ANSWERS[name](corpus, arguments_of(function, name))
    except TemplateError as error:
        return f"error: {error}"


def search(corpus: Corpus, arguments: Mapping) -> str:
    query = arguments.get("query")
    if not isinstance(query, str) or not query.strip():
        return f"error: query={_shown(query)} must be text"
    if len(query) > MAX_QUERY:
        return f"error: a query of {len(query)} characters; at most {MAX_QUERY}"
    count = _whole(arguments.get("k", RESULTS))
    if count is None or not 1 <= count <= MAX_RESULTS:
        return f"error: k={_shown(arguments.get('k'))} must be a number from 1 to {MAX_RESULTS}"
    hits = corpus.search(query, count)
    return "\n".join(f"[{h.page}] {h.title}: {h.snippet}" for h in hits) or "no page was found"


def open_page(corpus: Corpus, arguments: Mapping) -> str:
    number = _whole(arguments.get("page"))
    page = None if number is None else corpus.page(number)
    if page is None:
        shown = _shown(arguments.get("page"))
        return f"error: no page {shown}; valid are the numbers in brackets of results and pages"
    start = _whole(arguments.get("from", 0))
    if start is None or not 0 <= start < len(page.text):
        shown = _shown(arguments.get("from"))
        return f"error: from={shown} must be a number from 0 to {len(page.text) - 1}"
    end = start + WINDOW
    if start == 0 and end >= len(page.text):
        return page.text
    more = f"; go on with from={end}" if end < len(page.text) else ""
    note = f"(characters {start} to {min(end, len(page.text))} of {len(page.text)}{more})"
    return f"{page.text[start:end]}\n{note}"


ANSWERS = {"search": search, "open": open_page}


def _whole(value: Any) -> int | None:
    """A whole number, or the digits of one; None: it is something else, or too large to be one of
    a page.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    return value if type(value) is int and abs(value) < 2**31 else None


def _shown(value: Any) -> str:
    """A value of any size in an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
