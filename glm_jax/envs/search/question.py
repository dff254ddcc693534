"""A question over a knowledge graph: what it says of the thing in question, whose answers it
has, and whether one page alone gives them away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from glm_jax.envs.search.graph import Graph, words_of
from glm_jax.envs.search.relations import KINDS, QUANTITIES, RELATIONS


@dataclasses.dataclass(frozen=True)
class Range:
    """A quantity's value lies from `low` to `high`, both included."""

    quantity: str
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Link:
    """A fact between a thing and another: the thing is its subject where `forward`."""

    relation: str
    forward: bool
    thing: Thing


@dataclasses.dataclass(frozen=True)
class Thing:
    """What a question says of one thing; all of it holds at once.

    node: that the question was made from. name: "" where the question does not say it. about: the
    whole description; words: some of its words. links: to further things, which make a tree; the
    one in question is its root.
    """

    node: int
    kind: str
    name: str = ""
    about: str = ""
    words: tuple[str, ...] = ()
    ranges: tuple[Range, ...] = ()
    links: tuple[Link, ...] = ()

    def all(self) -> Iterator[Thing]:
        """Those that it is linked to, however far, before itself."""
        for link in self.links:
            yield from link.thing.all()
        yield self

    @property
    def says_nothing(self) -> bool:
        """Whether it may be anything of its kind."""
        return not (self.name or self.about or self.words or self.ranges or self.links)

    @property
    def hops(self) -> int:
        """Links between things that have pages."""
        return sum(bool(KINDS[link.thing.kind].page) for t in self.all() for link in t.links)


def answers(graph: Graph, thing: Thing) -> Collection[int]:
    """The nodes that a question is true of."""
    sets: list[Collection[int]] = [graph.of_kind.get(thing.kind, ())]
    if thing.name:
        sets.append(graph.called.get((thing.kind, thing.name), ()))
    sets += [graph.mentioning.get((thing.kind, word), ()) for word in thing.words]
    anything = [link for link in thing.links if link.thing.says_nothing]
    sets += [graph.linking.get((n.relation, n.forward, n.thing.kind), ()) for n in anything]
    smallest, *rest = sorted(sets, key=len)
    found = set(smallest).intersection(*rest)
    if thing.about:
        found = {node for node in found if graph.nodes[node].about == thing.about}
    for limits in thing.ranges:
        numbers, quantity = graph.numbers, limits.quantity
        found = {n for n in found if limits.low <= numbers.get((quantity, n), -1) <= limits.high}
    for link in thing.links:
        if not found or link.thing.says_nothing:
            continue
        others = answers(graph, link.thing)
        step = lambda node, forward: graph.linked(link.relation, forward, node)  # noqa: B023
        if len(others) < len(found):
            found &= {n for other in others for n in step(other, not link.forward)}
        else:
            found = {n for n in found if any(o in others for o in step(n, link.forward))}
    return found


def stated_on(graph: Graph, thing: Thing, page: int) -> Thing:
    """What is left of a question when only what one page says can be used: a node's description
    and numbers are on its own page, a fact on the pages that state it.
    """
    own = page == thing.node
    links = tuple(
        dataclasses.replace(link, thing=stated_on(graph, link.thing, page))
        for link in thing.links
        if page in pages_of(graph, thing, link)
    )
    return dataclasses.replace(
        thing, about=thing.about if own else "", words=thing.words if own else (),
        ranges=thing.ranges if own else (), links=links,
    )  # fmt: skip


def pages_of(graph: Graph, thing: Thing, link: Link) -> Collection[int]:
    """The pages that state the fact which a link was made from."""
    ends = (thing.node, link.thing.node)
    subject, object_ = ends if link.forward else ends[::-1]
    return graph.pages_stating(subject, link.relation, object_)


def giving_page(graph: Graph, thing: Thing, least: int = 2) -> int | None:
    """A page that gives the answer away: the clues that can be checked on it leave fewer than
    `least` nodes in the whole graph, without any other page; or all clues can be read on it, if
    only of other things than those of the walk. None: there is none, as it should be.
    """
    pages = {page for t in thing.all() for link in t.links for page in pages_of(graph, t, link)}
    for page in sorted(pages | {thing.node}):
        if len(answers(graph, stated_on(graph, thing, page))) < least:
            return page
    near = {
        page
        for link in thing.links[:1]
        for other in graph.linked(link.relation, link.forward, thing.node)
        for page in pages_of(graph, thing, _ending(link, other))
    }
    return next((p for p in sorted(near) if readable_on(graph, thing, thing.node, p)), None)


