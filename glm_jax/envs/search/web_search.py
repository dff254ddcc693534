"""Environment `search`: a question whose answer takes several pages, a search engine and a page
reader. The reward is 1 for the right name in the last box of a message without tool calls, and 0
for anything else: names that are nearly right and lists of names, too.

A task's answer is {"names": [...], "corpus": folder, "clues": {...}}: names that count as right,
the folder that experiments.search_tasks made, and the question as question.to_json writes it, which
the model never sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glm_jax.envs.environment import Kind, Start, Step
from glm_jax.envs.search import tools
from glm_jax.envs.search.engine import corpus_at
from glm_jax.envs.search.expert import expert_of
from glm_jax.envs.search.graph import Graph, read_graph
from glm_jax.envs.search.question import Thing, from_json, problem_of, to_json
from glm_jax.envs.search.short_answer import is_said, normalised
from glm_jax.rewards.answer_format import boxed_answer
from glm_jax.rollouts.task import Reward, Task

FIELDS = ("names", "corpus", "clues")


class WebSearch:
    """The model searches and reads until it answers without a tool call."""

    def reset(self, task: Task, seed: int) -> Start:
        self.names = {normalised(name) for name in task.answer["names"]}
        self.corpus = corpus_at(task.answer["corpus"])
        return Start(task.messages, tools.TOOLS)

    def step(self, message: Mapping) -> Step:
        calls = message.get("tool_calls") or ()
        if not calls:
            answer = boxed_answer(message["content"])
            right = float(answer is not None and normalised(answer) in self.names)
            return Step([], True, Reward(right, {"answered": float(answer is not None)}))
        results = [tools.result(self.corpus, call) for call in calls[: tools.MAX_CALLS]]
        if left := len(calls) - len(results):
            results.append(f"error: {left} more calls not made; at most {tools.MAX_CALLS} a turn")
        return Step([{"role": "tool", "content": text} for text in results], False)


def check(tasks: Sequence[Task]):
    """Raises ValueError naming the first task that is not well formed, whose corpus is not there,
    or whose question has not exactly one answer, is answered by one page or says its answer.
    """
    graphs: dict[str, Graph] = {}
    for task in tasks:
        try:
            thing = clues_of(task)
            folder = task.answer["corpus"]
            if folder not in graphs:
                corpus_at(folder)
                graphs[folder] = read_graph(folder)
            if (problem := problem_of_task(graphs[folder], task, thing)) is not None:
                raise ValueError(problem)
        except ValueError as error:
            raise ValueError(f"task {task.id!r}: {error}") from None


def clues_of(task: Task) -> Thing:
    """Raises ValueError where the task's answer is not as it must be."""
    answer = task.answer
    if not isinstance(answer, dict) or answer.keys() != set(FIELDS):
        raise ValueError(f"its answer must be an object with {', '.join(FIELDS)}, not {answer!r}")
    names, corpus = answer["names"], answer["corpus"]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"names={names!r} must be a list of names")
    if not isinstance(corpus, str):
        raise ValueError(f"corpus={corpus!r} must be a folder that experiments.search_tasks made")
    return from_json(answer["clues"])


def problem_of_task(graph: Graph, task: Task, thing: Thing) -> str | None:
    """What makes it useless; None: nothing."""
    if (problem := problem_of(graph, thing)) is not None:
        return problem
    right, names = graph.nodes[thing.node].names, task.answer["names"]
    if sorted(names) != sorted(right):
        return f"names={names} must be {list(right)}"
    text = str(task.messages[-1]["content"])
    for name in names:
        if not normalised(name) or is_said(name, text):
            return f"its question says its answer, {name!r}"
    return None


def task_of(graph: Graph, thing: Thing, text: str, corpus: str, name: str, group: str) -> Task:
    """A question as a task. text: for the model. corpus: its folder."""
    names = list(graph.nodes[thing.node].names)
    answer = {"names": names, "corpus": corpus, "clues": to_json(thing)}
    return Task(name, group, "search", ({"role": "user", "content": text},), answer)


def expert(task: Task):
    return expert_of(clues_of(task))


KIND = Kind(WebSearch, check, expert)
