"""Inside the sandbox of an episode: holds the repository and does what the tools ask.

Imports nothing but the standard library: its text is the program of a sandbox. What it says is not
trusted, as the agent's commands run beside it as the same user.
"""

from __future__ import annotations

import os
import pathlib
import signal
import stat
import subprocess
import sys

from glm_jax.sandbox_guest import open_channel, unpack

OUTPUT, PROGRAMS = "/tmp/output", "/tmp/bin"
MAX_SOURCE_BYTES = 2 << 20  # of all that is handed in


def answer_tools():
    """Gets {"root", "files": {path: text}, "variables"}, says {"ready"}; then {"do": name, "args"}
    again and again, and says {"result": text} or {"error": text} to each.
    """
    say, messages = open_channel()
    start = next(messages)
    unpack(start["root"], start["files"])
    os.mkdir(PROGRAMS)
    os.symlink(sys.executable, f"{PROGRAMS}/python")
    os.environ.update(start["variables"])
    say({"ready": True})
    for call in messages:
        try:
            say({"result": TOOLS[call["do"]](**call["args"])})
        except (OSError, ValueError, MemoryError) as error:
            say({"error": str(error)})


def run(command, seconds, characters):
    """Exit code and output of a shell command, the middle left out of what is too long. Whatever it
    has started ends with it.
    """
    with open(OUTPUT, "wb") as output:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            ending = f"exit code {shell.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ending = f"stopped after {seconds:g} seconds"
        end_others()
    with open(OUTPUT, "rb") as output:
        size = os.fstat(output.fileno()).st_size
        data = output.read(4 * characters)  # a character has at most 4 bytes
        if size > len(data):
            output.seek(max(len(data), size - 4 * characters))
            data += output.read(4 * characters)
    os.unlink(OUTPUT)
    text = data.decode("utf-8", "replace")
    if len(text) > characters:
        half = characters // 2
        text = f"{text[:half]}\n[... left out ...]\n{text[-half:]}"
    return f"{text.rstrip()}\n[{ending}]".lstrip("\n")


def end_others():
    """Kills all but this process and the first one, which is bubblewrap's."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:  # there is no other
        return


def read(path, first, last, characters):
    lines = file_at(path).read_text("utf-8").split("\n")
    if not 1 <= first <= min(last, len(lines)):
        raise ValueError(f"lines {first} to {last}: {path} has the lines 1 to {len(lines)}")
    numbered = (f"{n}\t{line}" for n, line in enumerate(lines[first - 1 : last], first))
    text = "\n".join(numbered)
    if len(text) > characters:
        text = f"{text[:characters]}\n[... cut after {characters} characters ...]"
    return text


def edit(path, old, new):
    file = file_at(path)
    text = file.read_bytes().decode("utf-8")  # line ends as they are
    if (count := text.count(old)) != 1:
        raise ValueError(f"the old text stands {count} times in {path}, and must stand once")
    file.write_bytes(text.replace(old, new).encode("utf-8"))
    return f"edited {path}"


def file_at(path):
    """A pipe or a device would keep whoever opens it waiting."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no file")
    return pathlib.Path(path)


def sources():
    """All Python files of the repository."""
    found, left = {}, MAX_SOURCE_BYTES
    for folder, _, names in os.walk("."):
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".py") and stat.S_ISREG(os.lstat(path).st_mode):
                data = pathlib.Path(path).read_bytes()
                left -= len(data)
                if left < 0:
                    raise ValueError(f"more than {MAX_SOURCE_BYTES} bytes of Python")
                found[path[2:]] = data.decode("latin-1")
    return found


TOOLS = {"run": run, "read": read, "edit": edit, "sources": sources}
