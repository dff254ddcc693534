"""What runs inside the sandboxes of a verdict, sent there as text (standard library only), and the plain values that go between them.

A plain value is JSON, and is its own text there, but for what JSON does not have: {"$tuple": [...]}, {"$set": [...]},
{"$frozenset": [...]}, {"$dict": [[key, value], ...]} (keys that are no strings, or begin with $), {"$bytes": hex}, {"$int": hex} (large),
{"$complex": [re, im]}. A subclass goes as what it is a subclass of; anything else as {"$opaque": type}, which equals nothing.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types

SAFE_INT = 2**53  # below, integers go as JSON numbers; long decimal numbers cost quadratic time
SEQUENCES = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}


class Opaque:
    """Stands for a value that is not plain. Equal to nothing but itself."""


def encode(value):  # noqa: PLR0911
    """The JSON tree of a value."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < SAFE_INT else {"$int": hex(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    for tag, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {tag: [encode(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {"$dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"$bytes": value.hex()}
    if isinstance(value, complex):
        return {"$complex": [value.real, value.imag]}
    return {"$opaque": type(value).__name__}


def decode(tree):  # noqa: PLR0911
    """The value of a JSON tree. Raises ValueError or TypeError for one that `encode` does not make."""
    if isinstance(tree, list):
        return [decode(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree), "")
    if not tag.startswith("$"):
        return {key: decode(item) for key, item in tree.items()}
    if len(tree) != 1:
        raise ValueError(f"{tag} stands beside other keys")
    content = tree[tag]
    if tag in SEQUENCES:
        return SEQUENCES[tag](decode(item) for item in content)
    if tag == "$dict":
        return {decode(key): decode(item) for key, item in content}
    if tag == "$bytes":
        return bytes.fromhex(content)
    if tag == "$int":
        return int(content, 16)
    if tag == "$complex":
        return complex(*content)
    if tag == "$opaque":
        return Opaque()
    raise ValueError(f"unknown tag {tag!r}")


def canonical(tree) -> str:
    """A text that two trees share where their values are equal and of equal types: 1, True and 1.0 are three, nan is one.

    Values are never built, so that none of them can run code or be made to collide.
    """
    return json.dumps(_ordered(tree), sort_keys=True)


def _ordered(tree):  # noqa: PLR0911
    if isinstance(tree, float):
        return tree + 0.0  # -0.0 equals 0.0
    if isinstance(tree, int):
        return encode(tree)  # a large one may have been written in decimal
    if isinstance(tree, list):
        return [_ordered(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() <= {"$set", "$frozenset"} and len(tree) == 1:
        ((tag, items),) = tree.items()
        return {tag: sorted({canonical(item) for item in items})}
    if tree.keys() == {"$dict"}:
        return {"$dict": sorted([canonical(key), canonical(item)] for key, item in tree["$dict"])}
    return {key: _ordered(item) for key, item in tree.items()}


# --- inside ---


def open_channel():
    """(send, messages): stdin and stdout as messages of a line each, out of the way of what the program reads and prints."""
    reader, writer = os.fdopen(os.dup(0), "r", encoding="ascii"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)

    def send(message):
        data = json.dumps(message).encode("ascii") + b"\n"
        while data:
            data = data[os.write(writer, data) :]

    return send, map(json.loads, reader)


def sources_of(prompt: str, code: str, entry_point: str) -> list[str]:
    """The code continues the prompt, or comes after it where it names the entry point itself. Not outside: parsers can be crashed."""
    try:
        names = compile(code, "<solution>", "exec").co_names
    except (SyntaxError, ValueError):
        names = ()
    return [prompt, code] if entry_point in names else [prompt + code]


def answer_calls():
    """The solution's side. Gets {"prompt", "code", "entry_point"}, then {"args", "kwargs"} again and again.

    Says {"loaded"}, then {"returned": value} or {"raised": type} to each. Nothing of a test is ever here.
    """
    send, messages = open_channel()
    task = next(messages)
    module = sys.modules["solution"] = types.ModuleType("solution")
    try:
        for source in sources_of(**task):
            exec(compile(source, "<solution>", "exec"), module.__dict__)
        function = module.__dict__[task["entry_point"]]
    except BaseException as error:
        send({"raised": type(error).__name__})
        return
    send({"loaded": True})
    for call in messages:
        try:
            answer = {"returned": encode(function(*decode(call["args"]), **decode(call["kwargs"])))}
        except BaseException as error:
            answer = {"raised": type(error).__name__}
        send(answer)


def run_test():
    """The test's side. Gets {"prompt", "test", "entry_point", "seal"}, then answers to its calls {"args", "kwargs"}.

    Says in the end {"passed": seal} or {"failed": type}. The prompt gives what tests use beside the candidate.
    """
    send, messages = open_channel()
    task = next(messages)

    def candidate(*args, **kwargs):
        call = {"args": encode(list(args)), "kwargs": encode(kwargs)}
        if "$opaque" in json.dumps(call):
            raise TypeError("a candidate takes plain values only")
        send(call)
        answer = next(messages)
        if "raised" in answer:
            kind = getattr(builtins, answer["raised"], None)
            raise kind() if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError()
        return decode(answer["returned"])

    names = {"__name__": "test"}
    try:
        exec(compile(task["prompt"], "<prompt>", "exec"), names)
        names[task["entry_point"]] = candidate
        exec(compile(task["test"], "<test>", "exec"), names)
        if "check" in names:
            names["check"](candidate)
    except BaseException as error:
        send({"failed": type(error).__name__})
    else:
        send({"passed": task["seal"]})
