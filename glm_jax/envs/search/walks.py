"""Makes questions: walks through the graph away from an answer, then says of everything on the way
as little as still leaves one answer.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence

from glm_jax.envs.search.graph import Graph, words_of
from glm_jax.envs.search.question import Link, Range, Thing, answers, giving_page, problem_of
from glm_jax.envs.search.relations import KINDS, QUANTITIES, RELATIONS
from glm_jax.envs.search.short_answer import is_said

# Lengths of the walks that leave the answer: one of 2 hops at least, 2 to 4 hops together.
SHAPES = ((2,), (3,), (4,), (2, 1), (3, 1), (2, 2), (2, 1, 1))
MAX_LINKS = 20  # that a step may be one of, as seen from its end: who follows it back can try all
MAX_MENTIONS = 2000  # descriptions that a word may be in, of a thing that links lead to
MAX_FOUND = 15  # those of a walk's end, which a search must find by the word
WORDS = 3  # of a description that a question mentions at most
LEFT_OUT = -1  # a level: nothing is said of a thing, nor of what it is linked to
ASKED = {"package": 4, "concept": 4, "source": 1, "person": 1}  # kind of an answer -> its weight
LEFT = 5  # nodes that any one page must leave in question
SPREADS = (3.0, 1.5, 1.1)  # a number becomes a range from below number/spread to above its multiple


@dataclasses.dataclass(frozen=True)
class Draft:
    """A walk with all that could be said: of each thing on it, by its place in `Thing.all`, ways to
    say it, from the vaguest to the most exact.
    """

    thing: Thing
    choices: tuple[Sequence[Thing], ...]

    def said(self, levels: Sequence[int]) -> Thing:
        """The question with a choice for every thing, or LEFT_OUT."""
        places = iter(range(len(levels)))

        def rebuild(thing: Thing) -> Thing | None:
            deeper = [rebuild(link.thing) for link in thing.links]
            level = levels[place := next(places)]
            if level == LEFT_OUT:
                return None
            chosen = self.choices[place][level]
            links = [
                dataclasses.replace(link, thing=other)
                for link, other in zip(thing.links, deeper, strict=True)
                if other is not None
            ]
            return dataclasses.replace(chosen, links=(*links, *chosen.links))

        said = rebuild(self.thing)
        assert said is not None, "the last level is the answer's, which cannot be left out"
        return said

    @property
    def exact(self) -> list[int]:
        return [len(ways) - 1 for ways in self.choices]


class Walker:
    """Makes drafts and questions of a graph; the same ones for the same seed."""

    def __init__(self, graph: Graph, seed: int):
        self.graph, self.lots = graph, random.Random(seed)
        self.kinds = {kind: w for kind, w in ASKED.items() if kind in graph.of_kind}
        if not self.kinds:
            raise ValueError(f"the graph has no node of the kinds {', '.join(ASKED)}")
        self.numbers = {kind: sorted(graph.of_kind[kind]) for kind in self.kinds}
        known = {fact.relation for fact in graph.facts}
        self.relations = [name for name in RELATIONS if name in known]

    def draft(self) -> Draft:
        """A walk that has one answer at least where everything is said exactly."""
        while True:
            [kind] = self.lots.choices(list(self.kinds), list(self.kinds.values()))
            root = self.lots.choice(self.numbers[kind])
            thing = self._walk(root, self.lots.choice(SHAPES))
            if thing is None:
                continue
            found = Draft(thing, tuple(self._ways(t, root) for t in thing.all()))
            if set(answers(self.graph, found.said(found.exact))) == {root}:
                return found

    def questions(self, tries: int) -> Iterator[Thing | None]:
        """Of each draft its question, or None where it is no good: `problem_of` finds something, a
        page leaves little in question, a link is not needed, or a thing is named that is not at a
        walk's end.
        """
        for _ in range(tries):
            draft = self.draft()
            thing = draft.said(self.blurred(draft))
            good = (
                not any(t.name and t.links for t in thing.all())
                and self._needed(thing)
                and giving_page(self.graph, thing, LEFT) is None
                and problem_of(self.graph, thing) is None
            )
            yield thing if good else None

    def blurred(self, draft: Draft) -> list[int]:
        """A level for each thing: of one after the other, ends of walks last, the vaguest that
        leaves one answer where the following ones are said exactly.
        """
        levels, things = draft.exact, list(draft.thing.all())
        places = list(range(len(levels)))
        self.lots.shuffle(places)
        for place in sorted(places, key=lambda p: not things[p].links):
            for level in range(levels[place]):
                tried = [*levels[:place], level, *levels[place + 1 :]]
                if len(answers(self.graph, draft.said(tried))) == 1:
                    levels = tried
                    break
        return levels

    def _walk(self, root: int, shape: Sequence[int]) -> Thing | None:
        """A tree with only its nodes and links; None: a walk came to no step that it may take."""
        taken = {root}

        def steps(node: int, length: int) -> Link | None:
            found = []
            for relation in self.relations:
                for forward in (True, False):
                    others = [
                        other
                        for other in self.graph.linked(relation, forward, node)[: 10 * MAX_LINKS]
                        if other not in taken
                        and KINDS[self.graph.nodes[other].kind].page
                        and len(self.graph.linked(relation, not forward, other)) <= MAX_LINKS
                    ]
                    if others:
                        found.append((relation, forward, others))
            if not found:
                return None
            relation, forward, others = self.lots.choice(found)
            other = self.lots.choice(others)
            taken.add(other)
            further = [] if length == 1 else [steps(other, length - 1)]
            if None in further:
                return None
            links = tuple(link for link in further if link is not None)
            return Link(relation, forward, Thing(other, self.graph.nodes[other].kind, links=links))

        links = [steps(root, length) for length in shape]
        if None in links:
            return None
        made = tuple(link for link in links if link is not None)
        return Thing(root, self.graph.nodes[root].kind, links=made)

    def _ways(self, thing: Thing, root: int) -> list[Thing]:
        """Ways to say a thing without its walk, from the vaguest on. The last says all but, of the
        answer, its name.
        """
        node, bare = self.graph.nodes[thing.node], dataclasses.replace(thing, links=())
        extra = self._extra(thing)
        words = self._words(thing.node, root, MAX_MENTIONS if thing.links else MAX_FOUND)
        ways = [bare] if thing.links else []
        ways += [dataclasses.replace(bare, words=tuple(words[: n + 1])) for n in range(len(words))]
        if extra and thing.links:
            ways += [dataclasses.replace(bare, **part) for part in extra]
            ways += [dataclasses.replace(bare, words=tuple(words[:2]), **part) for part in extra]
        if thing.node == root:
            return ways
        unsaid = not any(is_said(name, node.about) for name in self._names(thing.node, root))
        if node.about and unsaid:
            ways.append(dataclasses.replace(bare, about=node.about))
        return [*ways, dataclasses.replace(bare, name=node.names[0])]

    def _extra(self, thing: Thing) -> list[dict]:
        """What else may be said: of a number its range, from wide to narrow, and a link to what has
        no page.
        """
        found: list[dict] = []
        for quantity in QUANTITIES:
            if (number := self.graph.numbers.get((quantity, thing.node))) is not None:
                found += [{"ranges": (range_of(quantity, number, s),)} for s in SPREADS]
        for relation in self.relations:
            for other in self.graph.linked(relation, True, thing.node)[:1]:
                kind, names, _ = self.graph.nodes[other]
                if not KINDS[kind].page:
                    link = Link(relation, True, Thing(other, kind, name=names[0]))
                    found.append({"links": (link,)})
        self.lots.shuffle(found)
        return found

    def _names(self, *numbers: int) -> list[str]:
        return [name for number in numbers for name in self.graph.nodes[number].names]

    def _words(self, number: int, root: int, most: int) -> list[str]:
        """Words of a description to recognise it by: not of a name, not too common, and the first
        in `most` descriptions at most.
        """
        node = self.graph.nodes[number]
        names = re.findall("[a-z]{3,}", " ".join(self._names(number, root)).lower())
        mentions = {
            word: len(self.graph.mentioning[node.kind, word])
            for word in sorted(words_of(node.about))
            if not any(part in word or word in part for part in names)
        }
        words = [word for word, count in mentions.items() if count <= MAX_MENTIONS]
        self.lots.shuffle(words)
        first = next((word for word in words if mentions[word] <= most), None)
        if first is None:
            return []
        return [first, *(word for word in words if word != first)][:WORDS]

    def _needed(self, thing: Thing) -> bool:
        """Whether without any one link to a thing with a page there were more answers."""
        return all(len(answers(self.graph, less)) > 1 for less in without_a_link(thing))


def without_a_link(thing: Thing) -> Iterator[Thing]:
    """The question without one of its links to things with pages, for each of them."""
    for i, link in enumerate(thing.links):
        rest = (*thing.links[:i], *thing.links[i + 1 :])
        if KINDS[link.thing.kind].page:
            yield dataclasses.replace(thing, links=rest)
        for less in without_a_link(link.thing):
            changed = dataclasses.replace(link, thing=less)
            yield dataclasses.replace(thing, links=(*thing.links[:i], changed, *rest[i:]))


def range_of(quantity: str, number: int, spread: float) -> Range:
    """With ends of two digits that hold the number."""
    low, high = int(number / spread), int(number * spread) + 1
    unit = 10 ** max(0, len(str(high)) - 2)
    return Range(quantity, low // unit * unit, -(-high // unit) * unit)
