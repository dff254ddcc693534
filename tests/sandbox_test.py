"""Programs that try to get out of the sandbox, or to use up the machine: none may. What works
without a sandbox is tried so as well.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from glm_jax import bubblewrap, sandbox
from glm_jax.sandbox import STANDARD, Box, Status, run
from tests.sandboxes import needs_sandbox, run_unprotected

SECRET = "the secret that nobody inside may know"
SHORT = dataclasses.replace(STANDARD, wall_seconds=0.7)

# Programs that print ESCAPED where they succeed, as each does without a sandbox.
REACH = {
    "tcp": "import socket; socket.create_connection(('127.0.0.1', {port}), 2); print('ESCAPED')",
    "udp": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', "
           "('127.0.0.1', {port})); print('ESCAPED')",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect({folder!r} + '/socket'); "
                   "print('ESCAPED')",
    "abstract unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0' + "
                            "{abstract!r}); print('ESCAPED')",
    "another netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); "
                       "print('ESCAPED')",
    "read a file": "print('ESCAPED' if {text!r} in open({secret!r}).read() else '')",
    "read by ..": "print('ESCAPED' if {text!r} in open('/tmp/../../..' + {secret!r}).read() else "
                  "'')",
    "read by /proc/self/root": "print('ESCAPED' if {text!r} in open('/proc/self/root' + "
                               "{secret!r}).read() else '')",
    "read by a symlink": (
        "import os, tempfile; link = tempfile.mkdtemp() + '/link'; os.symlink({secret!r}, link)\n"
        "print('ESCAPED' if {text!r} in open(link).read() else '')"
    ),
    "read by a hard link": (
        "import os; link = {folder!r} + '/hard%d' % os.getpid(); os.link({secret!r}, link)\n"
        "print('ESCAPED' if {text!r} in open(link).read() else '')"
    ),
    "read our code": "print('ESCAPED' if open({code!r}).read() else '')",
    "read an installed package": "print('ESCAPED' if open({package!r}).read() else '')",
    "list a folder": "import os; print('ESCAPED' if os.listdir({folder!r}) else '')",
    "write a file": "open({folder!r} + '/written', 'w'); print('ESCAPED')",
    "append to a file": "open({secret!r}, 'a'); print('ESCAPED')",
    "delete a file": "import os; os.remove({victim_file!r}); print('ESCAPED')",
    "environment": "import os; print('ESCAPED' if {text!r} in os.environ.values() else '')",
    "a descriptor left open": (
        "import os\nfor fd in range(3, 256):\n  try:\n"
        "    if {text!r}.encode() in os.pread(fd, 999, 0): print('ESCAPED')\n"
        "  except OSError: pass"
    ),
    "see other processes": "import os; print('ESCAPED' if os.path.exists('/proc/{pid}/stat') else "
                           "'')",
    "command lines of others": (
        "import glob\nfor name in glob.glob('/proc/[0-9]*/cmdline'):\n"
        "  if b'{marker}' in open(name, 'rb').read() and '/self/' not in name: print('ESCAPED')"
    ),
    "signal to a process": "import os; os.kill({pid}, 0); print('ESCAPED')",
    "kill a process": "import os; os.kill({victim_pid}, 9); print('ESCAPED')",
    "memory of a process": "open('/proc/{pid}/mem', 'rb'); print('ESCAPED')",
    "files of a process": "import os; os.listdir('/proc/{pid}/fd'); print('ESCAPED')",
    "limits of a process": "import resource; resource.prlimit({pid}, resource.RLIMIT_CORE); "
                           "print('ESCAPED')",
    "host name": "import socket; print('ESCAPED' if socket.gethostname() == {host!r} else '')",
    "trace": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0 else '')",
    "read memory by a call": (
        "import ctypes, os; c = ctypes; data = c.create_string_buffer(b'x' * 8); got = "
        "c.create_string_buffer(8)\n"
        "class Part(c.Structure): _fields_ = [('base', c.c_void_p), ('len', c.c_size_t)]\n"
        "one, two = Part(c.addressof(got), 8), Part(c.addressof(data), 8)\n"
        "print('ESCAPED' if c.CDLL(None).process_vm_readv(os.getpid(), c.byref(one), 1, "
        "c.byref(two), 1, 0) == 8 else '')"
    ),
    "memory without a process": "import os; os.memfd_create('x'); print('ESCAPED')",
    "shared memory": (
        "import ctypes; libc = ctypes.CDLL(None); found = libc.shmget(0, 4096, 0o1600); "
        "print('ESCAPED' if found >= 0 else '')\n"
        "libc.shmctl(found, 0, 0)"
    ),
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (65, "
                     "{hard_files})); print('ESCAPED')",
}  # fmt: skip

# Programs that print ESCAPED where they succeed, and that are not to be tried without a sandbox.
ROOT_CALLS = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
FORBIDDEN = {
    "mount": (
        ROOT_CALLS + "print('ESCAPED' if libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0 else '')"
    ),
    "unmount": ROOT_CALLS + "print('ESCAPED' if libc.umount2(b'/proc', 2) == 0 else '')",
    "remount for writing": (
        ROOT_CALLS + "print('ESCAPED' if libc.mount(b'', b'/', b'', 32 | 4096, 0) == 0 else '')"
    ),
    "chroot": "import os; os.chroot('/tmp'); print('ESCAPED')",
    "user namespace": ROOT_CALLS + "print('ESCAPED' if libc.unshare(0x10000000) == 0 else '')",
    "user namespace by clone": (
        ROOT_CALLS
        + "import os, platform\nnumber = 56 if platform.machine() == 'x86_64' else 220\npid ="
        " libc.syscall(number, 0x10000000 | 17, 0, 0, 0, 0)\nif pid == 0: print('ESCAPED',"
        " flush=True); os._exit(0)\nif pid > 0: print('ESCAPED')"
    ),
    "user namespace by clone3": (
        ROOT_CALLS
        + "import os, struct\npid = libc.syscall(435, struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0,"
        " 0, 0), 64)\nif pid >= 0: print('ESCAPED', flush=True)"
    ),
    "socket by another number": (
        ROOT_CALLS + "print('ESCAPED' if libc.syscall(0x40000000 + 41, 1, 1, 0) >= 0 else '')"
    ),
    "vsock": ROOT_CALLS + "print('ESCAPED' if libc.socket(40, 1, 0) >= 0 else '')",
    "io_uring": (
        ROOT_CALLS
        + "print('ESCAPED' if libc.syscall(425, 4, ctypes.create_string_buffer(256)) >= 0 else '')"
    ),
    "become root": (
        "import os\ntry: os.setuid(0)\nfinally: print('ESCAPED' if os.getuid() == 0 else '')"
    ),
    "become a group": "import os; os.setgroups([0]); print('ESCAPED')",
    "set-uid file": (
        "import os; open('/tmp/x', 'w'); os.chown('/tmp/x', 0, 0); os.chmod('/tmp/x', 0o4755);"
        " print('ESCAPED')"
    ),
    "map users": "open('/proc/self/uid_map', 'w').write('0 0 1'); print('ESCAPED')",
    "a capability": (
        "print('ESCAPED' if 'CapEff:\\t0000000000000000' not in open('/proc/self/status').read()"
        " else '')"
    ),
    "kernel settings": "open('/proc/sys/kernel/core_pattern', 'r+'); print('ESCAPED')",
    "any kernel setting": (
        "import os\nfor top, _, names in os.walk('/proc/sys'):\n  for name in names:\n"
        "    if os.access(top + '/' + name, os.W_OK): print('ESCAPED')"
    ),
    "sysrq": "open('/proc/sysrq-trigger', 'w'); print('ESCAPED')",
    "make a device": (
        "import os, stat; os.mknod('/tmp/x', 0o600 | stat.S_IFBLK, os.makedev(254, 0));"
        " print('ESCAPED')"
    ),
    "find a device": (
        "import os; print('ESCAPED' if set(os.listdir('/dev')) - {'null', 'zero', 'random',"
        " 'urandom'} else '')"
    ),
    "the terminal": "open('/dev/tty', 'r+'); print('ESCAPED')",
    "write anywhere but /tmp": (
        "import os\nfor top, folders, _ in os.walk('/'):\n  folders[:] = [f for f in folders if top"
        " + f not in ('/tmp', '/proc')]\n  if os.access(top, os.W_OK): print('ESCAPED', top)"
    ),
    "change the interpreter": "import os; open(os.__file__, 'r+'); print('ESCAPED')",
    "installed packages": (
        "import os, sys\nfor top, folders, names in os.walk('/'):\n  folders[:] = [f for f in"
        " folders if top + f != '/proc']\n  if top.endswith('-packages') and folders + names:"
        " print('ESCAPED', top)"
    ),
    "the first process": (
        "import os, time\nos.kill(1, 9)\ntime.sleep(0.2)\nprint(open('/proc/1/' +"
        " 'root/etc/passwd').read(), 'ESCAPED')"
    ),
    "the monitor's files": (
        "import os\nfor n in os.listdir('/proc/1/fd'): print('ESCAPED', os.listdir('/proc/1/fd/'"
        " + n))"
    ),
    "set the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0); print('ESCAPED')",
    "priority": "import os; os.nice(-5); print('ESCAPED')",
}

# Programs that would use up the machine, the limits they meet, and how they may end.
STOPPED, DIED = {Status.TIMEOUT}, {Status.FAILED}
EXHAUST = {
    "endless loop": ("while True: pass", {}, STOPPED),
    "sleep": ("import time; time.sleep(1000)", {}, STOPPED),
    "stop itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", {}, STOPPED),
    "no output, no end": ("import os, time\nfor fd in range(3): os.close(fd)\ntime.sleep(1000)", {},
                          STOPPED),
    "CPU": ("while True: pass", {"cpu_seconds": 1, "wall_seconds": 20}, STOPPED),
    "CPU without the signal": (
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        {"cpu_seconds": 1, "wall_seconds": 20},
        {*STOPPED, *DIED},
    ),
    "one long instruction": ("x = 3 ** 10 ** 8", {}, STOPPED),
    "every signal ignored": (
        "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except OSError: pass\nwhile True: pass", {},
        STOPPED,
    ),
    "fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", {},
                  {*STOPPED, Status.PROCESSES}),
    "threads": (
        "import threading, time\nfor n in range(500): threading.Thread(target=time.sleep, "
        "args=(1,)).start()", {"wall_seconds": 10},
        {*DIED, Status.TIMEOUT},
    ),
    "memory": ("x = bytearray(2 ** 34)", {}, {Status.MEMORY}),
    "memory, piece by piece": ("x = []\nwhile True: x.append(bytearray(10 ** 7))",
                               {"wall_seconds": 20}, {Status.MEMORY}),
    "memory of many processes": (
        "import os, time\nfor _ in range(5):\n  if os.fork() == 0: break\n"
        "x = bytearray(40 * 2 ** 20)\n"
        "for n in range(0, len(x), 4096): x[n] = 1\ntime.sleep(1000)",
        {"memory_bytes": 128 * 2**20, "wall_seconds": 20}, {Status.MEMORY},
    ),
    "recursion": (
        "import sys; sys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
        {"wall_seconds": 20, "memory_bytes": 64 * 2**20},
        {*DIED, Status.MEMORY},
    ),
    "crash": ("import ctypes; ctypes.string_at(0)", {"wall_seconds": 10}, DIED),
    "flood of stdout": ("while True: print('x' * 9999)", {"wall_seconds": 10}, {Status.OUTPUT}),
    "flood of stderr": ("import sys\nwhile True: sys.stderr.write('x' * 9999)",
                        {"wall_seconds": 10}, {Status.OUTPUT}),
    "flood of a child": (
        "import os\nif os.fork() == 0:\n  while True: os.write(1, b'x' * 9999)\n"
        "import time; time.sleep(1000)", {"wall_seconds": 10},
        {Status.OUTPUT},
    ),
    "huge file": ("f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(10 ** 6))",
                  {"wall_seconds": 10}, DIED),
    "sparse file": ("open('/tmp/x', 'wb').truncate(2 ** 40)", {"wall_seconds": 10}, DIED),
    "full disk": ("for n in range(100): open(f'/tmp/{n}', 'wb').write(bytes(10 ** 6))",
                  {"wall_seconds": 10}, DIED),
    "many files": ("n = 0\nwhile True:\n  open(f'/tmp/{n}', 'w').close(); n += 1",
                   {"wall_seconds": 20}, {Status.FILES}),
    "many folders": ("import os\nwhile True:\n  os.mkdir('x'); os.chdir('x')", {"wall_seconds": 20},
                     {Status.FILES, *DIED}),
    "open files": ("x = [open('/dev/null') for _ in range(1000)]", {"wall_seconds": 10}, DIED),
    "processes that come and go": (
        "import os\nwhile True:\n  if os.fork() == 0:\n"
        "    open(f'/tmp/{os.getpid()}', 'w').close(); os._exit(0)\n  os.wait()",
        {"wall_seconds": 2.0}, {*STOPPED, Status.FILES},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the attacks aim at: files, sockets and processes of ours."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "secret").write_text(SECRET)
    (folder / "secret").chmod(0o644)
    marker, abstract = f"marker-{os.getpid()}", f"sandbox-test-{os.getpid()}"
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()", marker], stdin=subprocess.PIPE
    )
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    hidden = socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    hidden.bind("\0" + abstract)
    unix.listen()
    hidden.listen()
    yield {
        "folder": str(folder), "secret": str(folder / "secret"), "text": SECRET,
        "port": tcp.getsockname()[1], "abstract": abstract,
        "pid": bystander.pid, "marker": marker, "host": socket.gethostname(),
        "code": sandbox.__file__, "package": pytest.__file__,
        "hard_files": 999,
    }  # fmt: skip
    bystander.kill()
    bystander.communicate()
    for one in (tcp, unix, hidden):
        one.close()


def attack(program: str, world: dict, attacker) -> str:
    """stdout of the attacker's run, with victims of its own."""
    victim_file = pathlib.Path(world["folder"], "victim")
    victim_file.touch()
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as victim:
        try:
            return attacker(
                program.format(victim_pid=victim.pid, victim_file=str(victim_file), **world)
            )
        finally:
            victim.kill()


