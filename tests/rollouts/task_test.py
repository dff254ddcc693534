"""Files of tasks: what a line may hold, and which line and field an error names."""

import json
import re

import pytest

from glm_jax.rollouts.task import Task, read_tasks

GOOD = {"id": "a", "verifier": "math", "prompt": "1+1?", "answer": "2"}
ASKS = {"role": "user", "content": "1+1?"}
SAYS = {"role": "assistant", "content": "3"}
CALLS = SAYS | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def write(path, *lines):
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def with_messages(*messages, **fields):
    return {k: v for k, v in GOOD.items() if k != "prompt"} | {"messages": messages} | fields


def test_a_line_is_a_task(tmp_path):
    after_call = (ASKS, CALLS, {"role": "tool", "content": "2"})
    path = write(
        tmp_path / "sums.jsonl", GOOD, GOOD | {"id": "b", "group": "g"},
        with_messages(ASKS, SAYS, ASKS, id="c"), with_messages(*after_call, id="d", tools=[TOOL]),
    )  # fmt: skip
    assert read_tasks(path) == [
        Task("a", "sums", "math", (ASKS,), "2"),
        Task("b", "g", "math", (ASKS,), "2"),
        Task("c", "sums", "math", (ASKS, SAYS, ASKS), "2"),
        Task("d", "sums", "math", after_call, "2", (TOOL,)),
    ]


REFUSED = {
    "is not JSON": b"{",
    "must be an object, not list": [GOOD],
    "unknown field 'hint'; valid: id, verifier, answer, prompt, messages, tools, group":
        GOOD | {"hint": "2"},
    "answer is missing": GOOD | {"answer": ""},
    "id is missing": GOOD | {"id": None},
    "must have either prompt or messages": with_messages(ASKS, prompt="1+1?"),
    "messages end with the assistant's turn; the model's must be next":
        with_messages(ASKS, ASKS, SAYS),
    "messages end with the system's turn": with_messages({"role": "system", "content": "Sums."}),
    "verifier must be a string, not 5": GOOD | {"verifier": 5},
    "group must be a string, not 5": GOOD | {"group": 5},
    "id 'first' is that of line 1, too": GOOD | {"id": "first"},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_line_that_is_no_task_is_named(message, tmp_path):
    path = write(tmp_path / "tasks.jsonl", GOOD | {"id": "first"}, REFUSED[message])
    with pytest.raises(ValueError, match=re.escape(f"tasks.jsonl:2: {message}")):
        read_tasks(path)


def test_a_file_without_tasks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no task file at"):
        read_tasks(tmp_path / "nowhere.jsonl")
