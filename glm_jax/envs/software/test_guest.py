"""Inside the sandbox that judges: runs pytest on a repository and reports what came of each test.

Imports nothing but the standard library before the tests run: its text is the program of a sandbox.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

TEXT_CHARACTERS = 1500  # of the failure of a test
TEXTS = 20


def run_tests():
    """Gets {"root", "paths", "files": {path: text}, "tests": files, "variables", "seal", "tb"}, and
    says, once pytest has ended, {"seal", "outcomes": {test: outcome}, "texts": {test: failure},
    "seconds": of CPU time}.
    """
    reader, writer = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    start = json.loads(reader.readline())
    for path, text in start["files"].items():
        file = pathlib.Path(start["root"], path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode("latin-1"))
    os.chdir(start["root"])
    os.environ.update(start["variables"])
    sys.path[:0] = start["paths"]
    sys.dont_write_bytecode = True
    import pytest

    recorder, write, leave, dumps = Recorder(), os.write, os._exit, json.dumps
    line = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-o", "addopts=",
            f"--tb={start['tb']}", f"--rootdir={start['root']}", *start["tests"]]  # fmt: skip
    pytest.main(line, plugins=[recorder])
    report = {"seal": start["seal"], "outcomes": recorder.outcomes, "texts": recorder.texts,
              "seconds": sum(os.times()[:4])}  # fmt: skip
    data = dumps(report).encode("ascii") + b"\n"
    while data:
        data = data[write(writer, data) :]
    leave(0)


class Recorder:
    """pytest's plugin: `failed` of any phase or subtest counts, `passed` is that of the call."""

    def __init__(self):
        self.outcomes, self.texts = {}, {}

    def pytest_collectreport(self, report):
        if report.failed:
            self.note(report, "error")

    def pytest_runtest_logreport(self, report):
        if report.failed or report.skipped:
            self.note(report, report.outcome)
        elif report.when == "call":
            self.outcomes.setdefault(report.nodeid, "passed")

    def note(self, report, outcome):
        if self.outcomes.get(report.nodeid) not in ("failed", "error"):
            self.outcomes[report.nodeid] = outcome
        if outcome != "skipped" and len(self.texts) < TEXTS:
            self.texts.setdefault(report.nodeid, report.longreprtext[-TEXT_CHARACTERS:])
