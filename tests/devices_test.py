"""What is asked for where there is no accelerator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from glm_jax import devices

PROGRAM = (
    "from glm_jax import devices; devices.choose_platforms(); import jax;"
    " print(jax.devices()[0].platform)"
)


def run(**environment):
    hidden = (*devices.TPU_VARIABLES, "JAX_PLATFORMS", "XLA_FLAGS")
    given = {k: v for k, v in os.environ.items() if k not in hidden} | environment
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_no_tpu_is_asked_for_where_there_is_none():
    """libtpu is installed with the tests, as the compiler of the planner, and complains when it is
    asked for a TPU.
    """
    if devices.has_tpu() or devices.has_gpu():
        return
    done = run(JAX_PLATFORMS="")
    assert (done.returncode, done.stdout) == (0, "cpu\n") and "TPU" not in done.stderr, done.stderr


def test_a_tpu_that_is_said_to_be_there_is_asked_for(monkeypatch):
    monkeypatch.setattr(
        devices.jax.config,
        "update",
        lambda *_: (_ for _ in ()).throw(AssertionError("a choice was made")),
    )
    monkeypatch.setenv("TPU_NAME", "local")
    assert devices.has_tpu()
    devices.choose_platforms()


@pytest.mark.parametrize(
    ("accelerator", "named", "kept"),
    [(True, None, str(devices.COMPILED)), (True, "/mine", "/mine"), (False, None, None)],
)
def test_programs_are_kept_where_there_is_an_accelerator(monkeypatch, accelerator, named, kept):
    monkeypatch.setattr(devices, "has_tpu", lambda: accelerator)
    monkeypatch.setattr(devices, "has_gpu", lambda: False)
    before = devices.jax.config.jax_compilation_cache_dir
    try:
        devices.jax.config.update("jax_compilation_cache_dir", named)
        devices.keep_compiled_programs()
        assert devices.jax.config.jax_compilation_cache_dir == kept
    finally:
        devices.jax.config.update("jax_compilation_cache_dir", before)


def test_devices_are_described():
    assert devices.describe() == "8 x cpu"
