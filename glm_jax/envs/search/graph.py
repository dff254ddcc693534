"""A knowledge graph whose every fact names the page that states it, and those pages as text."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from glm_jax.envs.search.relations import KINDS, QUANTITIES, RELATIONS
from glm_jax.files import write_text

NODES, FACTS = "nodes.jsonl", "facts.jsonl"  # in the corpus folder
COMMAND = "python -m experiments.search_tasks"  # makes the folder
SEPARATOR = "; "  # of what a line of a page lists


class Node(NamedTuple):
    """kind: one of KINDS. names: the first is its title. about: a description in a sentence; ""
    where there is none.
    """

    kind: str
    names: tuple[str, ...]
    about: str


class Fact(NamedTuple):
    """Two nodes by their numbers and a relation of RELATIONS; or a node, a quantity of QUANTITIES
    and a whole number. page: the number of the node whose page states it. A fact that two pages
    state is there twice.
    """

    subject: int
    relation: str
    object: int
    page: int


class Graph:
    """Nodes, by their numbers, and facts. A node's page has the node's number, and states its names
    and its description.

    Raises ValueError for a fact with an unknown relation, node or page.
    """

    def __init__(self, nodes: Sequence[Node], facts: Sequence[Fact]):
        self.nodes, self.facts = list(nodes), list(facts)
        self.links: dict[tuple[str, bool, int], list[int]] = collections.defaultdict(list)
        self.numbers: dict[tuple[str, int], int] = {}
        self._stated: dict[tuple[int, str, int], list[int]] = collections.defaultdict(list)
        for fact in self.facts:
            subject, relation, object_, page = fact
            if (problem := self._problem(fact)) is not None:
                raise ValueError(f"{fact}: {problem}")
            pages = self._stated[subject, relation, object_]
            if relation in QUANTITIES:
                self.numbers[relation, subject] = object_
            elif not pages:
                self.links[relation, True, subject].append(object_)
                self.links[relation, False, object_].append(subject)
            pages.append(page)

    def _problem(self, fact: Fact) -> str | None:
        known = range(len(self.nodes))
        if fact.relation not in RELATIONS and fact.relation not in QUANTITIES:
            return f"unknown relation; valid: {', '.join([*RELATIONS, *QUANTITIES])}"
        ends = [fact.subject] if fact.relation in QUANTITIES else [fact.subject, fact.object]
        if any(end not in known for end in ends):
            return f"unknown node; valid: 0 to {len(self.nodes) - 1}"
        if fact.page not in ends or not KINDS[self.nodes[fact.page].kind].page:
            return "its page must be that of its subject or its object"
        return None

    def linked(self, relation: str, forward: bool, node: int) -> Sequence[int]:
        """The objects of the node's facts of a relation; with forward=False the subjects of those
        facts whose object it is.
        """
        return self.links.get((relation, forward, node), ())

    def pages_stating(self, subject: int, relation: str, object_: int) -> Sequence[int]:
        return self._stated.get((subject, relation, object_), ())

    @functools.cached_property
    def of_kind(self) -> dict[str, frozenset[int]]:
        found = collections.defaultdict(set)
        for number, node in enumerate(self.nodes):
            found[node.kind].add(number)
        return {kind: frozenset(numbers) for kind, numbers in found.items()}

    @functools.cached_property
    def called(self) -> dict[tuple[str, str], frozenset[int]]:
        """(kind, name) -> nodes with that name."""
        found = collections.defaultdict(set)
        for number, node in enumerate(self.nodes):
            for name in node.names:
                found[node.kind, name].add(number)
        return {key: frozenset(numbers) for key, numbers in found.items()}

    @functools.cached_property
    def mentioning(self) -> dict[tuple[str, str], frozenset[int]]:
        """(kind, word) -> nodes whose description holds the word."""
        found = collections.defaultdict(set)
        for number, node in enumerate(self.nodes):
            for word in words_of(node.about):
                found[node.kind, word].add(number)
        return {key: frozenset(numbers) for key, numbers in found.items()}

    @functools.cached_property
    def linking(self) -> dict[tuple[str, bool, str], frozenset[int]]:
        """(relation, forward, kind) -> nodes that are linked so to any node of the kind."""
        found = collections.defaultdict(set)
        for (relation, forward, node), others in self.links.items():
            for kind in {self.nodes[other].kind for other in others}:
                found[relation, forward, kind].add(node)
        return {key: frozenset(numbers) for key, numbers in found.items()}

    @functools.cached_property
    def facts_of_page(self) -> dict[int, list[Fact]]:
        found = collections.defaultdict(list)
        for fact in self.facts:
            found[fact.page].append(fact)
        return found

    def pages(self) -> Iterator[tuple[int, str, str]]:
        """(number, title, text) of each page. A link is the name of a node with its page's number
        after it, in brackets.
        """
        for number, node in enumerate(self.nodes):
            if KINDS[node.kind].page:
                yield number, node.names[0], self.page_text(number)

    def page_text(self, page: int) -> str:
        node = self.nodes[page]
        lines = [node.names[0], f"{KINDS[node.kind].page}. {node.about}".rstrip()]
        if len(node.names) > 1:
            lines.append(f"Also called: {SEPARATOR.join(node.names[1:])}")
        lists = collections.defaultdict(list)
        for fact in self.facts_of_page.get(page, ()):
            if fact.relation in QUANTITIES:
                quantity = QUANTITIES[fact.relation]
                lists[quantity.label].append(f"{fact.object} {quantity.unit}")
                continue
            relation = RELATIONS[fact.relation]
            if page == fact.subject:
                lists[relation.label].append(self.link(fact.object))
            else:
                lists[relation.back].append(self.link(fact.subject))
        lines += [f"{label}: {SEPARATOR.join(entries)}" for label, entries in lists.items()]
        return "\n".join(lines) + "\n"

    def link(self, number: int) -> str:
        node = self.nodes[number]
        return f"{node.names[0]} [{number}]" if KINDS[node.kind].page else node.names[0]

    def write(self, folder: pathlib.Path):
        for name, rows in ((NODES, self.nodes), (FACTS, self.facts)):
            write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))


def read_graph(folder: str | pathlib.Path) -> Graph:
    """What `write` wrote. Raises ValueError where it is not there."""
    rows = []
    with no_collection():
        for name in (NODES, FACTS):
            path = pathlib.Path(folder) / name
            if not path.is_file():
                raise ValueError(f"corpus {str(folder)!r} has no {name}: make it with {COMMAND}")
            with path.open(encoding="utf-8") as lines:
                rows.append([json.loads(line) for line in lines])
        nodes = [Node(kind, tuple(names), about) for kind, names, about in rows[0]]
        return Graph(nodes, [Fact(*row) for row in rows[1]])


@contextlib.contextmanager
def no_collection():
    """While millions of objects are made that stay, the garbage collector would look at all of them
    again and again, and find nothing.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def words_of(text: str) -> frozenset[str]:
    """The words of a description by which it may be recognised: 4 letters at least, lower case."""
    return frozenset(re.findall(r"[a-z]{4,}", text.lower()))


def joined(first: Graph, second: Graph) -> Graph:
    """Both graphs in one, without a fact between them."""
    shift = len(first.nodes)
    moved = (
        Fact(s + shift, r, o if r in QUANTITIES else o + shift, p + shift)
        for s, r, o, p in second.facts
    )
    return Graph([*first.nodes, *second.nodes], list(itertools.chain(first.facts, moved)))
