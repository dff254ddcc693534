"""Rewards for code. The verdict is formed outside of the process that runs the solution, and what
it is measured by never enters it.

The solution answers calls in a sandbox of its own: it gets arguments and gives plain values
(code_guest), and that is all it can do. Expected values of `cases` stay in this process, which
compares texts. A `test` runs in a second sandbox, where `candidate` stands for the solution and
passes calls on (code_tester); it says that it passed by a seal that only it was given. So there is
no test to read or to patch, no result to forge but an answer, no `==` of the solution's own, and
who leaves early has not answered. A program of `stdio` cases is run once for each, and never sees
what its output is compared with.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from glm_jax import sandbox, sandbox_guest
from glm_jax.rewards import code_guest, code_tester, fences
from glm_jax.rollouts.task import Reward, Task
from glm_jax.sandbox import Box, Limits, Status

FORMS = {  # required fields, optional ones
    "test": ({"prompt", "entry_point", "test"}, set()),
    "cases": ({"entry_point", "cases"}, {"prompt"}),
    "stdio": ({"stdio"}, {"prompt", "tolerance"}),
}


SOLUTION = sandbox.program_of(sandbox_guest, code_guest, call="answer_calls()")
TEST = sandbox.program_of(sandbox_guest, code_guest, code_tester, call="run_test()")


class Verdict(enum.Enum):
    PASSED = "passed"
    WRONG = "wrong"  # an answer, an exception, or no answer
    TIMEOUT = "timeout"
    RESOURCES = "resources"  # too much memory, output, too many processes or files
    # the machine's fault or the task's; says nothing about the solution
    ENVIRONMENT = "environment"


VERDICT_OF: dict[Status | None, Verdict] = {  # None: it still runs
    Status.TIMEOUT: Verdict.TIMEOUT,
    Status.ENVIRONMENT: Verdict.ENVIRONMENT,
}
VERDICT_OF |= dict.fromkeys(
    (Status.MEMORY, Status.PROCESSES, Status.FILES, Status.OUTPUT), Verdict.RESOURCES
)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """share: of the cases that were right; None for a test, which tells only whether all of it
    passed.
    """

    verdict: Verdict
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class CodeVerifier:
    """The verifier "code". A task's answer is one of

        {"entry_point": name, "prompt": text, "test": text} {"entry_point": name, "cases": [{"args":
        [...], "kwargs": {...}, "expected": value}, ...], "prompt": text} {"stdio": [{"input": text,
        "output": text}, ...], "prompt": text, "tolerance": number}

    A test asserts at its top level, in check(candidate), in functions test_* or classes Test* as
    pytest runs them, or in unittest.TestCases; it calls the entry point by its name or as
    `candidate`, a function, a class, or either of them asynchronous. Cases have plain values as
    code_guest has them; types count: 1 is not 1.0, a list is not a tuple. A program of stdio reads
    its input and prints; white space at the end of lines and empty lines at the end do not count,
    and with a tolerance numbers need only be as near, absolutely or relatively. The prompt is what
    a solution may continue: its imports and helpers are there for a solution that is whole as well.
    workers: solutions that are run at a time.
    """

    limits: Limits = sandbox.STANDARD
    workers: int = os.cpu_count() or 1

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises ValueError naming the first task whose answer it cannot use, or where there is no
        sandbox.

        Every test is run with a solution that raises: it must call it, and must not pass.
        """
        sandbox.check()

        def check_one(task):
            try:
                check_answer(task.answer)
                if "test" in task.answer:
                    check_test(task.answer, self.limits)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
                return ValueError(f"task {task.id!r}: {error}")

        with ThreadPoolExecutor(self.workers) as pool:
            for error in pool.map(check_one, tasks):
                if error is not None:
                    raise error

    def score(self, tasks: Sequence[Task], messages: Sequence[Mapping]) -> list[Reward]:
        """1 for code that passes all, else 0. Parts: `passed`, `timeout`, `environment_error`, with
        cases `share_of_cases`.

        Where `environment_error` is 1 the value says nothing about the message, and must be used
        neither for it nor against it.
        """
        pairs = list(zip(tasks, messages, strict=True))
        with ThreadPoolExecutor(self.workers) as pool:
            return list(
                pool.map(
                    lambda pair: reward_of(judge(pair[0].answer, code_of(*pair), self.limits)),
                    pairs,
                )
            )


def code_of(task: Task, message: Mapping) -> str:
    return extract_code(message["content"], task.answer.get("entry_point"))


