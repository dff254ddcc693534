"""Whether an agent has mended a repository: the original tests pass on its sources, in a sandbox of
their own.

Only the agent's Python of the package counts; tests, settings, plugins and all else are the
original's (Repository.with_sources). Then there are three hurdles for who does not mend the bug:

1. guard.py refuses new code that reaches for the test runner, without running it.
2. The report of a run has to come from the end of our own program, under a seal, and name exactly
   the tests of the original. Who ends the process early has no report.
3. A second sandbox runs altered tests, which an honest run fails (alteration.py). Sources that pass
   one of them have passed the tests by another way than their own.

What stays possible: the tests are there for the agent to read, so that code may be written for
their inputs alone, as in SWE-bench. And the tested code runs in one process with pytest: code that
passes the guard, by means that its file already had, can tell original from altered tests and find
the seal could write a report of its own.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from glm_jax import sandbox, sandbox_guest
from glm_jax.envs.software import guard, test_guest
from glm_jax.envs.software.alteration import altered
from glm_jax.envs.software.repository import Files, Record, Repository, environment_of
from glm_jax.rollouts.task import Reward
from glm_jax.sandbox import Box, Limits, Status

ROOT = "/tmp/repository"  # in the sandbox
ENVIRONMENT = "/environment"
LIMITS = Limits(
    wall_seconds=30.0, cpu_seconds=20, memory_bytes=2 << 30, processes=32, file_bytes=8 << 20,
    disk_bytes=64 << 20, files=5000, open_files=256, output_bytes=4 << 20,
)  # fmt: skip
GUARD = sandbox.program_of(guard, call="answer_guard()")
PROGRAM = sandbox.program_of(sandbox_guest, test_guest, call="run_tests()")


class MachineFailure(OSError):
    """No sandbox came up: it says nothing about what should have been run."""


@dataclasses.dataclass(frozen=True)
class TestRun:
    """outcomes: by pytest's names of the tests; empty where there is no report, for which `ending`
    gives the sandbox's reason. texts: of some failures. seconds: of CPU time, as the run says.
    """

    __test__ = False  # pytest would take it for a test

    outcomes: Mapping[str, str]
    texts: Mapping[str, str]
    ending: Status | None
    seconds: float = 0.0


def variables(repository: Repository) -> dict[str, str]:
    """Of the environment of all processes in a sandbox."""
    paths = ":".join([f"{ROOT}/{repository.root}", ENVIRONMENT])
    return {
        "PYTHONPATH": paths, "PATH": "/tmp/bin:/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip


def as_text(files: Files) -> dict[str, str]:
    return {path: data.decode("latin-1") for path, data in files.items()}


def run_tests(
    repository: Repository,
    files: Files,
    folder: pathlib.Path,
    stop: threading.Event | None = None,
    traceback: str = "no",
    limits: Limits | None = None,
) -> TestRun:
    """Runs the repository's test files as `files` has them. folder: of repositories. limits: LIMITS
    where there are none.
    """
    seal = secrets.token_hex(16)
    environment = variables(repository)
    start = {
        "root": ROOT, "files": as_text(files), "tests": repository.test_files, "seal": seal,
        "variables": environment, "paths": environment["PYTHONPATH"].split(":"), "tb": traceback,
    }  # fmt: skip
    with Box(PROGRAM, limits or LIMITS, [(str(environment_of(folder)), ENVIRONMENT)], stop) as box:
        box.send(json.dumps(start).encode("ascii") + b"\n")
        line = box.receive_line()
        if box.status is Status.ENVIRONMENT:
            raise MachineFailure(f"no sandbox for {repository.name}: {box.finish().stderr[-500:]}")
        report = _report(line, seal)
        return TestRun(
            report.get("outcomes", {}), report.get("texts", {}), box.status,
            report.get("seconds", 0.0),
        )  # fmt: skip


def _report(line: bytes | None, seal: str) -> dict:
    """Untrusted: empty unless it has the seal and the form of a report."""
    try:
        message = json.loads(line or b"{}")
    except (ValueError, RecursionError, MemoryError):
        return {}
    if not isinstance(message, dict) or message.get("seal") != seal:
        return {}
    forms = (isinstance(message.get(field), dict) for field in ("outcomes", "texts"))
    return message if all(forms) else {}


def with_altered_tests(repository: Repository, files: Files) -> dict[str, bytes]:
    return {**files, **{path: altered(files[path]) for path in repository.altered_files}}


def run_both(
    repository: Repository, files: Files, folder: pathlib.Path, stop: threading.Event | None = None
) -> tuple[TestRun, TestRun]:
    """The tests, and beside them the altered ones."""
    both = (files, with_altered_tests(repository, files))
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda f: run_tests(repository, f, folder, stop), both)
        original, control = runs
    return original, control


def judge(
    repository: Repository,
    record: Record,
    folder: pathlib.Path,
    sources: Files,
    stop: threading.Event | None = None,
    *,
    guarded: bool = True,
) -> Reward:
    """1 where all tests pass that pass in the original, else 0. sources: the agent's Python files.
    Parts: `refused` by the guard, `failed_tests` as a share, `forged` where altered tests pass.
    guarded: off only to show what the other hurdles do alone. Raises MachineFailure.
    """
    files = repository.with_sources(sources)
    if guarded and refusal(repository, files) is not None:
        return Reward(0.0, {"refused": 1.0})
    original, control = run_both(repository, files, folder, stop)
    required = record.passed
    failed = sum(original.outcomes.get(test) != "passed" for test in required) / len(required)
    same = original.outcomes.keys() == record.tests.keys() == control.outcomes.keys()
    forged = any(control.outcomes.get(test, "passed") == "passed" for test in record.controls)
    parts = {"refused": 0.0, "failed_tests": failed, "forged": float(forged)}
    return Reward(float(same and failed == 0 and not forged), parts)


def refusal(repository: Repository, files: Files) -> str | None:
    """Why the guard refuses the first changed file that it does, with its name. Raises
    MachineFailure.
    """
    before = repository.files
    changed = {
        path: [before[path].decode("latin-1") if path in before else None, data.decode("latin-1")]
        for path, data in files.items()
        if repository.is_source(path) and data != before.get(path)
    }
    asked = json.dumps({"changed": changed, "packages": sorted(packages(repository.sources))})
    outcome = sandbox.run(GUARD, sandbox.STANDARD, asked.encode("ascii"))
    if outcome.status is Status.ENVIRONMENT:
        raise MachineFailure(f"no sandbox for the guard: {outcome.stderr[-500:]}")
    if outcome.status is not Status.COMPLETED:
        return "the changed files cannot be parsed"
    return json.loads(outcome.stdout)["refused"]


def packages(sources: Sequence[str]) -> set[str]:
    """Names that a repository's sources are imported by."""
    return {path.removeprefix("src/").split("/")[0].removesuffix(".py") for path in sources}
