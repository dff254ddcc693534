"""Rewards for code. The verdict is formed outside of the process that runs the solution, and what it is measured by never enters it.

The solution answers calls in a sandbox of its own: it gets arguments and gives plain values (code_guest), and that is all it can do.
Expected values of `cases` stay in this process, which compares texts. A `test` runs in a second sandbox, where `candidate` stands for
the solution and passes calls on; it says that it passed by a seal that only it was given. So there is no test to read or to patch, no
result to forge but an answer, no `==` of the solution's own, and who leaves early has not answered.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import json
import os
import pathlib
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from glm_jax import sandbox
from glm_jax.rewards import code_guest
from glm_jax.rewards.task import Reward, Task
from glm_jax.sandbox import Box, Limits, Status

FORMS = {"test": ({"prompt", "entry_point", "test"}, set()), "cases": ({"entry_point", "cases"}, {"prompt"})}  # required, optional
GUEST = pathlib.Path(code_guest.__file__).read_text("utf-8")
SOLUTION, TEST = f"{GUEST}\n\nanswer_calls()\n", f"{GUEST}\n\nrun_test()\n"
FENCED = re.compile(r"^```(?:python|python3|py)[ \t]*\r?\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)


class Verdict(enum.Enum):
    PASSED = "passed"
    WRONG = "wrong"  # an answer, an exception, or no answer
    TIMEOUT = "timeout"
    RESOURCES = "resources"  # too much memory, output, too many processes or files
    ENVIRONMENT = "environment"  # the machine's fault or the task's; says nothing about the solution


VERDICT_OF = {Status.TIMEOUT: Verdict.TIMEOUT, Status.ENVIRONMENT: Verdict.ENVIRONMENT}
VERDICT_OF |= dict.fromkeys((Status.MEMORY, Status.PROCESSES, Status.FILES, Status.OUTPUT), Verdict.RESOURCES)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """share: of the cases that were right; None for a test, which tells only whether all of it passed."""

    verdict: Verdict
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class CodeVerifier:
    """The verifier "code". A task's answer is one of

        {"entry_point": name, "prompt": text, "test": text that defines check(candidate), or asserts at its top level}
        {"entry_point": name, "cases": [{"args": [...], "kwargs": {...}, "expected": value}, ...], "prompt": text}

    with plain values as code_guest has them; types count: 1 is not 1.0, a list is not a tuple. The prompt is what a solution may
    continue: its imports and helpers are there for a solution that is whole as well. workers: solutions that are run at a time.
    """

    limits: Limits = sandbox.STANDARD
    workers: int = os.cpu_count() or 1

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError naming the first task whose answer it cannot use, or where there is no sandbox."""
        sandbox.check()
        for task in tasks:
            try:
                check_answer(task.answer)
            except (ValueError, TypeError, SyntaxError, RecursionError) as error:
                raise ValueError(f"task {task.id!r}: {error}") from error

    def score(self, tasks: Sequence[Task], messages: Sequence[Mapping]) -> list[Reward]:
        """1 for code that passes all, else 0. Parts: `passed`, `timeout`, `environment_error`, with cases `share_of_cases`.

        Where `environment_error` is 1 the value says nothing about the message, and must be used neither for it nor against it.
        """
        pairs = list(zip(tasks, messages, strict=True))
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda pair: reward_of(judge(pair[0].answer, extract_code(pair[1]["content"]), self.limits)), pairs))


def reward_of(judgement: Judgement) -> Reward:
    names = {"passed": Verdict.PASSED, "timeout": Verdict.TIMEOUT, "environment_error": Verdict.ENVIRONMENT}
    parts = {name: float(judgement.verdict is verdict) for name, verdict in names.items()}
    if judgement.share is not None:
        parts["share_of_cases"] = judgement.share
    return Reward(parts["passed"], parts)


def extract_code(content: str | None) -> str:
    """The last fenced block that is marked as Python; the whole text where there is none."""
    blocks = FENCED.findall(content or "")
    return blocks[-1] if blocks else content or ""


