"""Environment `software`: mend a bug in a real Python package, with a shell and an editor.

A task comes from tasks.py. The agent works in a sandbox that holds the broken repository; what it
hands in is judged in sandboxes of their own (judge.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from data.chat_messages import TemplateError, arguments_of
from glm_jax import sandbox, sandbox_guest
from glm_jax.envs.environment import Agent, Kind, Start, Step
from glm_jax.envs.software import tools_guest
from glm_jax.envs.software.judge import (
    ENVIRONMENT,
    ROOT,
    MachineFailure,
    as_text,
    judge,
    variables,
)
from glm_jax.envs.software.mutation import Mutation
from glm_jax.envs.software.repository import Record, Repository, environment_of, load
from glm_jax.envs.software.tasks import broken
from glm_jax.rollouts.task import Reward, Task
from glm_jax.sandbox import Box, Limits, Status

LIMITS = Limits(
    wall_seconds=1800.0, cpu_seconds=20, memory_bytes=2 << 30, processes=32, file_bytes=8 << 20,
    disk_bytes=64 << 20, files=5000, open_files=256, output_bytes=8 << 20,
)  # fmt: skip
TURN_SECONDS = 15.0  # for all commands of a turn
SLACK_SECONDS = 10.0  # that the sandbox may take to answer after a command's time is over
MAX_CALLS = 8  # in a turn
CHARACTERS = 8000  # of a tool's answer
PROGRAM = sandbox.program_of(sandbox_guest, tools_guest, call="answer_tools()")
NOTHING = Reward(0.0, {})


def _tool(name: str, description: str, **parameters: tuple[str, str]) -> dict:
    properties = {
        key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [
    _tool(
        "run",
        f"Runs a shell command in the repository: its output, cut to {CHARACTERS} characters, and"
        f" exit code. It has {TURN_SECONDS:g} seconds; processes that it leaves are ended.",
        command=("string", "as for sh -c"),
    ),
    _tool(
        "read",
        f"Reads lines of a file, numbered, cut to {CHARACTERS} characters.",
        path=("string", "in the repository"),
        first=("integer", "number of the first line, from 1"),
        last=("integer", "number of the last line"),
    ),
    _tool(
        "edit",
        "Replaces text of a file by other text.",
        path=("string", "in the repository"),
        old=("string", "the exact text, which must stand once in the file"),
        new=("string", "what to write in its place"),
    ),
    _tool("submit", "Ends the work and has it judged."),
]
PARAMETERS = {
    tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in TOOLS
}


class Software:
    """An episode. A turn without a call ends it as submit does. The reward, of the last turn, is
    judge.judge's.
    """

    def __init__(self):
        self._stop = threading.Event()
        # A sandbox ends with the thread that made it, and each step comes in another.
        self._thread = ThreadPoolExecutor(1, "software")
        self._box: Box | None = None

    def reset(self, task: Task, seed: int) -> Start:
        del seed  # nothing is random
        self._answer = task.answer
        self._repository, self._record = loaded(task.answer)
        self._files = broken(self._repository, Mutation(**task.answer["mutation"]))
        self._thread.submit(self._open).result()
        return Start(task.messages, TOOLS)

    def step(self, message: Mapping) -> Step:
        return self._thread.submit(self._step, message).result()

    def close(self):
        """Ends the sandboxes, those of a step that is under way as well."""
        self._stop.set()
        self._thread.submit(self._end)
        self._thread.shutdown()

    # --- in the thread of the sandbox ---

    def _open(self):
        folders = [
            (str(environment_of(self._folder)), ENVIRONMENT), ("/usr/bin", "/usr/bin"),
            ("/usr/bin", "/bin"),
        ]  # fmt: skip
        self._box = Box(PROGRAM, LIMITS, folders, self._stop)
        start = {
            "root": ROOT, "files": as_text(self._files), "variables": variables(self._repository),
        }  # fmt: skip
        if "ready" not in self._ask(start, math.inf):
            raise MachineFailure(f"no sandbox: {self._box.finish().stderr[-500:]}")

    def _end(self):
        if self._box is not None:
            self._box.close()

    @property
    def _folder(self) -> pathlib.Path:
        return pathlib.Path(self._answer["folder"])

    def _step(self, message: Mapping) -> Step:
        calls, answers = message.get("tool_calls") or (), []
        deadline = time.monotonic() + TURN_SECONDS
        for number, call in enumerate(calls):
            name = call["function"].get("name")
            if name == "submit":
                return self._submit()
            if number >= MAX_CALLS:
                text = f"error: a turn may have {MAX_CALLS} calls"
            else:
                text = self._call(name, call["function"], deadline - time.monotonic())
            if text is None:  # the work is lost
                return Step([], True, NOTHING)
            answers.append({"role": "tool", "content": text})
        return Step(answers, False) if answers else self._submit()

    def _call(self, name: str, function: Mapping, seconds: float) -> str | None:
        """What a tool answers; None where the agent has brought down its sandbox."""
        try:
            arguments = checked(name, function)
        except (ValueError, TemplateError) as error:
            return f"error: {error}"
        if seconds < 1:
            return f"error: the {TURN_SECONDS:g} seconds of this turn are used up"
        if name != "edit":
            arguments["characters"] = CHARACTERS
        if name == "run":
            arguments["seconds"] = seconds
        reply = self._ask({"do": name, "args": arguments}, seconds + SLACK_SECONDS)
        if isinstance(text := reply.get("result"), str):
            return text[: 2 * CHARACTERS]
        error = reply.get("error")
        return f"error: {error[:CHARACTERS]}" if isinstance(error, str) else None

    def _ask(self, message: Mapping, seconds: float) -> dict:
        """The sandbox's answer, not trusted; empty where there is none."""
        assert self._box is not None, "it was opened"
        self._box.send(json.dumps(message).encode("ascii") + b"\n")
        line = self._box.receive_line(seconds)
        if line is None and self._box.status is Status.CLOSED:
            raise MachineFailure("the episode was closed")
        try:
            reply = json.loads(line or b"{}")
        except (ValueError, RecursionError, MemoryError):
            return {}
        return reply if isinstance(reply, dict) else {}

    def _submit(self) -> Step:
        reply = self._ask({"do": "sources", "args": {}}, SLACK_SECONDS).get("result")
        if not isinstance(reply, dict):
            return Step([], True, NOTHING)
        handed = {path: str(text).encode("latin-1", "replace") for path, text in reply.items()}
        sources = {p: data for p, data in handed.items() if self._repository.is_source(p)}
        if all(sources.get(p) == self._files[p] for p in self._repository.sources) and len(
            sources
        ) == len(self._repository.sources):
            return Step([], True, Reward(0.0, {"changed": 0.0}))
        reward = judge(self._repository, self._record, self._folder, sources, self._stop)
        if self._stop.is_set():
            raise MachineFailure("the episode was closed")
        return Step([], True, Reward(reward.value, {"changed": 1.0, **reward.parts}))


