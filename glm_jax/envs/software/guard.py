"""What a mended source may not newly reach for: the run of the tests, instead of the bug.

An agent's code runs in one process with pytest, so code that looks for the test runner could write
its own verdict. A fix hardly ever needs a new use of any of this. What a file had before it may
keep, so that a guard is no proof; the altered tests of judge.py come after it.

Imports nothing but the standard library: its text is the program of a sandbox, because text can be
written that brings down Python's parser.
"""

from __future__ import annotations

import ast
import json
import sys

# With or without underscores around them: names, attributes, arguments.
REFUSED = set(
    """
    sys os posix nt builtins gc inspect ctypes importlib import imp runpy pytest unittest atexit
    signal threading thread subprocess multiprocessing concurrent asyncio pickle marshal socket
    exec eval globals locals vars open exit quit breakpoint modules getframe currentframe f_back
    f_locals f_globals f_builtins f_code tb_frame tb_next gi_frame cr_frame ag_frame traceback
    with_traceback subclasses getattribute getattr setattr delattr attrgetter methodcaller Formatter
    AssertionError BaseException SystemExit KeyboardInterrupt settrace setprofile excepthook
    unraisablehook displayhook meta_path path_hooks weakref finalize faulthandler random secrets
    environ
""".split()
)
# Only so: what is special about objects, and methods by which a value could equal everything.
REFUSED_SPECIAL = set(
    """
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __bool__ __del__ __class__ __instancecheck__
    __subclasscheck__ __subclasshook__ __init_subclass__ __set_name__ __class_getitem__ __dict__
    __getattr__ __setattr__ __prepare__ __mro_entries__ __reduce__ __reduce_ex__ __code__
    __closure__ __mro__ __bases__ __base__ __self__ __spec__ __loader__ __main__ __wrapped__
""".split()
)
IMPORTED = set(
    """
    __future__ abc bisect cmath collections contextlib copy dataclasses datetime decimal difflib
    enum fractions functools heapq html itertools json keyword math numbers operator re reprlib
    statistics string struct textwrap types typing unicodedata warnings zlib
""".split()
)


def refusal(before: bytes | None, after: bytes, packages: set[str]) -> str | None:
    """Why the changed source of a file is not even tried; None where it is. before: of the
    original, None for a new file. packages: of the repository, which may be imported.
    """
    try:
        old, new = _uses(before or b""), _uses(after)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"is no Python: {error}"
    for kind, name in sorted(new - old):
        top = name.partition(".")[0]
        if kind == "import" and top not in IMPORTED | packages:
            return f"imports {name}"
        if kind == "name" and (name.strip("_") in REFUSED or name in REFUSED_SPECIAL):
            return f"uses {name}"
    return None


def answer_guard():
    """Gets {"changed": {path: [text before or null, text after]}, "packages": names}, prints
    {"refused": reason or null}.
    """
    message = json.load(sys.stdin)
    packages = set(message["packages"])
    for path, texts in sorted(message["changed"].items()):
        before, after = (text and text.encode("latin-1") for text in texts)
        if reason := refusal(before, after or b"", packages):
            print(json.dumps({"refused": f"{path} {reason}"}))
            return
    print(json.dumps({"refused": None}))


def _uses(source: bytes) -> set[tuple[str, str]]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {("import", alias.name) for alias in node.names}
            found |= {("name", alias.asname) for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add(("import", node.module or ""))
            found |= {("name", alias.name) for alias in node.names}
        else:
            for field in ("id", "attr", "arg", "name"):
                if isinstance(name := getattr(node, field, None), str):
                    found.add(("name", name))
    return found