def readable_on(graph: Graph, thing: Thing, node: int, page: int) -> bool:
    """Whether a page says of a node all that a question says of a thing."""
    alone = dataclasses.replace(thing, links=())
    bare = Thing(thing.node, thing.kind, thing.name)
    if node not in answers(graph, alone) or (alone != bare and page != node):
        return False
    here = dataclasses.replace(thing, node=node)
    return all(
        any(
            page in pages_of(graph, here, _ending(link, other))
            and readable_on(graph, link.thing, other, page)
            for other in graph.linked(link.relation, link.forward, node)
        )
        for link in thing.links
    )


def _ending(link: Link, node: int) -> Link:
    """The link, to another node."""
    return dataclasses.replace(link, thing=dataclasses.replace(link.thing, node=node))


def problem_of(graph: Graph, thing: Thing) -> str | None:
    """What makes a question useless; None: it has one answer, which no page gives by itself."""
    for t in thing.all():
        if t.node not in range(len(graph.nodes)):
            return f"unknown node {t.node}; valid: 0 to {len(graph.nodes) - 1}"
    found = answers(graph, thing)
    if set(found) != {thing.node}:
        names = [graph.nodes[n].names[0] for n in sorted(found)]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        return f"has {len(names)} answers, not one: {shown or 'none'}"
    for t in thing.all():
        for link in t.links:
            if not pages_of(graph, t, link):
                names = [graph.nodes[n].names[0] for n in (t.node, link.thing.node)]
                return f"no page states {link.relation} between {names[0]!r} and {names[1]!r}"
    if (page := giving_page(graph, thing)) is not None:
        return f"the page {graph.nodes[page].names[0]!r} gives the answer by itself"
    return None


def to_json(thing: Thing) -> dict[str, Any]:
    """Without what is empty."""
    return dataclasses.asdict(
        thing, dict_factory=lambda pairs: {k: v for k, v in pairs if v not in ("", ())}
    )


def from_json(entry: Any, where: str = "clues") -> Thing:
    """The inverse of to_json, after JSON. Raises ValueError naming the field that is wrong."""
    fields = _fields(entry, Thing, ("node", "kind"), where)
    _check(type(entry["node"]) is int, f"{where}.node", entry["node"], "a whole number")
    _choose(entry["kind"], KINDS, f"{where}.kind")
    for name in ("name", "about"):
        _check(isinstance(fields[name], str), f"{where}.{name}", fields[name], "a string")
    for name in ("words", "ranges", "links"):
        of_list = isinstance(fields[name], list | tuple)
        _check(of_list, f"{where}.{name}", fields[name], "a list")
    for word in fields["words"]:
        lower = isinstance(word, str) and words_of(word) == {word}
        _check(lower, f"{where}.words", word, "a word of 4 letters or more, a to z")
    ranges, links = [], []
    for i, part in enumerate(fields["ranges"]):
        at = f"{where}.ranges[{i}]"
        values = _fields(part, Range, ("quantity", "low", "high"), at)
        _choose(part["quantity"], QUANTITIES, f"{at}.quantity")
        for name in ("low", "high"):
            _check(type(part[name]) is int, f"{at}.{name}", part[name], "a whole number")
        ranges.append(Range(**values))
    for i, part in enumerate(fields["links"]):
        at = f"{where}.links[{i}]"
        _fields(part, Link, ("relation", "forward", "thing"), at)
        _choose(part["relation"], RELATIONS, f"{at}.relation")
        _check(isinstance(part["forward"], bool), f"{at}.forward", part["forward"], "true or false")
        links.append(Link(part["relation"], part["forward"], from_json(part["thing"], at)))
    parts = {"words": tuple(fields["words"]), "ranges": tuple(ranges), "links": tuple(links)}
    return Thing(**{**fields, **parts})


def _fields(entry: Any, cls: type, required: tuple[str, ...], where: str) -> dict[str, Any]:
    """The fields of a JSON object, with the defaults of those that it may lack."""
    _check(isinstance(entry, Mapping), where, entry, "an object")
    fields = dataclasses.fields(cls)
    for name in entry:
        _choose(name, [f.name for f in fields], where)
    for name in required:
        _check(name in entry, f"{where}.{name}", "nothing", "there")
    return {f.name: entry.get(f.name, f.default) for f in fields}


def _check(right: bool, where: str, value: Any, valid: str):
    if not right:
        raise ValueError(f"{where}={value!r} must be {valid}")


def _choose(value: Any, valid: Collection[str], where: str):
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{where}: {value!r} is not one of {', '.join(valid)}")
