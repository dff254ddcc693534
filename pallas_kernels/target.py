"""What the current trace is for: the devices of the current mesh, which need not be this machine's,
else this process's own.
"""

from __future__ import annotations

import jax

KIND_OF_DEVICE = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}
WIDE_UNITS = ("v6e", "tpu7x")  # kinds whose MXUs are 256 wide, not 128
# kinds whose chips have two cores, which share a grid's parallel dimensions
TWO_CORES = ("v4", "v5p")


def target_platform() -> str:
    """cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def target_kind() -> str | None:
    """Kind of TPU; None where it is no TPU."""
    if target_platform() != "tpu":
        return None
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return KIND_OF_DEVICE.get(device.device_kind)


def heads_of_core(heads: int, cores: int) -> int:
    """Of those that a chip's cores work on: a core's share where they divide, else all of them."""
    return heads // cores if heads % cores == 0 else heads
