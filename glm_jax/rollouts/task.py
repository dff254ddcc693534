"""A task and the reward of an answer: the same for evaluation and for RL, so that they cannot
disagree.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from data.chat_messages import TemplateError
from data.chat_template import segments


@dataclasses.dataclass(frozen=True)
class Task:
    """A conversation that the model continues, and what its verifier needs to judge the
    continuation.

    id: unique in its pool. group: what metrics are kept by, like `arithmetic/gcd`. verifier: a name
    of verifiers.VERIFIERS, or of an environment in envs.registry.ENVIRONMENTS, which then goes on
    for several turns.
    messages, tools: as data.chat_template takes them, the user's turn last. answer: plain JSON
    values; their form is the verifier's.
    """

    id: str
    group: str
    verifier: str
    messages: tuple[Mapping, ...]
    answer: Any
    tools: tuple[Mapping, ...] = ()


def task_from_json(entry: Mapping[str, Any]) -> Task:
    """The inverse of dataclasses.asdict, after JSON."""
    tuples = {name: tuple(entry[name]) for name in ("messages", "tools")}
    return Task(**{**entry, **tuples})


@dataclasses.dataclass(frozen=True)
class Reward:
    """value: 0 to 1, what RL maximises. parts: what it was made of, each for a curve of its own."""

    value: float
    parts: Mapping[str, float]


REQUIRED = ("id", "verifier", "answer")
OPTIONAL = ("prompt", "messages", "tools", "group")


def read_tasks(path: str | pathlib.Path) -> list[Task]:
    """Tasks of a JSONL file: an object a line with `id`, `verifier`, `answer`, either `prompt`
    (text of one user turn) or `messages`, maybe `tools` and `group` (default: the file's name
    without its ending).

    Raises ValueError naming the line and the field. Whether a verifier can use the answers is its
    own `check` to say.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no task file at {str(path)!r}")
    tasks, lines_of = [], {}
    for number, line in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON: {error}") from None
        task = _task(entry, where, path.stem)
        if task.id in lines_of:
            raise ValueError(f"{where}: id {task.id!r} is that of line {lines_of[task.id]}, too")
        lines_of[task.id] = number
        tasks.append(task)
    if not tasks:
        raise ValueError(f"{path} holds no task")
    return tasks


def _task(entry, where: str, default_group: str) -> Task:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object, not {type(entry).__name__}")
    unknown = sorted(entry.keys() - {*REQUIRED, *OPTIONAL})
    if unknown:
        raise ValueError(
            f"{where}: unknown field {unknown[0]!r}; valid: {', '.join(REQUIRED + OPTIONAL)}"
        )
    for field in REQUIRED:
        if entry.get(field) in (None, "", [], {}):
            raise ValueError(f"{where}: {field} is missing")
    if ("prompt" in entry) == ("messages" in entry):
        raise ValueError(f"{where}: must have either prompt or messages")
    messages = (
        [{"role": "user", "content": entry["prompt"]}] if "prompt" in entry else entry["messages"]
    )
    tools = entry.get("tools") or ()
    try:
        segments(messages, tools)
    except TemplateError as error:
        raise ValueError(f"{where}: {error}") from None
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"{where}: messages end with the {messages[-1]['role']}'s turn; the model's must be"
            " next"
        )
    for field in ("id", "verifier", "group"):
        if not isinstance(entry.get(field, ""), str):
            raise ValueError(f"{where}: {field} must be a string, not {entry[field]!r}")
    return Task(
        id=entry["id"], group=entry.get("group", default_group), verifier=entry["verifier"],
        messages=tuple(messages),
        answer=entry["answer"], tools=tuple(tools),
    )  # fmt: skip
