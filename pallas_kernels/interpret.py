"""Pallas kernels without a TPU: simulated on the CPU, by request only."""

from __future__ import annotations

import contextlib
import contextvars

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.target import target_platform

_params = contextvars.ContextVar("interpret", default=False)


def params() -> pltpu.InterpretParams | bool:
    """What pallas_call takes as `interpret`: False outside of `on`."""
    return _params.get()


@contextlib.contextmanager
def on(**options):
    """Kernels traced inside run simulated: memory spaces, copies, semaphores. options: of
    pltpu.InterpretParams, e.g. detect_races=True.
    """
    token = _params.set(pltpu.InterpretParams(**options))
    try:
        yield
    finally:
        _params.reset(token)


def available() -> bool:
    """Whether a kernel traced now can run: for a TPU (of this process or of the current mesh), or
    simulated.
    """
    return target_platform() == "tpu" or bool(params())
