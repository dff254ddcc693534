"""Which devices there are: found at start-up and said, and no TPU is requested where there is none.
What is compiled for them is kept.
"""

from __future__ import annotations

import collections
import glob
import importlib.util
import logging
import os
import pathlib

import jax

logger = logging.getLogger(__name__)

TPU_VENDOR = "0x1ae0"  # of the PCI devices of TPU hosts
# set on TPU VMs and by GKE
TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
COMPILED = pathlib.Path("~/.cache/glm_jax/compiled").expanduser()
GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")


def has_tpu() -> bool:
    """Whether this host has a TPU, or is told that it has."""
    vendors = (
        pathlib.Path(file).read_text().strip()
        for file in glob.glob("/sys/bus/pci/devices/*/vendor")
    )
    return (
        any(name in os.environ for name in TPU_VARIABLES)
        or bool(glob.glob("/dev/accel*"))
        or TPU_VENDOR in vendors
    )


def has_gpu() -> bool:
    return any(os.path.exists(device) for device in GPU_DEVICES)


def choose_platforms():
    """Keeps JAX from trying a TPU where there is none: libtpu may be installed as a compiler, and
    prints errors then.

    To be called before JAX's first use. Does nothing where JAX_PLATFORMS or jax_platforms says what
    to take.
    """
    if not (jax.config.values["jax_platforms"] or has_tpu() or has_gpu()):
        jax.config.update("jax_platforms", "cpu")


def keep_compiled_programs():
    """Keeps compiled programs in COMPILED for the next start, where this host has an accelerator
    and nothing names another folder: a large model's step compiles for minutes.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None and (has_tpu() or has_gpu()):
        jax.config.update("jax_compilation_cache_dir", str(COMPILED))


def describe() -> str:
    """The devices of all processes, such as '4 x TPU v5p'. Warns where an accelerator's plugin is
    installed and none was found.
    """
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    installed = [
        n
        for n in ("jax_cuda13_plugin", "jax_cuda12_plugin")
        if importlib.util.find_spec(n) is not None
    ]
    if jax.default_backend() == "cpu" and (installed or has_tpu()):
        reason = f"{installed[0]} is installed" if installed else "this host has a TPU"
        logger.warning("JAX found no accelerator although %s: the CPU computes", reason)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
