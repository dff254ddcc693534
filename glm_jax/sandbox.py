"""Untrusted Python, run apart from us by bubblewrap: no network, no files of ours, no other
process, and limits on all it could use up.

A sandbox has namespaces of its own (users, processes, mounts, network, IPC, host name), no
capability, an empty environment, the base interpreter with its standard library and the system's
libraries read-only, one small /tmp that it may write to, and a seccomp filter for what namespaces
do not hold: sockets (some families know no namespaces), kernel interfaces, memory that belongs to
no process. Limits that count per process are set inside, before the program begins; those on the
whole are watched from outside, which kills the process namespace at once. Root never runs a sandbox
as root: to a namespaced root, files of /proc/sys would still be its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import os
import pathlib
import selectors
import signal
import subprocess
import threading
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from glm_jax import bubblewrap
from glm_jax.bubblewrap import INSTALL, NOBODY, Limits

# for bwrap and the interpreter to come up: the machine's time, not the program's
START_SECONDS = 30.0
TICK = 0.05  # seconds between two looks from outside
STARTED = b"\x06"  # first byte of stdout, written before anything untrusted runs


class Status(enum.Enum):
    """How a program ended. All but ENVIRONMENT are its own doing."""

    COMPLETED = "completed"  # exit code 0
    FAILED = "failed"  # another exit code, or a signal
    TIMEOUT = "timeout"  # wall clock or CPU time
    MEMORY = "memory"
    PROCESSES = "processes"  # too many
    FILES = "files"  # too many
    OUTPUT = "output"  # too much
    CLOSED = "closed"  # we had no more use for it
    ENVIRONMENT = "environment"  # it never began; stderr says why


STANDARD = Limits(
    wall_seconds=10.0, cpu_seconds=10, memory_bytes=512 * 2**20, processes=8, file_bytes=8 * 2**20,
    disk_bytes=16 * 2**20, files=1000,
    open_files=64, output_bytes=2**20,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """stdout, stderr: at most output_bytes of each. seconds: from the program's begin on.
    exit_code: None where it was killed.
    """

    status: Status
    stdout: str
    stderr: str
    seconds: float
    exit_code: int | None


# --- one sandbox ---


class Box:
    """One program in a sandbox of its own, which ends with the `with` block. Belongs to the thread
    that makes it.

    status: None while it runs. Every wait is on the program's own clock, which stands while nobody
    waits. folders: of ours that it may read, as pairs of where they lie and where it has them.
    stop: once it is set, by whichever thread, the next wait, or the one under way, ends the program
    as CLOSED.
    """

    def __init__(
        self,
        program: str,
        limits: Limits,
        folders: Sequence[tuple[str, str]] = (),
        stop: threading.Event | None = None,
    ):
        self.limits, self._folders, self._stop = limits, folders, stop
        self.status: Status | None = None
        self.exit_code: int | None = None
        self._seconds_left, self._start_seconds_left = limits.wall_seconds, START_SECONDS
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._started = False
        self._received = 0
        self._last_look = time.monotonic()
        self._process, self._pidfd = self._begin()
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None, "all are pipes"
        self._stdin, self._stdout_pipe, self._stderr_pipe = stdin, stdout, stderr
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._end)
        for stream, receive in (
            (stdout, self._receive_stdout),
            (stderr, self._receive_stderr),
        ):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, receive)
        os.set_blocking(stdin.fileno(), False)
        data = program.encode("utf-8", "surrogatepass")
        self._unsent = bytearray()
        self.send(b"%016x" % len(data) + data)

    def _begin(self) -> tuple[subprocess.Popen, int]:
        """bwrap's process and a file descriptor of it. Raises OSError where the machine has no
        process or descriptor left.
        """
        rules = bubblewrap.seccomp_filter()
        read_end, write_end = os.pipe()
        try:
            os.write(write_end, rules)
            os.close(write_end)
            identity: dict[str, Any] = (
                dict(user=NOBODY, group=NOBODY, extra_groups=[]) if os.geteuid() == 0 else {}
            )
            process = subprocess.Popen(
                bubblewrap.command(self.limits, read_end, self._folders),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, bufsize=0, cwd="/",
                env={}, pass_fds=(read_end,), **identity,
            )  # fmt: skip
        finally:
            os.close(read_end)
        return process, os.pidfd_open(process.pid)

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, data: bytes):
        """Puts data on the program's stdin as far as it reads; the rest goes while we wait for its
        answer.
        """
        if self.status is None and not self._stdin.closed:
            if not self._unsent:
                self._selector.register(self._stdin, selectors.EVENT_WRITE, self._send_unsent)
            self._unsent += data
            self._send_unsent()

    def receive_line(self, seconds: float = math.inf) -> bytes | None:
        """The next line of its stdout, at most output_bytes, without its end; None where the
        program ended before, as `status` says. seconds: it may take from now on, else it is ended
        as TIMEOUT.
        """
        self._wait(lambda: b"\n" in self._stdout, seconds)
        line, newline, rest = self._stdout.partition(b"\n")
        if not newline:
            return None
        self._stdout, self._received = rest, len(rest)
        return bytes(line)

    def finish(self) -> Outcome:
        """Closes its stdin once all is sent, and waits for its end."""
        self._wait(lambda: not self._unsent)
        self._stdin.close()
        self._wait(lambda: False)
        assert self.status is not None, "it has ended"
        stdout, stderr = (
            part[: self.limits.output_bytes].decode("utf-8", "replace")
            for part in (self._stdout, self._stderr)
        )
        return Outcome(
            self.status,
            stdout,
            stderr,
            self.limits.wall_seconds - self._seconds_left,
            self.exit_code,
        )

    def close(self):
        """Kills what still runs, the program's children included."""
        if self.status is None:
            self._kill(Status.CLOSED)
        self._selector.close()
        for stream in (self._stdin, self._stdout_pipe, self._stderr_pipe):
            stream.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _wait(self, done: Callable[[], bool], seconds: float = math.inf):
        """Lets bytes flow until done() or the program's end, and ends it where it goes over a
        limit.
        """
        while self.status is None and not done():
            if self._stop is not None and self._stop.is_set():
                self._kill(Status.CLOSED)
                return
            begun, was_started = time.monotonic(), self._started
            left = min(seconds, self._seconds_left) if was_started else self._start_seconds_left
            if left <= 0:
                self._kill(Status.TIMEOUT if was_started else Status.ENVIRONMENT)
                return
            for key, _ in self._selector.select(min(left, TICK)):
                if self.status is None:
                    key.data()
            now = time.monotonic()
            if self.status is None and now - self._last_look > TICK:
                self._look()
                self._last_look = now
            if was_started:
                self._seconds_left -= now - begun
                seconds -= now - begun
            else:
                self._start_seconds_left -= now - begun

    def _receive_stdout(self):
        data = self._read(self._stdout_pipe)
        if not self._started and data:
            self._started = data.startswith(STARTED)
            data = data[1:]
        self._stdout += data
        self._received += len(data)
        if self._received > self.limits.output_bytes:
            self._kill(Status.OUTPUT)

    def _receive_stderr(self):
        self._stderr += self._read(self._stderr_pipe)
        if len(self._stderr) > self.limits.output_bytes:
            self._kill(Status.OUTPUT)

    def _read(self, stream) -> bytes:
        data = os.read(stream.fileno(), 65536)
        if not data:
            self._selector.unregister(stream)
        return data

    def _send_unsent(self):
        try:
            del self._unsent[: os.write(self._stdin.fileno(), self._unsent[:65536])]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._unsent.clear()
        if not self._unsent:
            self._selector.unregister(self._stdin)

    def _end(self):
        """It ended by itself: what it wrote is read, and its exit code gives the status."""
        self._selector.unregister(self._pidfd)
        code = self._process.wait()
        self._drain()
        self.exit_code = code
        if self.status is not None:
            return
        if not self._started:
            self.status = Status.ENVIRONMENT
        elif code == 0:
            self.status = Status.COMPLETED
        elif code == 128 + 24:  # SIGXCPU
            self.status = Status.TIMEOUT
        else:
            out_of_memory = self._stderr.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError")
            self.status = Status.MEMORY if out_of_memory else Status.FAILED

    def _kill(self, status: Status):
        self.status = status
        # Its death kills the first process inside, and that one's all others, but not before the
        # first has told the kernel so. Stopped, bwrap starts none, and the first is killed, too.
        signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
        os.waitid(os.P_PIDFD, self._pidfd, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        for pid in _children(self._process.pid):  # they keep their numbers until bwrap asks
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._drain()

    def _drain(self):
        """Reads to the end of both streams, which is when the last process inside is dead."""
        deadline = time.monotonic() + START_SECONDS
        for stream, kept in (
            (self._stdout_pipe, self._stdout),
            (self._stderr_pipe, self._stderr),
        ):
            while stream in self._selector.get_map() and time.monotonic() < deadline:
                try:
                    kept.extend(self._read(stream)[: self.limits.output_bytes + 1 - len(kept)])
                except BlockingIOError:
                    time.sleep(0.001)

    def _look(self):
        """Ends the program where all its processes together go over a limit."""
        processes = _descendants(self._process.pid)
        pages = sum(
            int(words[1]) for words in (_words(f"/proc/{pid}/statm") for pid in processes) if words
        )
        if len(processes) > self.limits.processes + 1:
            self._kill(Status.PROCESSES)
        elif pages * os.sysconf("SC_PAGE_SIZE") > self.limits.memory_bytes:
            self._kill(Status.MEMORY)
        elif self._started and processes:
            with contextlib.suppress(OSError):  # it ends just now
                disk = os.statvfs(pathlib.Path("/proc", str(processes[0]), "root", "tmp"))
                if disk.f_files - disk.f_ffree > self.limits.files + 1:
                    self._kill(Status.FILES)


def _words(path: str) -> list[str]:
    """Of a file of /proc; none where its process is gone, which is no error: programs start and end
    others all the time.
    """
    try:
        return pathlib.Path(path).read_text().split()
    except OSError:
        return []


def _descendants(pid: int) -> list[int]:
    """Processes below pid, the first process of the sandbox first."""
    found, index = [pid], 0
    while index < len(found):
        found += _children(found[index])
        index += 1
    return found[1:]


def _children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:  # gone, as above
        return []
    return [int(word) for task in tasks for word in _words(f"/proc/{pid}/task/{task}/children")]


# --- programs ---


def program_of(*modules: types.ModuleType, call: str) -> str:
    """One program of modules, which import nothing but the standard library and each other, by one
    line each, and of what to call in the end.
    """
    future = "from __future__ import annotations"
    lines = [
        line
        for module in modules
        for line in pathlib.Path(str(module.__file__)).read_text("utf-8").splitlines()
        if line != future and not line.startswith("from glm_jax")
    ]
    return "\n".join([future, *lines, "", "", call, ""])


# --- many ---


def run(program: str, limits: Limits, stdin: bytes = b"") -> Outcome:
    """Runs the program as `__main__`, to its end. Never raises for what it does; see Status."""
    with Box(program, limits) as box:
        box.send(stdin)
        return box.finish()


def run_all(programs: Sequence[str], limits: Limits, workers: int) -> list[Outcome]:
    """The outcomes of programs, of which `workers` run at a time, in their order."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: run(program, limits), programs))


def check():
    """Raises ValueError, with what to do, where a sandbox cannot be made. Whoever runs untrusted
    code calls this first.
    """
    program = (
        "for line in open('/proc/self/status'):\n  if line.startswith(('Uid', 'Seccomp:',"
        " 'CapEff')): print(*line.split())"
    )
    bwrap = bubblewrap.find_bwrap()
    try:
        outcome = run(program, STANDARD)
    except OSError as error:
        raise ValueError(
            f"untrusted code runs only in a sandbox, and {bwrap} does not start ({error}):"
            f" {INSTALL}"
        ) from error
    expected = [f"Uid: {' '.join([str(NOBODY)] * 4)}", "CapEff: 0000000000000000", "Seccomp: 2"]
    if outcome.status is not Status.COMPLETED or outcome.stdout.split("\n")[:3] != expected:
        reason = " ".join((outcome.stderr or outcome.stdout or outcome.status.value).split())[-300:]
        raise ValueError(
            f"untrusted code runs only in a sandbox, and {bwrap} made none ({reason}): are user"
            " namespaces allowed here?"
        )
