"""What runs inside the sandboxes of a verdict, sent there as text (standard library only), and the
values that go between them.

A plain value is JSON, and is its own text there, but for what JSON does not have: {"$tuple":
[...]}, {"$set": [...]}, {"$frozenset": [...]}, {"$dict": [[key, value], ...]} (keys that are no
strings, or begin with $), {"$int": hex} (large), iterators as {"$items": [...]}, named tuples as
{"$named": [type, fields, items]}, and types of the standard library as {"$Fraction": ...} and so
on, see LIBRARY. A subclass goes as what it is a subclass of. Between a test and a solution there
are two more: {"$at": n}, a container that the message holds already or that the call passed, and
{"$ref": n}, an object that stays with the solution. Elsewhere such an object is {"$opaque": type},
which equals nothing.
"""

from __future__ import annotations

import collections
import itertools
import json
import operator
import sys
import types

from glm_jax.sandbox_guest import open_channel

SAFE_INT = 2**53  # below, integers go as JSON numbers; long decimal numbers cost quadratic time
MAX_DEPTH = 200  # of a value that is compared: containers in containers
MAX_ITEMS = 10_000  # of an iterator that go at a time
CONTAINERS = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}
# tag -> (module, type, parts of a value, value of its parts); a module that nobody imported has no
# values.
LIBRARY = {
    "$bytes": ("builtins", "bytes", bytes.hex, bytes.fromhex),
    "$complex": ("builtins", "complex", lambda z: [z.real, z.imag], lambda parts: complex(*parts)),
    "$range": ("builtins", "range", lambda r: [*map(hex, (r.start, r.stop, r.step))],
               lambda p: range(*_ints(p))),
    "$Fraction": (
        "fractions", "Fraction", lambda f: [*map(hex, f.as_integer_ratio())],
        lambda p: _library("fractions", "Fraction")(*_ints(p))
    ),
    "$Decimal": ("decimal", "Decimal", str, lambda text: _library("decimal", "Decimal")(str(text))),
    "$datetime": ("datetime", "datetime", lambda d: d.isoformat(),
                  lambda text: _library("datetime", "datetime").fromisoformat(text)),
    "$date": ("datetime", "date", lambda d: d.isoformat(),
              lambda text: _library("datetime", "date").fromisoformat(text)),
    "$time": ("datetime", "time", lambda d: d.isoformat(),
              lambda text: _library("datetime", "time").fromisoformat(text)),
    "$timedelta": ("datetime", "timedelta", lambda d: [d.days, d.seconds, d.microseconds],
                   lambda p: _library("datetime", "timedelta")(*p)),
}  # fmt: skip
DICTS = {
    "$Counter": collections.Counter,
    "$OrderedDict": collections.OrderedDict,
    "$defaultdict": collections.defaultdict,
}
# of a defaultdict
FACTORIES = {kind.__name__: kind for kind in (int, float, str, list, dict, set, tuple, bool)}
MUTABLE = (list, dict, set, bytearray, collections.deque)


class Opaque:
    """Stands for a value that is not plain. Equal to nothing but itself."""


def _ints(parts):
    return [int(part, 16) for part in parts]


def _library(module: str, name: str):
    return getattr(__import__(module), name)


def _opaque(value):
    return {"$opaque": type(value).__name__}


