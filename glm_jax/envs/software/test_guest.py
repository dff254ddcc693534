"""Inside the sandbox that judges: runs pytest on a repository and reports what came of each test.

Imports nothing but the standard library before the tests run: its text is the program of a sandbox.
"""

from __future__ import annotations

import os
import sys

from glm_jax.sandbox_guest import open_channel, unpack

TEXT_CHARACTERS = 1500  # of the failure of a test
TEXTS = 20


def run_tests():
    """Gets {"root", "paths", "files": {path: text}, "tests": files, "variables", "seal", "tb"}, and
    says, once pytest has ended, {"seal", "outcomes": {test: outcome}, "texts": {test: failure},
    "seconds": of CPU time}.
    """
    send, messages = open_channel()
    start = next(messages)
    unpack(start["root"], start["files"])
    os.environ.update(start["variables"])
    sys.path[:0] = start["paths"]
    sys.dont_write_bytecode = True
    import pytest

    recorder, leave = Recorder(), os._exit
    line = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-o", "addopts=",
            f"--tb={start['tb']}", f"--rootdir={start['root']}", *start["tests"]]  # fmt: skip
    pytest.main(line, plugins=[recorder])
    report = {"seal": start["seal"], "outcomes": recorder.outcomes, "texts": recorder.texts,
              "seconds": sum(os.times()[:4])}  # fmt: skip
    send(report)
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
