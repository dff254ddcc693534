"""Tasks by mutation: a bug is injected into a repository whose tests pass, and some then fail."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import random
from collections.abc import Iterator, Mapping

from glm_jax.envs.software import mutation
from glm_jax.envs.software.judge import LIMITS, TestRun, packages, run_both, run_tests
from glm_jax.envs.software.mutation import Mutation
from glm_jax.envs.software.repository import (
    Record,
    Repository,
    environment_of,
    load,
    read_sdist,
    record_path,
)
from glm_jax.files import write_text

MAX_SECONDS = 6.0  # of CPU, for a repository's tests: every episode runs them
MIN_TESTS = 10
MAX_FAILING_SHARE = 0.2  # of the tests: a bug that breaks more is seen at once
NAMED_TESTS = 8  # in the text of a task
VERIFIER = "software"


def record(folder: pathlib.Path, sdist: pathlib.Path) -> Record:
    """Runs a repository's tests as they are, twice, and altered, and writes what came of them.
    Raises ValueError where no tasks can be made from it.
    """
    repository = read_sdist(sdist)
    name = sdist.name.removesuffix(".tar.gz")
    installed = {path.name.removesuffix(".py") for path in environment_of(folder).iterdir()}
    if both := sorted(packages(repository.sources) & installed):
        raise ValueError(f"{name}: {both[0]} is in the environment, where its solution can be read")
    first = run_tests(repository, repository.files, folder)
    second, control = run_both(repository, repository.files, folder)
    passed = [test for test, outcome in first.outcomes.items() if outcome == "passed"]
    if len(passed) < MIN_TESTS:
        raise ValueError(
            f"{name}: {len(passed)} of {len(first.outcomes)} tests pass, at least {MIN_TESTS} must"
        )
    if first.outcomes != second.outcomes or control.outcomes.keys() != first.outcomes.keys():
        raise ValueError(f"{name}: its tests are not the same in two runs")
    if first.seconds > MAX_SECONDS:
        raise ValueError(f"{name}: its tests take {first.seconds:.1f} s, at most {MAX_SECONDS:g}")
    controls = tuple(test for test in passed if control.outcomes[test] != "passed")
    found = Record(
        repository.name, repository.version, repository.license, sdist.name,
        hashlib.sha256(sdist.read_bytes()).hexdigest(), first.outcomes, controls, first.seconds,
    )  # fmt: skip
    write_text(record_path(folder, name), json.dumps(dataclasses.asdict(found)) + "\n")
    return found


def sampled(repository: Repository, seed: int) -> list[Mutation]:
    """At most one mutation of each line of the sources, in a random order."""
    found = [
        change
        for path in repository.sources
        for change in mutation.sample(path, repository.files[path], seed)
    ]
    random.Random(f"{seed} {repository.name}").shuffle(found)
    return found


def broken(repository: Repository, change: Mutation) -> dict[str, bytes]:
    """The repository's files with the bug."""
    return {
        **repository.files,
        change.file: change.apply(repository.files[change.file]),
    }


def failing(record: Record, run: TestRun) -> list[str]:
    """The tests that a bug breaks; none where it is no task: it breaks nothing, too much, the
    collection, or tests that an honest run would pass when they are altered.
    """
    if run.outcomes.keys() != record.tests.keys():
        return []
    found = [test for test in record.passed if run.outcomes[test] != "passed"]
    too_many = len(found) > MAX_FAILING_SHARE * len(record.passed)
    return [] if too_many or not set(found) <= set(record.controls) else found


def attempts(folder: pathlib.Path, name: str, seed: int, done: int) -> Iterator[dict | None]:
    """Tries one mutation after the other, from number `done` on: the task of each as a line of a
    task file, or None for one that makes none.
    """
    repository, record = load(str(folder), name)
    # A loop without an end is no task, and there is no need to wait for it.
    limits = dataclasses.replace(LIMITS, cpu_seconds=2 + math.ceil(2 * record.seconds))
    for change in sampled(repository, seed)[done:]:
        files = broken(repository, change)
        if not mutation.compiles(files[change.file]):
            yield None
            continue
        run = run_tests(repository, files, folder, traceback="short", limits=limits)
        tests = failing(record, run)
        yield task_of(folder, name, record, change, tests, run.texts) if tests else None


def task_of(
    folder: pathlib.Path,
    name: str,
    record: Record,
    change: Mutation,
    tests: list[str],
    texts: Mapping[str, str],
) -> dict:
    """A line of a task file, see environment.check_answer."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(change)).encode()).hexdigest()[:8]
    answer = {
        "folder": str(folder), "repository": name, "sha256": record.sha256,
        "mutation": dataclasses.asdict(change), "fail_to_pass": tests,
        "pass_to_pass": len(record.passed) - len(tests),
    }  # fmt: skip
    return {
        "id": f"{name}:{change.file}:{change.line}:{digest}", "group": f"software/{record.name}",
        "verifier": VERIFIER, "prompt": question(record, tests, texts), "answer": answer,
    }  # fmt: skip


def question(record: Record, tests: list[str], texts: Mapping[str, str]) -> str:
    """Which behaviour fails, and not where the bug is."""
    named = "\n".join(f"- {test}" for test in tests[:NAMED_TESTS])
    more = f"\n- and {rest} more" if (rest := len(tests) - NAMED_TESTS) > 0 else ""
    shown = next((test for test in tests if test in texts), None)
    output = f"\n\n{shown} fails like this:\n\n{texts[shown]}" if shown is not None else ""
    return (
        f"The Python package {record.name} {record.version} is in the current folder. Its source"
        f" code has a bug. These tests fail, and pass without it:\n\n{named}{more}{output}\n\n"
        "Mend the bug in the package's source code. `python -m pytest` runs the tests. They are"
        " right: in the end all of them are run as they were, whatever became of their files and"
        " settings. A fix that newly imports or uses what has to do with the test run or the"
        " interpreter's insides (os, sys, getattr, __eq__, ...) is refused. Call submit when you"
        " are done."
    )
