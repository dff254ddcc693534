"""Kernels that a program traces and lowers once for each shape, however often it calls them: a step
calls 15 kernels in some 90 places.
"""

from __future__ import annotations

import functools
import inspect

import jax

from pallas_kernels import interpret
from pallas_kernels.target import target_kind


def once(*static: str):
    """Decorates a function around a pallas_call; `static` names its arguments that are no arrays,
    and can be hashed.

    jax.jit keeps the trace and lowers it to one function that XLA inlines. What a trace depends on
    besides its arguments, the target and whether kernels are simulated, becomes an argument of it.
    """

    def decorate(function):
        def run(depends_on, **arguments):
            del depends_on
            return function(**arguments)

        run.__name__ = function.__name__
        traced = jax.jit(run, static_argnames=("depends_on", *static))
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            return traced(
                depends_on=(interpret.params(), target_kind()),
                **signature.bind(*args, **kwargs).arguments,
            )

        return call

    return decorate