@needs_sandbox
@pytest.mark.parametrize("name", REACH)
def test_nothing_of_ours_is_in_reach(name, world, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    fd = os.open(world["secret"], os.O_RDONLY)
    os.set_inheritable(fd, True)
    try:
        outcome = []
        inside = attack(
            REACH[name],
            world,
            lambda program: outcome.append(run(program, STANDARD)) or outcome[0].stdout,
        )
        assert outcome[0].status in (Status.COMPLETED, Status.FAILED) and "ESCAPED" not in inside
        assert "SyntaxError" not in outcome[0].stderr and "NameError" not in outcome[0].stderr
        assert "ESCAPED" in attack(
            REACH[name], world, lambda program: run_unprotected(program, close_fds=False)
        ), "it must be an attack"
    finally:
        os.close(fd)


@needs_sandbox
@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_root_can_do_is_forbidden(name):
    outcome = run(FORBIDDEN[name], STANDARD)
    assert (
        outcome.status in (Status.COMPLETED, Status.FAILED) and "ESCAPED" not in outcome.stdout
    ), outcome
    assert "SyntaxError" not in outcome.stderr and "NameError" not in outcome.stderr, outcome


@needs_sandbox
@pytest.mark.parametrize("name", EXHAUST)
def test_nothing_is_used_up(name):
    program, limits, statuses = EXHAUST[name]
    started = time.monotonic()
    outcome = run(program, dataclasses.replace(SHORT, **limits))
    assert outcome.status in statuses, outcome.status
    assert (
        len(outcome.stdout) <= STANDARD.output_bytes
        and len(outcome.stderr) <= STANDARD.output_bytes
    )
    assert time.monotonic() - started < outcome.seconds + 5


@needs_sandbox
@pytest.mark.parametrize("close", [False, True], ids=["pipe held open", "pipe closed"])
def test_children_end_with_the_program(close):
    name = f"left-behind-{os.getpid()}-{close}"
    daemon = (
        "import os, sys, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n   "
        f" {'os.closerange(0, 3)' if close else 'pass'}\n    os.execv(sys.executable,"
        f" [sys.executable, '-c', 'import time; time.sleep(1000)', {name!r}])\n "
        " os._exit(0)\nos.wait()\ntime.sleep(0.3)\nprint('done')"
    )
    outcome = run(daemon, STANDARD)
    assert (outcome.status, outcome.stdout) == (Status.COMPLETED, "done\n")
    deadline = time.monotonic() + 5
    while (left := command_lines(name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@needs_sandbox
def test_a_sandbox_that_is_closed_while_it_starts_ends_at_once():
    for milliseconds in range(20):  # it takes 12 or more to start
        box = Box("import time; time.sleep(1000)", STANDARD)
        time.sleep(milliseconds / 2000)
        started = time.monotonic()
        box.close()  # returns when all that could write to its pipes is dead
        assert time.monotonic() - started < 5 and box.status is Status.CLOSED


@needs_sandbox
def test_a_sandbox_ends_with_the_process_that_made_it():
    name = f"orphan-{os.getpid()}"
    inside = (
        "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'import time;"
        f" time.sleep(1000)', {name!r}])"
    )
    outside = f"from glm_jax import bubblewrap, sandbox; sandbox.run({inside!r}, sandbox.STANDARD)"
    with subprocess.Popen(
        [sys.executable, "-c", outside], cwd=pathlib.Path(__file__).parent.parent
    ) as process:
        deadline = time.monotonic() + 30
        # As an argument of its own, not as part of the program's text.
        while not command_lines(name, whole=True) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert command_lines(name, whole=True)
        process.kill()
    deadline = time.monotonic() + 5
    while command_lines(name, whole=True) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not command_lines(name, whole=True)


def command_lines(text: str, whole: bool = False) -> list[list[str]]:
    found = []
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text(errors="replace").split("\0")
        except OSError:
            continue
        if text in words or (not whole and any(text in word for word in words)):
            found.append(words)
    return found


# --- what honest programs can do ---

HONEST = """
import asyncio, collections, dataclasses, json, math, re, subprocess, sys, tempfile, threading
@dataclasses.dataclass
class Point: x: int
async def later(): return 5
print(sys.stdin.read(), Point(1), json.dumps({"a": math.pi}), asyncio.run(later()))
with tempfile.TemporaryFile("w+") as f: f.write("x" * 10**6)
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
seven = subprocess.run([sys.executable, "-c", "print(7)"], capture_output=True, text=True)
print(seven.stdout, sys.argv, __name__)
print("to stderr", file=sys.stderr)
"""


@needs_sandbox
def test_honest_programs_run():
    outcome = run(HONEST, STANDARD, stdin=b"given")
    assert outcome.status is Status.COMPLETED and outcome.exit_code == 0, outcome
    assert (
        outcome.stdout
        == "given Point(x=1) {\"a\": 3.141592653589793} 5\nthread\n7\n ['-c'] __main__\n"
    )
    assert outcome.stderr == "to stderr\n" and 0 < outcome.seconds < STANDARD.wall_seconds


@needs_sandbox
def test_ends_are_told_apart():
    outcomes = sandbox.run_all(
        ["print(1)", "1 / 0", "raise SystemExit(3)", "def"], STANDARD, workers=2
    )
    assert [(o.status, o.exit_code) for o in outcomes] == [
        (Status.COMPLETED, 0), (Status.FAILED, 1), (Status.FAILED, 3), (Status.FAILED, 1),
    ]  # fmt: skip
    assert "ZeroDivisionError" in outcomes[1].stderr and "SyntaxError" in outcomes[3].stderr


@needs_sandbox
def test_sandboxes_share_no_limits():
    """Each has its processes to itself, though all are one user's."""
    children = STANDARD.processes - 1
    program = (
        f"import os, time\nfor n in range({children}):\n  if os.fork() == 0: time.sleep(0.5);"
        " os._exit(0)\nprint('all')"
    )
    with ThreadPoolExecutor(4) as pool:
        assert [o.stdout for o in pool.map(lambda _: run(program, STANDARD), range(4))] == [
            "all\n"
        ] * 4
    assert (
        run(program.replace(f"range({children})", f"range({children + 1})"), STANDARD).status
        is Status.FAILED
    )


@needs_sandbox
def test_a_conversation_is_line_by_line_and_the_clock_stands_in_between():
    program = "import sys\nfor line in sys.stdin: print(line.strip() * 2, flush=True)"
    with Box(program, dataclasses.replace(STANDARD, wall_seconds=1.5)) as box:
        for word in (b"ab", b"c" * 200_000):
            box.send(word + b"\n")
            assert box.receive_line() == word * 2
            time.sleep(0.8)
        assert box.status is None
        assert box.finish().status is Status.COMPLETED and box.receive_line() is None


@needs_sandbox
def test_a_program_that_reads_nothing_does_not_block_us():
    with Box("import time; time.sleep(1000)", SHORT) as box:
        box.send(b"x" * 10**7)
        assert box.receive_line() is None and box.status is Status.TIMEOUT


@needs_sandbox
def test_no_process_and_no_descriptor_is_left():
    def count():
        return len(os.listdir("/proc/self/fd"))

    run("", STANDARD)
    before = count()
    for program in ("", "while True: pass", "1 / 0"):
        run(program, dataclasses.replace(STANDARD, wall_seconds=0.3))
    assert count() == before


# --- no sandbox, no run ---


def test_without_bwrap_nothing_runs(monkeypatch):
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    monkeypatch.setattr(bubblewrap.importlib.util, "find_spec", lambda name: None)
    for refuse in (sandbox.check, lambda: run("print(1)", STANDARD)):
        with pytest.raises(
            ValueError,
            match=r"only in a sandbox, and there is no bwrap: install .*apt-get install bubblewrap",
        ):
            refuse()


def test_where_namespaces_are_refused_nothing_runs(monkeypatch):
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: shutil.which("false"))
    with pytest.raises(
        ValueError,
        match="only in a sandbox, and .*false made none .*are user namespaces allowed here",
    ):
        sandbox.check()
    outcome = run("print(1)", STANDARD)
    assert (outcome.status, outcome.stdout) == (Status.ENVIRONMENT, "")
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: "/nowhere/bwrap")
    with pytest.raises(ValueError, match="/nowhere/bwrap does not start"):
        sandbox.check()


def test_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(bubblewrap.platform, "machine", lambda: "m68k")
    with pytest.raises(
        ValueError, match="no sandbox for a 'm68k' machine; there is for x86_64, aarch64"
    ):
        bubblewrap.seccomp_filter.__wrapped__()