def reward_of(judgement: Judgement) -> Reward:
    names = {
        "passed": Verdict.PASSED,
        "timeout": Verdict.TIMEOUT,
        "environment_error": Verdict.ENVIRONMENT,
    }
    parts = {name: float(judgement.verdict is verdict) for name, verdict in names.items()}
    if judgement.share is not None:
        parts["share_of_cases"] = judgement.share
    return Reward(parts["passed"], parts)


def extract_code(content: str | None, entry_point: str | None = None) -> str:
    """The solution in an answer, see fences.solution."""
    return fences.solution(content or "", entry_point)


def check_answer(answer):
    """Raises ValueError, TypeError, SyntaxError or RecursionError for an answer that is none of
    CodeVerifier's.
    """
    if not isinstance(answer, dict):
        raise ValueError(f"answer must be an object, not {type(answer).__name__}")
    form = next((name for name in FORMS if name in answer), None)
    if form is None:
        raise ValueError(f"answer has neither {' nor '.join(FORMS)}")
    required, optional = FORMS[form]
    wrong = sorted((required - answer.keys()) | (answer.keys() - required - optional))
    if wrong:
        raise ValueError(
            f"answer with {form} has the fields {', '.join(sorted(answer))}; must have"
            f" {', '.join(sorted(required))}"
        )
    for field in ("entry_point", "prompt", "test"):
        if not isinstance(answer.get(field, ""), str):
            raise ValueError(f"answer: {field} must be text, not {answer[field]!r}")
    if "entry_point" in answer and not answer["entry_point"].isidentifier():
        raise ValueError(f"answer: entry_point={answer['entry_point']!r} is no name")
    for source in (answer.get("prompt", ""), answer.get("test", "")):
        ast.parse(source)
    if form != "test" and not (isinstance(answer[form], list) and answer[form]):
        raise ValueError(f"answer: {form} must be a list, and not empty")
    check_cases(answer.get("cases", ()))
    check_stdio(answer.get("stdio", ()), answer.get("tolerance", 0))


def check_cases(cases):
    for number, case in enumerate(cases):
        if (
            not isinstance(case, dict)
            or "expected" not in case
            or case.keys() - {"args", "kwargs", "expected"}
        ):
            raise ValueError(
                f"answer: case {number} must have expected, and may have args and kwargs"
            )
        if not isinstance(case.get("args", []), list) or not isinstance(
            case.get("kwargs", {}), dict
        ):
            raise ValueError(f"answer: case {number}: args must be a list and kwargs an object")
        if "$opaque" in json.dumps(case):
            raise ValueError(f"answer: case {number} holds a value that is not plain")
        code_guest.canonical(case["expected"])
        code_guest.decode([case.get("args", []), case.get("kwargs", {}), case["expected"]])


def check_stdio(cases, tolerance):
    for number, case in enumerate(cases):
        texts = (
            isinstance(case, dict)
            and case.keys() == {"input", "output"}
            and all(isinstance(text, str) for text in case.values())
        )
        if not texts:
            raise ValueError(
                f"answer: case {number} of stdio must have input and output, both text"
            )
    if (
        isinstance(tolerance, bool)
        or not isinstance(tolerance, int | float)
        or not 0 <= tolerance < 1
    ):
        raise ValueError(f"answer: tolerance={tolerance!r} must be a number from 0 to below 1")


def check_test(answer: Mapping, limits: Limits):
    """Raises ValueError for a test that passes with a solution that raises, that never calls one,
    or that looks at its output.
    """
    for name in ("redirect_stdout", "sys.stdout", "builtins.print", "builtins.input"):
        if name in answer["test"]:
            raise ValueError(
                f"the test uses {name}: the solution's input and output are in its own sandbox; a"
                " task of stdio has them"
            )
    seal, calls = secrets.token_hex(16), 0
    with Box(TEST, limits) as test:
        send(test, start_of_test(answer, seal))
        while "do" in (message := receive(test)):
            calls += 1
            send(test, {"raised": ["RuntimeError"], "text": "a solution that raises", "args": []})
    if test.status is Status.ENVIRONMENT:
        return  # the machine's fault
    if message.get("passed") == seal:
        raise ValueError(
            "the test passes with a solution that raises" if calls else "the test calls nothing"
        )
    if "cannot_cross" in message:
        raise ValueError(
            f"the test gives the solution a {message['cannot_cross']}, which cannot go to its"
            " sandbox"
        )
    if not calls:
        raise ValueError(
            f"the test ends before it calls the solution: {message.get('failed', test.status)}"
        )


# --- the verdict ---


