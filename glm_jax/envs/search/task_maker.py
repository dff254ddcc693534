"""The automatic pipeline from a graph to tasks: a corpus with its index, walks, questions, words,
and a play of each.
"""

from __future__ import annotations

import collections
import pathlib
import shutil
from collections.abc import Callable, Sequence

from glm_jax.envs.scripted import play
from glm_jax.envs.search.brute_force import BruteForce
from glm_jax.envs.search.engine import INDEX, corpus_at, write_index
from glm_jax.envs.search.graph import Graph
from glm_jax.envs.search.language import composed
from glm_jax.envs.search.question import Thing
from glm_jax.envs.search.short_answer import normalised
from glm_jax.envs.search.tools import MAX_QUERY
from glm_jax.envs.search.walks import Walker
from glm_jax.envs.search.web_search import WebSearch, clues_of, expert, problem_of_task, task_of
from glm_jax.rewards.puzzles import split_of
from glm_jax.rollouts.task import Task

MAX_TRIES = 100  # drafts for a task, after which the graph counts as exhausted


def is_corpus(folder: pathlib.Path) -> bool:
    return (folder / INDEX).is_dir()


def write_corpus(folder: pathlib.Path, graph: Graph, progress: Callable[[], object]):
    """A graph and the index of its pages, as a folder that appears as a whole. progress: called
    after each page.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    graph.write(partial)
    write_index(partial, graph.pages(), progress)
    partial.replace(folder)


def make_tasks(
    graph: Graph, corpus: str, count: int, seed: int, progress: Callable[[], object]
) -> tuple[list[Task], collections.Counter]:
    """`count` tasks, and how many drafts became what. Each task asks for another node, and its
    expert earns 1. The same for the same graph and seed.

    corpus: the folder with the graph's index. progress: called after each task. Raises ValueError
    where the graph does not give so many.
    """
    found: list[Task] = []
    fates: collections.Counter = collections.Counter()
    asked: set[int] = set()
    for number, thing in enumerate(Walker(graph, seed).questions(count * MAX_TRIES)):
        fate = "no good question"
        if thing is not None:
            text = composed(thing, seed * 10**6 + number)
            group = f"search/{thing.kind}/{thing.hops}_hops"
            task = task_of(graph, thing, text, corpus, f"search-{seed}-{number}", group)
            fate = fate_of(graph, task, thing, asked)
            if fate == "made":
                asked.add(thing.node)
                found.append(task)
                progress()
        fates[fate] += 1
        if len(found) == count:
            return found, fates
    raise ValueError(f"count={count}: the graph gives only {len(found)} questions")


def fate_of(graph: Graph, task: Task, thing: Thing, asked: set[int]) -> str:
    """`made`, or why the question is dropped."""
    if thing.node in asked:
        return "asked before"
    if problem_of_task(graph, task, thing) is not None:
        return "says its answer"
    if play(WebSearch(), task, expert(task)).reward != 1:
        return "not found by the expert"
    return "made"


def question_of(task: Task) -> str:
    return str(task.messages[-1]["content"])


def split(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """'train' and 'held_out', by the hash of the question."""
    found: dict[str, list[Task]] = {"train": [], "held_out": []}
    for task in tasks:
        found[split_of(question_of(task))].append(task)
    return found


def measure(
    graph: Graph, tasks: Sequence[Task], progress: Callable[[], object]
) -> dict[str, float]:
    """Shares of tasks: `expert`, that earns 1; `unique`, has one answer by brute force; `one_page`,
    has a page on which all of its clues can be read, by brute force; `first_hit`, the first page
    that is found by the question as it stands is the answer's.
    """
    oracle, counts = BruteForce(graph), collections.Counter()
    for task in tasks:
        thing = clues_of(task)
        found = oracle.answers(thing)
        names = {normalised(name) for name in task.answer["names"]}
        hits = corpus_at(task.answer["corpus"]).search(question_of(task)[:MAX_QUERY], 1)
        counts["expert"] += play(WebSearch(), task, expert(task)).reward == 1
        counts["unique"] += found == [thing.node]
        counts["one_page"] += any(oracle.pages_that_suffice(thing, node) for node in found)
        counts["first_hit"] += any(normalised(hit.title) in names for hit in hits)
        progress()
    return {name: count / len(tasks) for name, count in counts.items()}
