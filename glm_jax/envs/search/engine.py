"""A search engine (tantivy) over the pages of a corpus, and their reader. An index is read-only
once it is made, and opened once in a process: all episodes share it.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from glm_jax.envs.search.graph import COMMAND

INDEX = "index"  # in the corpus folder
WRITER_BYTES = 256 * 2**20
SNIPPET = 200  # characters of a page that a search shows
TITLE_BOOST = 3.0  # a word of the title counts as much as this many of the text


class Hit(NamedTuple):
    page: int
    title: str
    snippet: str


class Page(NamedTuple):
    title: str
    text: str


class Corpus:
    """Pages that can be searched and read. Any number of threads may ask."""

    def __init__(self, folder: str):
        """Raises ValueError where the folder has no index, or tantivy is not installed."""
        tantivy = _tantivy()
        path = pathlib.Path(folder) / INDEX
        if not path.is_dir() or not tantivy.Index.exists(str(path)):
            raise ValueError(f"corpus {folder!r} has no search index: make it with {COMMAND}")
        self._index = tantivy.Index.open(str(path))
        self._searcher = self._index.searcher()

    def search(self, query: str, count: int) -> list[Hit]:
        """The best `count` pages for the query's words; text in double quotes, and a word with
        hyphens or points in it, must stand as it is. None where the query has no word.
        """
        words = query_of(query)
        if not words:
            return []
        parsed = self._index.parse_query(words, ["title", "text"], {"title": TITLE_BOOST})
        show = _tantivy().SnippetGenerator.create(
            self._searcher, parsed, self._index.schema, "text"
        )
        show.set_max_num_chars(SNIPPET)
        found = []
        for _, address in self._searcher.search(parsed, count).hits:
            document = self._searcher.doc(address)
            fields = document.to_dict()
            [page], [title], [text] = fields["page"], fields["title"], fields["text"]
            snippet = " ".join(show.snippet_from_doc(document).fragment().split())
            found.append(Hit(page, title, snippet or text[:SNIPPET]))
        return found

    def page(self, number: int) -> Page | None:
        """None: there is no such page."""
        query = _tantivy().Query.term_query(self._index.schema, "page", number)
        hits = self._searcher.search(query, 1).hits
        if not hits:
            return None
        fields = self._searcher.doc(hits[0][1]).to_dict()
        [title], [text] = fields["title"], fields["text"]
        return Page(title, text)


def query_of(query: str) -> str:
    """In tantivy's language: words, which are any of many, and phrases. Nothing else of it can be
    said, so that no query is wrong. Lower case: AND, OR, NOT and IN are words as any other.
    """
    found = []
    for phrase, word in re.findall(r'"([^"]*)"|(\w+(?:[-.+]+\w+)*)', query.lower()):
        words = re.findall(r"\w+", phrase or word)
        if words:
            found.append(f'"{" ".join(words)}"' if len(words) > 1 else words[0])
    return " ".join(found)


def write_index(folder: pathlib.Path, pages: Iterable[tuple[int, str, str]], done: Callable):
    """pages: number, title and text. done: is called after each. Raises ValueError where tantivy
    is not installed.
    """
    tantivy = _tantivy()
    schema = tantivy.SchemaBuilder()
    schema.add_integer_field("page", stored=True, indexed=True)
    for field in ("title", "text"):
        schema.add_text_field(field, stored=True, tokenizer_name="en_stem")
    path = folder / INDEX
    path.mkdir(parents=True)
    writer = tantivy.Index(schema.build(), path=str(path)).writer(WRITER_BYTES, 1)
    for number, title, text in pages:
        writer.add_document(tantivy.Document(page=number, title=title, text=text))
        done()
    writer.commit()
    writer.wait_merging_threads()


_opened: dict[str, Corpus] = {}
_lock = threading.Lock()


def corpus_at(folder: str) -> Corpus:
    """The corpus of a folder, opened at the first use. Errors as Corpus."""
    with _lock:
        if folder not in _opened:
            _opened[folder] = Corpus(folder)
        return _opened[folder]


def _tantivy():
    if importlib.util.find_spec("tantivy") is None:
        raise ValueError("web search needs tantivy: pip install -r requirements-search.txt")
    import tantivy

    return tantivy
