"""Puts a question into plain English, in one of several ways."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from glm_jax.envs.search.question import Link, Thing
from glm_jax.envs.search.relations import KINDS, QUANTITIES, RELATIONS

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPENINGS = (
    "I am looking for {} A.",
    "Which is {} A?",
    "Find {} A, of which all this is true.",
)
MENTIONS = ("has a description that mentions {}", "is described with {}")
DESCRIBED = ("is described as “{}”", "has the description “{}”")
INSTRUCTIONS = (
    "Search the corpus with `search`, and read its pages with `open`. Put the name alone into"
    " \\boxed{}, as the title of its page has it."
)


def composed(thing: Thing, seed: int) -> str:
    """A question with its instructions: the same for the same seed. What is true of things on the
    way is said of letters, or, where nothing forks, in one sentence.
    """
    lots = random.Random(seed)
    if is_chain(thing) and lots.random() < 0.5:
        return f"Which is {_clauses(thing, KINDS[thing.kind].asked, lots)}?\n\n{INSTRUCTIONS}"
    lines = [lots.choice(OPENINGS).format(KINDS[thing.kind].asked), *_sentences(thing, lots)]
    return f"{' '.join(lines)}\n\n{INSTRUCTIONS}"


def is_chain(thing: Thing) -> bool:
    """Whether nothing on the way has two links to things with pages."""
    return all(len(_further(t)) < 2 for t in thing.all())


def _further(thing: Thing) -> list[Link]:
    return [link for link in thing.links if KINDS[link.thing.kind].page]


def _listed(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def own_clauses(thing: Thing) -> list[str]:
    """What is said of a thing without another one that has a page, for a list."""
    return list(_own(thing, random.Random(0)))


def _own(thing: Thing, lots: random.Random) -> Iterator[str]:
    if thing.words:
        words = _listed([f"“{word}”" for word in thing.words])
        yield lots.choice(MENTIONS).format(words)
    if thing.about:
        yield lots.choice(DESCRIBED).format(thing.about)
    for limits in thing.ranges:
        yield lots.choice(QUANTITIES[limits.quantity].between).format(limits.low, limits.high)
    for link in thing.links:
        if not KINDS[link.thing.kind].page:
            noun = KINDS[link.thing.kind].noun
            yield f"{_verb(link, lots)} the {noun} “{link.thing.name}”"


def _verb(link: Link, lots: random.Random) -> str:
    relation = RELATIONS[link.relation]
    return lots.choice(relation.active if link.forward else relation.passive)


def _called(thing: Thing) -> str:
    noun = KINDS[thing.kind].noun
    return f"the {noun} “{thing.name}”" if thing.name else f"a {noun}"


def _clauses(thing: Thing, noun: str, lots: random.Random) -> str:
    """A noun with all that is said, what has further clauses last: so none can be taken for
    another thing's.
    """
    clauses = list(_own(thing, lots))
    for link in _further(thing):
        other = _clauses(link.thing, _called(link.thing), lots)
        clauses.append(f"{_verb(link, lots)} {other}")
    return f"{noun} that {' and '.join(clauses)}" if clauses else noun


def _sentences(thing: Thing, lots: random.Random) -> Iterator[str]:
    letters = iter(LETTERS)

    def say(thing: Thing, letter: str) -> Iterator[str]:
        for clause in _own(thing, lots):
            yield f"{letter} {clause}."
        for link in _further(thing):
            other = f"“{link.thing.name}”" if link.thing.name else next(letters)
            called = _called(link.thing) + ("" if link.thing.name else f", {other}")
            yield f"{letter} {_verb(link, lots)} {called}."
            yield from say(link.thing, other)

    return say(thing, next(letters))
