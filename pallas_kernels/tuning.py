"""Block sizes by kind of device and shape, from a kernel's tuning.json; what is not in it is up to
the kernel's own safe rule.
"""

from __future__ import annotations

import functools
import json
import pathlib

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.target import target_platform

VMEM_SHARE = 0.9  # of a chip's vector memory that a kernel may take
SIMULATED_VMEM = 2**26


@functools.cache
def table(folder: pathlib.Path) -> dict[str, dict[str, dict]]:
    """Kind of device -> key of a shape -> blocks, as `python -m pallas_kernels.tune` wrote them;
    empty where it was never run.
    """
    path = folder / "tuning.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def lookup(folder: pathlib.Path, kind: str | None, key: str) -> dict | None:
    """Tuned blocks of a shape on a kind of device (target.target_kind); None where that was not
    tuned.
    """
    return table(folder).get(kind, {}).get(key)


def vmem_limit() -> int:
    """Bytes of vector memory for a kernel of the current trace, for pltpu.CompilerParams."""
    return int(
        VMEM_SHARE
        * (
            pltpu.get_tpu_info().vmem_capacity_bytes
            if target_platform() == "tpu"
            else SIMULATED_VMEM
        )
    )
