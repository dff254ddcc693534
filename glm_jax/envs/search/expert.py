"""The scripted expert: follows a question's walk with the tools, from its ends to the answer. It is
told what the pages should say and on which they stand; names it knows from pages alone, and a page
it opens only when a search has found it or a page that it has read links to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence

from glm_jax.envs.environment import Agent
from glm_jax.envs.search.graph import SEPARATOR, words_of
from glm_jax.envs.search.question import Link, Thing
from glm_jax.envs.search.relations import KINDS, QUANTITIES, RELATIONS
from glm_jax.envs.search.tools import MAX_CALLS, MAX_RESULTS

Talk = Generator[list[dict], list[str], str]  # calls of a turn -> their results; the answer
NOTE = re.compile(r"\n\(characters \d+ to \d+ of \d+(?:; go on with from=(\d+))?\)$")
NOTHING = "I could not find it."


def expert_of(thing: Thing) -> Agent:
    """An agent for one episode."""
    talk = _Reader().answer(thing)
    started = False

    def agent(messages: Sequence[Mapping]) -> Mapping:
        nonlocal started
        results: list[str] = []
        for message in reversed(messages):
            if message["role"] != "tool":
                break
            results.insert(0, message["content"])
        try:
            calls = talk.send(results) if started else next(talk)
        except StopIteration as end:
            return {"role": "assistant", "content": end.value}
        started = True
        return {"role": "assistant", "content": "", "tool_calls": calls}

    return agent


def _call(name: str, arguments: dict) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


class _Reader:
    def __init__(self):
        self.pages: dict[int, str] = {}  # text of those that were opened
        self.seen: set[int] = set()  # numbers of those that results and pages show

    def answer(self, thing: Thing) -> Talk:
        for t in thing.all():
            if KINDS[t.kind].page:
                yield from self.read(t)
                if t.node not in self.pages or not self.says_all(t):
                    return NOTHING
        return f"\\boxed{{{self.title(thing.node)}}}"

    def read(self, thing: Thing) -> Generator[list[dict], list[str], None]:
        """Searches for a thing's page unless it has been seen, and opens it."""
        if thing.node not in self.seen:
            calls = [_call("search", {"query": q, "k": MAX_RESULTS}) for q in self.queries(thing)]
            for result in (yield calls[:MAX_CALLS]):
                self.seen |= {int(n) for n in re.findall(r"^\[(\d+)\]", result, re.MULTILINE)}
        if thing.node not in self.seen:
            return
        text, start = "", 0
        while start is not None:
            [result] = yield [_call("open", {"page": thing.node, "from": start})]
            note = NOTE.search(result)
            text += result[: note.start()] if note else result
            start = int(note[1]) if note and note[1] else None
        self.pages[thing.node] = text
        self.seen |= {int(n) for n in re.findall(r"\[(\d+)\]", text)}

    def queries(self, thing: Thing) -> list[str]:
        """What is said of a thing; with what is known of those that it is linked to."""
        own = " ".join([thing.name, thing.about, *thing.words]).strip()
        page = KINDS[thing.kind].page
        found = [f'{own} "{page}"', own] if own else []
        for link in thing.links:
            name = self.name(link.thing)
            if KINDS[link.thing.kind].page:
                found.append(f'"{name} {link.thing.node}"')  # as pages write links to it
            else:
                found.append(f'"{page}" "{RELATIONS[link.relation].label} {name}" {own}')
        return found

    def title(self, page: int) -> str:
        return self.pages[page].partition("\n")[0]

    def name(self, thing: Thing) -> str:
        return self.title(thing.node) if KINDS[thing.kind].page else thing.name

    def listed(self, page: int, label: str) -> list[str]:
        """What a line of a page lists after its label; nothing where it has no such line."""
        for line in self.pages.get(page, "").splitlines()[2:]:
            if line.startswith(f"{label}: "):
                return line.removeprefix(f"{label}: ").split(SEPARATOR)
        return []

    def says_all(self, thing: Thing) -> bool:
        """Whether the pages that have been read say all that the question does."""
        first, second = self.pages[thing.node].splitlines()[:2]
        page = KINDS[thing.kind].page
        about = second.removeprefix(f"{page}. ")
        names = [first, *self.listed(thing.node, "Also called")]
        for limits in thing.ranges:
            quantity = QUANTITIES[limits.quantity]
            numbers = [int(n.split()[0]) for n in self.listed(thing.node, quantity.label)]
            if not any(limits.low <= number <= limits.high for number in numbers):
                return False
        return (
            second.startswith(page)
            and (not thing.name or thing.name in names)
            and (not thing.about or thing.about == about)
            and set(thing.words) <= words_of(about)
            and all(self.says_link(thing, link) for link in thing.links)
        )

    def says_link(self, thing: Thing, link: Link) -> bool:
        """Whether one of the two pages of a link states it."""
        relation, other = RELATIONS[link.relation], link.thing
        subject, object_ = (thing, other) if link.forward else (other, thing)
        paged = KINDS[object_.kind].page
        target = f"{self.name(object_)} [{object_.node}]" if paged else object_.name
        if target in self.listed(subject.node, relation.label):
            return True
        mine = f"{self.title(subject.node)} [{subject.node}]"
        return bool(relation.back) and mine in self.listed(object_.node, relation.back)
