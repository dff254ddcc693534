"""Makes questions for the environment `search` with a person in the loop: a small web page shows a
walk through a corpus, and the person picks what is said of each thing on it.

python -m experiments.search_review --corpus=W/corpus --output=W/reviewed.jsonl

A question is saved when it has one answer, no page gives it, and the scripted expert finds it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import urllib.parse

import uvicorn
from absl import flags
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from experiments import entry
from glm_jax.envs.search.graph import read_graph
from glm_jax.envs.search.review import Review, add_to_file, page_of

CORPUS = flags.DEFINE_string("corpus", None, "The folder that experiments.search_tasks made.")
OUTPUT = flags.DEFINE_string("output", None, "The JSONL file to which questions are added.")
SEED = flags.DEFINE_integer("seed", 0, "Seeds the walks.", lower_bound=0)
PORT = flags.DEFINE_integer(
    "port", 8001, "The port to listen on, of this machine alone.", lower_bound=1, upper_bound=65535
)
MAX_WALKS = 10_000  # that one may ask for by its number


def create_app(review: Review, output: pathlib.Path) -> Starlette:
    saved = set()  # ids, so that no walk is saved twice

    def answer(query: str) -> Response:
        form = urllib.parse.parse_qs(query, keep_blank_values=True)
        number, action = form.get("number", ["0"])[0], form.get("action", ["show"])[0]
        if not number.isdecimal() or int(number) >= MAX_WALKS:
            raise ValueError(f"number={number!r} must be a number from 0 to {MAX_WALKS - 1}")
        walk = int(number)
        if action == "next":
            return RedirectResponse(f"/?number={walk + 1}", 303)
        picks = review.picks(walk, form)
        if action == "show":
            return HTMLResponse(page_of(review, walk, picks, "", True))
        task, problem = review.task(walk, picks)
        verdict = "It can be saved." if problem is None else f"It cannot be saved: {problem}."
        if action == "save" and problem is None:
            verdict = "It was saved before."
            if task.id not in saved:
                add_to_file(output, json.dumps(dataclasses.asdict(task), ensure_ascii=False))
                saved.add(task.id)
                verdict = f"Saved in {output}."
        return HTMLResponse(page_of(review, walk, picks, verdict, problem is None))

    async def handle(request: Request) -> Response:
        query = (await request.body()).decode() if request.method == "POST" else request.url.query
        try:
            return answer(query)
        except ValueError as error:
            return Response(f"{error}\n", 400, media_type="text/plain")

    return Starlette(routes=[Route("/", handle, methods=["GET", "POST"])])


def main():
    output = pathlib.Path(entry.given(OUTPUT))
    review = Review(read_graph(entry.given(CORPUS)), entry.given(CORPUS), SEED.value)
    print(f"review at http://127.0.0.1:{PORT.value}", flush=True)
    uvicorn.run(create_app(review, output), port=PORT.value, log_level="warning")


if __name__ == "__main__":
    flags.mark_flags_as_required(["corpus", "output"])
    entry.run(main)