def check_answer(answer):
    """Raises ValueError, TypeError, SyntaxError or RecursionError for an answer that is none of CodeVerifier's."""
    if not isinstance(answer, dict):
        raise ValueError(f"answer must be an object, not {type(answer).__name__}")
    form = next((name for name in FORMS if name in answer), None)
    if form is None:
        raise ValueError(f"answer has neither {' nor '.join(FORMS)}")
    required, optional = FORMS[form]
    wrong = sorted((required - answer.keys()) | (answer.keys() - required - optional))
    if wrong:
        raise ValueError(f"answer with {form} has the fields {', '.join(sorted(answer))}; must have {', '.join(sorted(required))}")
    for field in ("entry_point", "prompt", "test"):
        if not isinstance(answer.get(field, ""), str):
            raise ValueError(f"answer: {field} must be text, not {answer[field]!r}")
    if not answer["entry_point"].isidentifier():
        raise ValueError(f"answer: entry_point={answer['entry_point']!r} is no name")
    for source in (answer.get("prompt", ""), answer.get("test", "")):
        ast.parse(source)
    if form == "cases" and not (isinstance(answer["cases"], list) and answer["cases"]):
        raise ValueError("answer: cases must be a list, and not empty")
    for number, case in enumerate(answer.get("cases", ())):
        if not isinstance(case, dict) or "expected" not in case or case.keys() - {"args", "kwargs", "expected"}:
            raise ValueError(f"answer: case {number} must have expected, and may have args and kwargs")
        if not isinstance(case.get("args", []), list) or not isinstance(case.get("kwargs", {}), dict):
            raise ValueError(f"answer: case {number}: args must be a list and kwargs an object")
        if "$opaque" in json.dumps(case):
            raise ValueError(f"answer: case {number} holds a value that is not plain")
        code_guest.decode([case.get("args", []), case.get("kwargs", {}), case["expected"]])


# --- the verdict ---


def judge(answer: Mapping, code: str, limits: Limits) -> Judgement:
    """Runs the code for a task's answer. Never raises for what the code does."""
    start = {"prompt": answer.get("prompt", ""), "code": code, "entry_point": answer["entry_point"]}
    try:
        with Box(SOLUTION, limits) as solution:
            if "cases" in answer:
                return judge_cases(answer["cases"], solution, start)
            with Box(TEST, limits) as test:
                return judge_test(answer, solution, start, test)
    except OSError:  # no process or no file descriptor left: ours to solve
        return Judgement(Verdict.ENVIRONMENT, 0.0 if "cases" in answer else None)


def judge_cases(cases: Sequence[Mapping], solution: Box, start: Mapping) -> Judgement:
    send(solution, start)
    if "loaded" not in receive(solution):
        return Judgement(VERDICT_OF.get(solution.status, Verdict.WRONG), 0.0)
    right = 0
    for case in cases:
        send(solution, {"args": case.get("args", []), "kwargs": case.get("kwargs", {})})
        answer = receive(solution)
        right += "returned" in answer and same(answer["returned"], case["expected"])
        if solution.status is not None:
            break
    share = right / len(cases)
    return Judgement(Verdict.PASSED if share == 1 else VERDICT_OF.get(solution.status, Verdict.WRONG), share)


def judge_test(answer: Mapping, solution: Box, start: Mapping, test: Box) -> Judgement:
    """Passes calls from the test to the solution and answers back, until the test says how it went."""
    send(solution, start)
    if "loaded" not in receive(solution):
        return Judgement(VERDICT_OF.get(solution.status, Verdict.WRONG))
    seal, answered = secrets.token_hex(16), False
    send(test, {field: answer[field] for field in ("prompt", "test", "entry_point")} | {"seal": seal})
    while True:
        message = receive(test)
        if message.get("passed") == seal:
            return Judgement(Verdict.PASSED)
        if "args" not in message:
            # Whatever becomes of a test that has seen the solution's values is the solution's doing: it may not choose to go unjudged.
            return Judgement(Verdict.WRONG if answered else Verdict.ENVIRONMENT)
        send(solution, message)
        reply = receive(solution)
        if not reply:
            return Judgement(VERDICT_OF.get(solution.status, Verdict.WRONG))
        send(test, reply)
        answered = True


def send(box: Box, message: Mapping):
    box.send(json.dumps(message).encode("ascii") + b"\n")


def receive(box: Box) -> dict:
    """The next message, an object; an empty one where there is none or it is not one."""
    line = box.receive_line()
    try:
        message = json.loads(line or b"{}")
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def same(tree, expected) -> bool:
    """Whether an untrusted tree is that of the expected value."""
    try:
        return code_guest.canonical(tree) == code_guest.canonical(expected)
    except (ValueError, TypeError, RecursionError):
        return False
