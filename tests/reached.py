"""A pytest plugin for tests/mutations.py: records which lines of glm_jax each test reaches, or runs
the tests in an order that is given, each with a time limit.

REACHED_RECORD names the file to write, or REACHED_ORDER the file to read. REACHED_STARTED names a
file that gets one line for each test that starts: with -x the last one is the one that failed.
Needs Python 3.12, for sys.monitoring.
"""

from __future__ import annotations

import collections
import faulthandler
import json
import os
import pathlib
import sys
import time

import pytest

ROOT = os.path.realpath(pathlib.Path(__file__).parent.parent)
PRODUCT = os.path.join(ROOT, "glm_jax", "")
COLLECTION_SECONDS = 120
_faulthandler_to = os.fdopen(os.dup(2), "w")  # before pytest captures it


class Recorder:
    """test -> seconds, reached lines of each file, whether it started a process. The test "" is
    what happens outside of tests, above all imports.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.test = path, ""
        self.lines = collections.defaultdict(lambda: collections.defaultdict(set))
        self.seconds, self.processes = {"": 0.0}, set()
        sys.monitoring.use_tool_id(sys.monitoring.COVERAGE_ID, "reached")
        sys.monitoring.register_callback(
            sys.monitoring.COVERAGE_ID, sys.monitoring.events.LINE, self._line
        )
        sys.monitoring.set_events(sys.monitoring.COVERAGE_ID, sys.monitoring.events.LINE)
        sys.addaudithook(self._audit)

    def _line(self, code, line: int):
        if code.co_filename.startswith(PRODUCT):
            self.lines[self.test][code.co_filename[len(ROOT) + 1 :]].add(line)
        return sys.monitoring.DISABLE  # until restart_events: a line is told once a test

    def _audit(self, event: str, _):
        if event in ("subprocess.Popen", "os.posix_spawn", "os.fork"):
            self.processes.add(self.test)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        self.test, started = item.nodeid, time.perf_counter()
        sys.monitoring.restart_events()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.perf_counter() - started
            self.test = ""

    def pytest_sessionfinish(self):
        sys.monitoring.set_events(sys.monitoring.COVERAGE_ID, 0)
        found = {
            test: {
                "seconds": round(seconds, 3), "process": test in self.processes,
                "lines": {file: sorted(lines) for file, lines in self.lines[test].items()},
            }
            for test, seconds in self.seconds.items()
        }  # fmt: skip
        self.path.write_text(json.dumps(found), "utf-8")


class Order:
    """path: seconds that each test may take, in the order to run; tests that it does not name are
    left out. A test that takes longer ends the process.
    """

    def __init__(self, path: pathlib.Path):
        self.limits = json.loads(path.read_text("utf-8"))
        faulthandler.dump_traceback_later(COLLECTION_SECONDS, exit=True, file=_faulthandler_to)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        place = {test: n for n, test in enumerate(self.limits)}
        chosen = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid not in place])
        items[:] = chosen

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        faulthandler.dump_traceback_later(
            self.limits[item.nodeid], exit=True, file=_faulthandler_to
        )
        return (yield)

    def pytest_sessionfinish(self):
        faulthandler.cancel_dump_traceback_later()


class Started:
    def __init__(self, path: pathlib.Path):
        self.path = path

    def pytest_runtest_logstart(self, nodeid):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(nodeid + "\n")


def pytest_configure(config):
    for variable, make in {
        "REACHED_RECORD": Recorder,
        "REACHED_ORDER": Order,
        "REACHED_STARTED": Started,
    }.items():
        if variable in os.environ:
            # not for the processes that a test starts
            config.pluginmanager.register(make(pathlib.Path(os.environ.pop(variable))))
