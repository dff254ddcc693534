"""The oracle of questions: every node of the graph is tried, on the bare list of facts. Slow, and
without a line of what `question` and `walks` use to be quick.
"""

from __future__ import annotations

import re

from glm_jax.envs.search.graph import Graph
from glm_jax.envs.search.question import Thing
from glm_jax.envs.search.relations import QUANTITIES


class BruteForce:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.of_node: dict[int, list[tuple]] = {}  # every fact under both of its ends
        for fact in set(graph.facts):
            self.of_node.setdefault(fact.subject, []).append(fact)
            if fact.relation not in QUANTITIES and fact.object != fact.subject:
                self.of_node.setdefault(fact.object, []).append(fact)
        self._known: dict[tuple[int, int, int | None], bool] = {}  # of the question in work

    def answers(self, thing: Thing) -> list[int]:
        self._known.clear()  # its keys are those of living objects
        return [node for node in range(len(self.graph.nodes)) if self.holds(thing, node, None)]

    def pages_that_suffice(self, thing: Thing, answer: int) -> list[int]:
        """Pages on which every clue can be read of the answer."""
        self._known.clear()
        pages = {fact[3] for fact in self.of_node.get(answer, ())} | {answer}
        return [page for page in sorted(pages) if self.holds(thing, answer, page)]

    def holds(self, thing: Thing, node: int, page: int | None) -> bool:
        """Whether all that is said of a thing is true of a node; with a page, whether that page
        says so. Remembered: through a node with many links the same is asked many times.
        """
        key = (id(thing), node, page)
        if key not in self._known:
            self._known[key] = self._holds(thing, node, page)
        return self._known[key]

    def _holds(self, thing: Thing, node: int, page: int | None) -> bool:
        kind, names, about = self.graph.nodes[node]
        if kind != thing.kind or (thing.name and thing.name not in names):
            return False
        if (thing.about or thing.words or thing.ranges) and page not in (None, node):
            return False
        patterns = [rf"(?i)(?<![a-z]){word}(?![a-z])" for word in thing.words]
        if thing.about not in ("", about) or not all(re.search(p, about) for p in patterns):
            return False
        facts = [f for f in self.of_node.get(node, ()) if page is None or f[3] == page]
        within = lambda limits: any(
            (s, r) == (node, limits.quantity) and limits.low <= o <= limits.high
            for s, r, o, _ in facts
        )
        if not all(map(within, thing.ranges)):
            return False
        for link in thing.links:
            ends = [
                (o if link.forward else s)
                for s, r, o, _ in facts
                if r == link.relation and (s if link.forward else o) == node
            ]
            if not any(self.holds(link.thing, other, page) for other in ends):
                return False
        return True