class Writer:
    """Values to JSON trees.

    objects: None, or the containers that the other side knows by their number; the writer adds
    those that it meets, in order.
    opaque: the tree of a value that is not plain.
    """

    def __init__(self, objects=None, opaque=_opaque):
        self.objects, self.opaque = objects, opaque
        self.numbers = {id(x): n for n, x in enumerate(objects or ())}

    def tree(self, value):
        if value is None or isinstance(value, bool | float | str):
            return value
        if isinstance(value, int):
            return value if abs(value) < SAFE_INT else {"$int": hex(value)}
        if self.objects is not None and isinstance(value, MUTABLE):
            if id(value) in self.numbers:
                return {"$at": self.numbers[id(value)]}
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.content(value)

    def content(self, value):  # noqa: PLR0911
        """The tree of a value that is no number or text, whatever is known of it."""
        if isinstance(value, list):
            return self._trees(value)
        fields = getattr(value, "_fields", None) if isinstance(value, tuple) else None
        if fields is not None:
            return {"$named": [type(value).__name__, list(fields), self._trees(value)]}
        for tag, kind in CONTAINERS.items():
            if isinstance(value, kind):
                return {tag: self._trees(value)}
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, bytearray):
            return {"$bytearray": value.hex()}
        for tag, (module, name, parts, _) in LIBRARY.items():
            if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
                return {tag: parts(value)}
        if isinstance(value, collections.deque):
            return {"$deque": [self._trees(value), value.maxlen]}
        if isinstance(value, types.GeneratorType) or (
            type(value).__module__ in ("builtins", "itertools") and hasattr(value, "__iter__")
        ):
            return self._items(value)
        return self.opaque(value)

    def _trees(self, values):
        return [self.tree(item) for item in values]

    def _dict(self, value):
        for tag, kind in DICTS.items():
            if isinstance(value, kind):
                pairs = [[self.tree(key), self.tree(item)] for key, item in value.items()]
                factory = getattr(getattr(value, "default_factory", None), "__name__", None)
                return {tag: [pairs, factory] if tag == "$defaultdict" else pairs}
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {str(key): self.tree(item) for key, item in value.items()}
        return {"$dict": [[self.tree(key), self.tree(item)] for key, item in value.items()]}

    def _items(self, value):
        """An iterator as the list of what comes from it; beyond MAX_ITEMS the rest is after a
        reference, where there are any.
        """
        iterator = iter(value)
        items = list(itertools.islice(iterator, MAX_ITEMS))
        tree = {"$items": self._trees(items)}
        return tree if len(items) < MAX_ITEMS else tree | {"more": self.opaque(iterator)}


class Reader:
    """JSON trees to values. Raises ValueError or TypeError for a tree that Writer does not make.

    objects: as of the Writer. reference: the value of {"$ref": ...}. items: of an iterator's list
    and the rest after it.
    """

    def __init__(self, objects=None, reference=None, items=lambda values, _: values):
        self.objects, self.reference, self.items = objects, reference, items

    def value(self, tree):
        if isinstance(tree, list):
            return self.fill([], tree)
        if not isinstance(tree, dict):
            return tree
        tag = next(iter(tree), "")
        if not tag.startswith("$"):
            return self.fill({}, tree)
        if len(tree) != 1 and tag not in ("$ref", "$items"):
            raise ValueError(f"{tag} stands beside other keys")
        return self.tagged(tag, tree[tag], tree)

    def tagged(self, tag, content, tree):  # noqa: PLR0911
        if tag in LIBRARY:
            return LIBRARY[tag][3](content)
        if tag in ("$tuple", "$frozenset"):
            return CONTAINERS[tag](self.value(item) for item in content)
        if tag == "$named":
            name, fields, items = content
            return collections.namedtuple(name, fields, rename=True)(*map(self.value, items))
        if tag == "$int":
            return int(content, 16)
        if tag in EMPTY:
            return self.fill(EMPTY[tag](content), tree)
        if tag == "$items":
            return self.items(
                [self.value(item) for item in content],
                self.value(tree["more"]) if "more" in tree else None,
            )
        if tag == "$at" and self.objects is not None:
            return self.objects[content]
        if tag == "$ref" and self.reference is not None:
            return self.reference(tree)
        if tag == "$opaque":
            return Opaque()
        raise ValueError(f"unknown tag {tag!r}")

    def fill(self, empty, tree):
        """Puts the content of a tree into a new, empty container, known by its number from before
        its content is read.
        """
        if self.objects is not None:
            self.objects.append(empty)
        return self.refill(empty, tree)

    def refill(self, container, tree):
        """Gives a container the content of a tree, in place."""
        content = (
            next(iter(tree.values()))
            if isinstance(tree, dict) and next(iter(tree), "").startswith("$")
            else tree
        )
        if isinstance(container, bytearray):
            # what is no text raises TypeError
            container[:] = bytes.fromhex(content)  # pyright: ignore[reportArgumentType]
        elif isinstance(container, dict):
            content = content[0] if isinstance(container, collections.defaultdict) else content
            pairs = content.items() if isinstance(content, dict) else content
            new = [(self.value(key), self.value(item)) for key, item in pairs]
            container.clear()
            for key, item in new:
                container[key] = item
        else:
            new = [
                self.value(item)
                for item in (content[0] if isinstance(container, collections.deque) else content)
            ]
            container.clear()
            (container.update if isinstance(container, set) else container.extend)(new)
        return container