def checked(name: str, function: Mapping) -> dict:
    """Arguments of a call. Raises ValueError, which the model reads, for what is none of TOOLS."""
    if name not in PARAMETERS:
        raise ValueError(f"there is no tool {name!r}; valid: {', '.join(PARAMETERS)}")
    arguments, expected = dict(arguments_of(function, "call")), PARAMETERS[name]
    if arguments.keys() != expected.keys():
        raise ValueError(
            f"{name} has the arguments {', '.join(expected)}, not {', '.join(arguments) or 'none'}"
        )
    for key, value in arguments.items():
        kind = str if expected[key]["type"] == "string" else int
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name}: {key} must be of type {expected[key]['type']}")
    return arguments


# --- tasks ---

FIELDS = {
    "folder": str, "repository": str, "sha256": str, "mutation": dict, "fail_to_pass": list,
    "pass_to_pass": int,
}  # fmt: skip


def loaded(answer: Mapping) -> tuple[Repository, Record]:
    return load(answer["folder"], answer["repository"])


def check(tasks: Sequence[Task]):
    """Raises ValueError naming the first task that does not fit its repository, or where there is
    no sandbox.
    """
    sandbox.check()
    for task in tasks:
        try:
            check_answer(task.answer)
        except ValueError as error:
            raise ValueError(f"task {task.id!r}: {error}") from None


def check_answer(answer):
    """Raises ValueError for an answer that is not

    {"folder": of repositories, "repository": "toolz-1.0.0", "sha256": of its source distribution,
     "mutation": {"file", "line", "before", "after"}, "fail_to_pass": [tests], "pass_to_pass": n}
    """
    if not isinstance(answer, dict) or answer.keys() != FIELDS.keys():
        found = ", ".join(answer) if isinstance(answer, dict) else repr(answer)
        raise ValueError(f"answer has the fields {found}; must have {', '.join(FIELDS)}")
    for field, kind in FIELDS.items():
        if not isinstance(answer[field], kind):
            raise ValueError(f"answer: {field}={answer[field]!r} must be {kind.__name__}")
    expected = {field.name for field in dataclasses.fields(Mutation)}
    if answer["mutation"].keys() != expected:
        raise ValueError(f"answer: mutation must have {', '.join(sorted(expected))}")
    repository, record = loaded(answer)
    if answer["sha256"] != record.sha256:
        raise ValueError(f"answer: sha256={answer['sha256']!r} must be {record.sha256!r}")
    change = Mutation(**answer["mutation"])
    if change.file not in repository.sources:
        raise ValueError(f"answer: {change.file!r} is no source file of {answer['repository']}")
    change.apply(repository.files[change.file])
    tests, passed = answer["fail_to_pass"], record.passed
    if unknown := [test for test in tests if test not in record.controls]:
        raise ValueError(f"answer: fail_to_pass: {unknown[0]!r} is no test that can be judged")
    if not tests or answer["pass_to_pass"] != len(passed) - len(tests):
        raise ValueError(
            f"answer: {len(tests)} fail_to_pass and {answer['pass_to_pass']} pass_to_pass must make"
            f" {len(passed)}"
        )
    if not environment_of(pathlib.Path(answer["folder"])).is_dir():
        raise ValueError(f"no environment in {answer['folder']!r}")


def expert_of(task: Task) -> Agent:
    """Undoes the mutation, as an edit of as many lines as make it the only place, and submits."""
    change = Mutation(**task.answer["mutation"])
    original = loaded(task.answer)[0].files[change.file]
    bad, good = (
        data.decode("utf-8").splitlines(keepends=True)
        for data in (change.apply(original), original)
    )
    first, last = change.line - 1, change.line
    while "".join(bad).count("".join(bad[first:last])) > 1:
        first, last = max(first - 1, 0), last + 1
    arguments = {
        "path": change.file, "old": "".join(bad[first:last]), "new": "".join(good[first:last]),
    }  # fmt: skip

    def agent(messages: Sequence[Mapping]) -> Mapping:
        edited = any(message["role"] == "tool" for message in messages)
        function = {"name": "submit", "arguments": {}} if edited else {
            "name": "edit", "arguments": arguments,
        }  # fmt: skip
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}

    return agent


KIND = Kind(Software, check, expert_of)
