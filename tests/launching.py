"""Entry points as real processes, one or several, on simulated CPU devices."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import toy

SECONDS = 400  # until processes that hang are ended; the machine may be busy


def flags(config: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in config.items()]


# configs/tiny.py for the toy, without the MTP block: a third less to compile
SMALL = {f"model.{key}": value for key, value in toy.MODEL.items()} | {
    "model.num_mtp_layers": 0,
    "data.sequence_length": 64,
    "loop.sample_every": 0,
}


class Launch:
    """Processes of `python -m MODULE ARGUMENTS`, each with its part of `devices` CPU devices, that
    have started. One process, too, is one of jax.distributed, so that the same library sums over
    devices, in the same order.
    """

    def __init__(
        self,
        log: pathlib.Path,
        module: str,
        arguments,
        *,
        count: int,
        devices: int = 4,
        further: dict[int, list[str]] | None = None,
    ):
        """further: more arguments, of the processes with these indices."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        changes = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices // count),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }
        self.logs = [log.with_name(f"{log.name}_{index}.txt") for index in range(count)]
        self.processes = []
        for index, file in enumerate(self.logs):
            with file.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        [
                            sys.executable, "-m", module, *arguments, "--distributed",
                            f"--coordinator=localhost:{port}", f"--num_processes={count}",
                            f"--process_index={index}", "--noprogress",
                            *(further or {}).get(index, ()),
                        ],
                        env=os.environ | changes, stdout=out, stderr=subprocess.STDOUT,
                        cwd=pathlib.Path(__file__).parent.parent,
                    )
                )  # fmt: skip

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, what: Callable[[], bool]):
        """Waits until something is so; fails where a process ends before."""
        end = time.monotonic() + SECONDS
        while not what():
            assert all(p.poll() is None for p in self.processes), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def ends(self) -> list[int]:
        """Exit codes, once all have ended."""
        end = time.monotonic() + SECONDS
        return [p.wait(timeout=max(end - time.monotonic(), 1)) for p in self.processes]

    def said(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in self.logs)


def finish(log: pathlib.Path, module: str, arguments, *, count: int) -> str:
    """What the processes said, all of which must end well."""
    with Launch(log, module, arguments, count=count) as launch:
        assert launch.ends() == [0] * count, launch.said()
        return launch.said()
