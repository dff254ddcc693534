"""The short form of tests/rl/kills.py: killed once while it trains, once inside a save."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_run_equals_the_undisturbed_one(start):
    command = [sys.executable, "tests/rl/kills.py", "--kills=2", f"--start={start}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    first, second, verdict = done.stdout.splitlines()
    assert "train of step" in first
    assert "inside save of step" in second and second.endswith("a checkpoint half written")
    assert re.fullmatch(
        r"2 kills, then left to end from step [1-9]: 0 differences in 10 steps, \d+ s", verdict
    )