def judge(answer: Mapping, code: str, limits: Limits) -> Judgement:
    """Runs the code for a task's answer. Never raises for what the code does."""
    try:
        if "stdio" in answer:
            return judge_stdio(answer, code, limits)
        start = {
            "prompt": answer.get("prompt", ""),
            "code": code,
            "entry_point": answer["entry_point"],
            "by_test": "test" in answer,
        }
        with Box(SOLUTION, limits) as solution:
            if "cases" in answer:
                return judge_cases(answer["cases"], solution, start)
            with Box(TEST, limits) as test:
                return judge_test(answer, solution, start, test)
    except OSError:  # no process or no file descriptor left: ours to solve
        return Judgement(Verdict.ENVIRONMENT, None if "test" in answer else 0.0)


def judge_cases(cases: Sequence[Mapping], solution: Box, start: Mapping) -> Judgement:
    send(solution, start)
    if "loaded" not in receive(solution):
        return Judgement(VERDICT_OF.get(solution.status, Verdict.WRONG), 0.0)
    right = 0
    for case in cases:
        send(
            solution,
            {
                "do": "call",
                "args": [{"$ref": 0}, *case.get("args", [])],
                "kwargs": case.get("kwargs", {}),
            },
        )
        answer = receive(solution)
        right += "returned" in answer and same(answer["returned"], case["expected"])
        if solution.status is not None:
            break
    share = right / len(cases)
    return Judgement(
        Verdict.PASSED if share == 1 else VERDICT_OF.get(solution.status, Verdict.WRONG), share
    )


def judge_stdio(answer: Mapping, code: str, limits: Limits) -> Judgement:
    """Runs the program once a case, until one is not a plain failure: there is no use in more time
    or memory.
    """
    cases, right, stopped = answer["stdio"], 0, None
    program = (
        answer.get("prompt", "") + code if is_continued(answer.get("prompt", ""), code) else code
    )
    for case in cases:
        outcome = sandbox.run(program, limits, case["input"].encode("utf-8", "surrogatepass"))
        ended = outcome.status is Status.COMPLETED
        right += ended and same_output(outcome.stdout, case["output"], answer.get("tolerance", 0))
        if outcome.status in VERDICT_OF:
            stopped = VERDICT_OF[outcome.status]
            break
    share = right / len(cases)
    return Judgement(Verdict.PASSED if share == 1 else stopped or Verdict.WRONG, share)


def is_continued(prompt: str, code: str) -> bool:
    """Whether the code goes on where the prompt ends: a program that is whole begins anew."""
    return bool(prompt) and code[:1] in (" ", "\t")


def same_output(found: str, expected: str, tolerance: float) -> bool:
    """Compared as judges do: line by line, without white space at their ends and empty lines at the
    end.
    """
    lines, right = (
        [line.rstrip() for line in text.rstrip().splitlines()] for text in (found, expected)
    )
    if lines == right or tolerance == 0:
        return lines == right
    pairs = [
        list(zip(a.split(), b.split(), strict=False)) for a, b in zip(lines, right, strict=False)
    ]
    same_shape = [len(line.split()) for line in lines] == [len(line.split()) for line in right]
    return same_shape and all(a == b or is_near(a, b, tolerance) for line in pairs for a, b in line)


def is_near(found: str, expected: str, tolerance: float) -> bool:
    try:
        a, b = float(found), float(expected)
    except ValueError:
        return False
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def start_of_test(answer: Mapping, seal: str) -> dict:
    return {field: answer[field] for field in ("prompt", "test", "entry_point")} | {"seal": seal}


def judge_test(answer: Mapping, solution: Box, start: Mapping, test: Box) -> Judgement:
    """Passes calls from the test to the solution and answers back, until the test says how it
    went.
    """
    send(solution, start)
    if "loaded" not in receive(solution):
        return Judgement(VERDICT_OF.get(solution.status, Verdict.WRONG))
    seal, answered = secrets.token_hex(16), False
    send(test, start_of_test(answer, seal))
    while True:
        message = receive(test)
        if message.get("passed") == seal and answered:
            return Judgement(Verdict.PASSED)
        # a test of nothing, or of what only one process can hold
        if "passed" in message or "cannot_cross" in message:
            return Judgement(Verdict.ENVIRONMENT)
        if "do" not in message:
            # Whatever becomes of a test that has seen the solution's values is the solution's
            # doing: it may not choose to go unjudged.
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
    except (ValueError, RecursionError, MemoryError):
        return {}
    return message if isinstance(message, dict) else {}


def same(tree, expected) -> bool:
    """Whether an untrusted tree is that of the expected value."""
    try:
        return code_guest.canonical(tree) == code_guest.canonical(expected)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError):
        return False
