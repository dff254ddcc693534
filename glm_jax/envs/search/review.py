"""Questions with a person in the loop: a walk is shown with its pages, the person picks what is
said of each thing on it, or leaves it out, and words the question. What comes out passes the same
checks as the pipeline's.
"""

from __future__ import annotations

import dataclasses
import html
import pathlib
from collections.abc import Mapping, Sequence

from glm_jax.envs.scripted import play
from glm_jax.envs.search.graph import Graph
from glm_jax.envs.search.language import composed, own_clauses
from glm_jax.envs.search.question import Thing
from glm_jax.envs.search.relations import RELATIONS
from glm_jax.envs.search.walks import LEFT_OUT, Draft, Walker
from glm_jax.envs.search.web_search import WebSearch, expert, problem_of_task, task_of
from glm_jax.files import write_text
from glm_jax.rollouts.task import Task

STYLE = """body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
article{border:1px solid #ccc;border-radius:6px;padding:.4em 1em;margin:1em 0}
pre{white-space:pre-wrap;background:#f5f5f5;padding:.6em;max-height:12em;overflow:auto}
select,textarea{width:100%;box-sizing:border-box;font:inherit}
textarea{height:8em} button{font:inherit;padding:.3em 1em}
.bad{color:#a00} .good{color:#060}"""


@dataclasses.dataclass(frozen=True)
class Picks:
    """What the person chose. levels: of each thing on the walk, in the order of `Thing.all`. text:
    the question in the person's words; "": as it is composed.
    """

    levels: tuple[int, ...]
    text: str


class Review:
    """Walks by their number from 0 on, the same ones for the same graph and seed."""

    def __init__(self, graph: Graph, corpus: str, seed: int):
        self.graph, self.corpus, self.seed = graph, corpus, seed
        self._walker = Walker(graph, seed)
        self._drafts: list[Draft] = []
        self._levels: list[list[int]] = []  # of each, as the pipeline would choose them

    def draft(self, number: int) -> Draft:
        while len(self._drafts) <= number:
            draft = self._walker.draft()
            self._drafts.append(draft)
            self._levels.append(self._walker.blurred(draft))
        return self._drafts[number]

    def task(self, number: int, picks: Picks) -> tuple[Task, str | None]:
        """The task, and what makes it useless; None: nothing."""
        thing = self.draft(number).said(picks.levels)
        text = picks.text or composed(thing, number)
        name = f"reviewed-{self.seed}-{number}"
        task = task_of(self.graph, thing, text, self.corpus, name, f"search/{thing.kind}/reviewed")
        problem = problem_of_task(self.graph, task, thing)
        if problem is None and play(WebSearch(), task, expert(task)).reward != 1:
            problem = "the expert does not find the answer by searching"
        return task, problem

    def picks(self, number: int, form: Mapping[str, Sequence[str]]) -> Picks:
        """Of a form as urllib.parse.parse_qs gives it; what is missing is as the pipeline would
        choose it. Raises ValueError for a level that there is not.
        """
        draft, levels = self.draft(number), []
        for place, ways in enumerate(draft.choices):
            text = form.get(f"level{place}", [str(self._levels[number][place])])[0]
            lowest = 0 if place == len(draft.choices) - 1 else LEFT_OUT
            if text not in map(str, range(lowest, len(ways))):
                raise ValueError(f"level{place}={text!r} must be {lowest} to {len(ways) - 1}")
            levels.append(int(text))
        wording = "\n".join(form.get("text", [""])[0].splitlines()).strip()
        return Picks(tuple(levels), wording)


def add_to_file(path: pathlib.Path, line: str):
    """Adds a line to a file, which is written as a whole."""
    before = path.read_text("utf-8") if path.exists() else ""
    write_text(path, f"{before}{line}\n")


def page_of(review: Review, number: int, picks: Picks, verdict: str, good: bool) -> str:
    """The web page of a walk."""
    draft = review.draft(number)
    things = list(draft.thing.all())
    parts = [_article(review, t, place, draft, picks) for place, t in enumerate(things)]
    text = html.escape(picks.text)
    shown = composed(draft.said(picks.levels), number)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Walk {number}</title>
<style>{STYLE}</style><h1>Walk {number}</h1>
<p>The answer is <b>{html.escape(review.graph.nodes[draft.thing.node].names[0])}</b>. Pick how much
is said of each thing; the question needs one answer that no single page gives.</p>
<form method="post" action="/"><input type="hidden" name="number" value="{number}">
{"".join(parts)}
<h2>The question</h2><pre>{html.escape(shown)}</pre>
<label>In your own words, if you like:<textarea name="text">{text}</textarea></label>
<p class="{"good" if good else "bad"}">{html.escape(verdict)}</p>
<button name="action" value="check">Check</button> <button name="action" value="save">Save</button>
<button name="action" value="next">Next walk</button></form></html>"""


def _article(review: Review, thing: Thing, place: int, draft: Draft, picks: Picks) -> str:
    graph = review.graph
    is_answer = thing.node == draft.thing.node
    options = [] if is_answer else [(LEFT_OUT, "leave it out, and what only it leads to")]
    options += [(i, _described(way)) for i, way in enumerate(draft.choices[place])]
    rows = "".join(
        f'<option value="{level}"{" selected" if level == picks.levels[place] else ""}>'
        f"{html.escape(text)}</option>"
        for level, text in options
    )
    title = html.escape(graph.nodes[thing.node].names[0]) + (", the answer" if is_answer else "")
    links = "".join(
        f"<p>{html.escape(_fact(graph, thing.node, link.relation, link.forward, link.thing.node))}"
        for link in thing.links
    )
    return (
        f"<article><h2>{title}</h2>{links}<pre>{html.escape(graph.page_text(thing.node))}</pre>"
        f'<select name="level{place}">{rows}</select></article>'
    )


def _described(way: Thing) -> str:
    said = [f"its name, {way.name}"] if way.name else own_clauses(way)
    return "; ".join(said) or "only that there is one"


def _fact(graph: Graph, node: int, relation: str, forward: bool, other: int) -> str:
    first, second = (graph.nodes[n].names[0] for n in ((node, other) if forward else (other, node)))
    return f"{first} {RELATIONS[relation].active[0]} {second}"
