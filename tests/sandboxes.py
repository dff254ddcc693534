"""Marks tests that need a sandbox, and the plain process that attacks are tried in for
comparison.
"""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from glm_jax import sandbox


@functools.cache
def missing() -> str:
    """Why there is no sandbox here; empty where there is one."""
    try:
        sandbox.check()
    except ValueError as error:
        return str(error)
    return ""


needs_sandbox = pytest.mark.skipif(bool(missing()), reason=f"no sandbox here: {missing()}")


def run_unprotected(program: str, **options) -> str:
    """stdout of a program of ours, run like any other."""
    line = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.run(
        line, check=False, capture_output=True, text=True, timeout=30, **options
    ).stdout