EMPTY = {
    "$set": lambda _: set(), "$dict": lambda _: {}, "$bytearray": lambda _: bytearray(),
    "$deque": lambda content: collections.deque(maxlen=content[1]),
    "$Counter": lambda _: collections.Counter(),
    "$OrderedDict": lambda _: collections.OrderedDict(),
    "$defaultdict": lambda content: collections.defaultdict(FACTORIES.get(content[1])),
}  # fmt: skip


def encode(value):
    """The JSON tree of a value by itself."""
    return Writer().tree(value)


def decode(tree):
    """The value of a JSON tree. Raises ValueError or TypeError for one that `encode` does not
    make.
    """
    return Reader().value(tree)


# compared as what they are a kind of
ALIASES = {"$Counter": "$dict", "$OrderedDict": "$dict", "$bytearray": "$bytes"}


def canonical(tree, depth: int = 0) -> bytes:  # noqa: PLR0911
    """A digest that two trees share where their values are equal and of equal types: 1, True and
    1.0 are three, nan is one.

    Takes time in proportion to the tree's size. Values are never built, so that none of them can
    run code or be made to collide. Raises ValueError for a tree deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"a value of more than {MAX_DEPTH} containers in each other")
    if isinstance(tree, bool) or tree is None:
        return _digest("constant", repr(tree))
    if isinstance(tree, int):
        return _digest("int", hex(tree))
    if isinstance(tree, float):
        return _digest("float", repr(tree + 0.0))  # -0.0 equals 0.0
    if isinstance(tree, str):
        return _digest("str", tree)
    if isinstance(tree, list):
        return _digest("list", *(canonical(item, depth + 1) for item in tree))
    tag = next(iter(tree), "")
    if not tag.startswith("$"):
        return _digest(
            "$dict",
            *sorted(_digest("str", key) + canonical(item, depth + 1) for key, item in tree.items()),
        )
    content = tree[tag]
    if tag == "$int":
        return _digest("int", hex(int(content, 16)))
    if tag in ("$items", "$named", "$defaultdict"):
        plain = (
            content
            if tag == "$items"
            else {"$tuple": content[2]}
            if tag == "$named"
            else {"$dict": content[0]}
        )
        return canonical(plain, depth + 1)
    if tag in ("$set", "$frozenset"):
        return _digest(tag, *sorted({canonical(item, depth + 1) for item in content}))
    if ALIASES.get(tag, tag) == "$dict":
        return _digest(
            "$dict",
            *sorted(
                canonical(key, depth + 1) + canonical(item, depth + 1) for key, item in content
            ),
        )
    return _digest(ALIASES.get(tag, tag), canonical(content, depth + 1))


def _digest(*parts) -> bytes:
    import hashlib  # not in a sandbox, where it would be half of the start

    found = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        found.update(b"%d:" % len(data) + data)
    return found.digest()


# --- inside ---


def sources_of(prompt: str, code: str, entry_point: str, **_) -> list[str]:
    """The code continues the prompt, or comes after it where it names the entry point itself. Not
    outside: parsers can be crashed.
    """
    try:
        names = compile(code, "<solution>", "exec").co_names
    except (SyntaxError, ValueError):
        names = ()
    return [prompt, code] if entry_point in names else [prompt + code]


# What a test may do with the solution and with the objects that it keeps.
DO = {name: getattr(operator, name) for name in (
    "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow",
    "matmul", "and_", "or_", "xor", "neg",
    "pos", "contains", "getitem", "setitem", "delitem",
)}  # fmt: skip
DO |= {
    f.__name__: f
    for f in (
        len,
        bool,
        str,
        repr,
        hash,
        abs,
        int,
        float,
        next,
        getattr,
        setattr,
        delattr,
        isinstance,
    )
}
DO |= {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "items": itertools.chain,
    "enter": lambda value: value.__enter__(),
    "exit": lambda value: value.__exit__(None, None, None),
}


def answer_calls():
    """The solution's side. Gets {"prompt", "code", "entry_point", "by_test"}, then {"do": name,
    "args": [...], "kwargs": {...}} again and again: what to do, see DO, with reference 0 for the
    entry point.

    Says {"loaded"}, then {"returned": value, "changed": {number: content}} or {"raised": [names of
    the exception's classes], "text", "args"} to each, with "awaitable" where a test has to await
    it. Nothing of a test is ever here.
    """
    send, messages = open_channel()
    task = next(messages)
    module = sys.modules["solution"] = types.ModuleType("solution")
    try:
        for source in sources_of(**task):
            exec(compile(source, "<solution>", "exec"), module.__dict__)
        held = [module.__dict__[task["entry_point"]]]
    except BaseException as error:
        send({"raised": [type(error).__name__]})
        return
    send({"loaded": True})
    numbers = {}

    def refer(value):
        if id(value) not in numbers:
            numbers[id(value)] = len(held)
            held.append(value)
        return {
            "$ref": numbers[id(value)],
            "made": isinstance(held[0], type) and isinstance(value, held[0]),
        }

    for call in messages:
        objects = [] if task["by_test"] else None
        answer = {}
        try:
            reader = Reader(objects, lambda tree: held[tree["$ref"]])
            args, kwargs = reader.value(call["args"]), reader.value(call["kwargs"])
            given = None if objects is None else list(objects)
            before = contents(objects)
            # what is no object raises TypeError
            found = DO[call["do"]](*args, **kwargs)  # pyright: ignore[reportCallIssue]
            value, answer = settled(found)
            writer = Writer(given, refer if task["by_test"] else _opaque)
            answer |= {"returned": writer.tree(value)}
            changed = [
                n
                for n, (old, new) in enumerate(zip(before, contents(objects), strict=True))
                if old != new
            ]
            if changed and objects is not None:
                answer |= {"changed": [[n, writer.content(objects[n])] for n in changed]}
        except BaseException as error:
            answer = raised(error)
        send(answer)


def contents(objects):
    """What the containers of a call hold. The first is the list of its arguments, which no solution
    has in its hands.
    """
    return [n and Writer(list(objects)).content(x) for n, x in enumerate(objects or ())]


def settled(value):
    """(value, {}); of a coroutine or an asynchronous generator what comes of it, and {"awaitable":
    what it was}.
    """

    async def collect(generator):
        return [item async for item in generator]

    if isinstance(value, types.CoroutineType):
        kind, awaited = "coroutine", value
    elif isinstance(value, types.AsyncGeneratorType):
        kind, awaited = "generator", collect(value)
    else:
        return value, {}
    import asyncio

    try:
        return asyncio.run(awaited), {"awaitable": kind}
    except Exception as error:
        error.__dict__["awaitable"] = kind
        raise


def raised(error: BaseException) -> dict:
    """What a test may see of an exception: the names of its classes, its text and its plain
    arguments.
    """
    kinds = (
        [kind.__name__ for kind in type(error).__mro__]
        if isinstance(error, Exception)
        else ["BaseException"]
    )
    try:
        args = encode(list(error.args))
        text = str(error)
        json.dumps([args, text]).encode("ascii")
    except Exception:
        args, text = [], ""
    answer = {
        "raised": kinds,
        "text": text,
        "args": args if "$opaque" not in json.dumps(args) else [text],
    }
    kind = getattr(error, "awaitable", "")
    return answer | ({"awaitable": kind} if kind else {})
