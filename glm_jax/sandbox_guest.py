"""What programs inside a sandbox share: messages to and from the outside, and files from there.

Imports nothing but the standard library: `sandbox.program_of` makes it part of such programs.
"""

from __future__ import annotations

import json
import os
import pathlib


def open_channel():
    """(send, messages): stdin and stdout as messages of a line each, out of the way of what the
    program reads and prints.
    """
    reader, writer = os.fdopen(os.dup(0), "r", encoding="ascii"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    write, dumps = os.write, json.dumps  # as they are before anything untrusted can change them

    def send(message):
        data = dumps(message).encode("ascii") + b"\n"
        while data:
            data = data[write(writer, data) :]

    return send, map(json.loads, reader)


def unpack(root, files):
    """Writes {path: text} below the root, and goes there. Each byte of a file is a character, the
    form in which JSON holds it.
    """
    for path, text in files.items():
        file = pathlib.Path(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode("latin-1"))
    os.chdir(root)
