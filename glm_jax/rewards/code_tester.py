"""The test's side of a verdict, sent into its sandbox after code_guest as text: runs a test whose
candidate is in another sandbox.

The test is run whole: its top level, `check(candidate)`, functions `test_*`, methods `test_*` of
classes `Test*`, and unittest.TestCases. Values that the candidate gives are this side's own copies,
so that `==` is Python's and not the solution's. What the solution keeps (functions, objects of its
own classes) is here a Proxy: its attributes, calls, items, length and text are requested, its
comparisons and arithmetic only where the task is a class and the test made the object by calling
it.
"""

from __future__ import annotations

import _thread
import ast
import builtins
import collections
import contextlib
import inspect
import re
import sys
import types

from glm_jax.rewards.code_guest import Opaque, Reader, Writer
from glm_jax.sandbox_guest import open_channel


class CannotCross(BaseException):
    """The test gives the candidate something that cannot go to the solution: the verdict says
    nothing about the solution.
    """


class Proxy:
    """An object that the solution keeps."""

    def __init__(self, ask, number):
        self.__dict__.update(_ask=ask, _number=number)

    def __call__(self, /, *args, **kwargs):
        return self._ask("call", self, *args, **kwargs)

    def __getattr__(self, name):
        return self._ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._ask("setattr", self, name, value)

    def __delattr__(self, name):
        self._ask("delattr", self, name)

    def __mro_entries__(self, bases):
        raise TypeError("a test cannot subclass what is in the solution's sandbox")

    def __instancecheck__(self, value):
        return isinstance(value, Proxy) and self._ask("isinstance", value, self)

    def __iter__(self):
        return iter(self._ask("items", self))

    def __enter__(self):
        return self._ask("enter", self)

    def __exit__(self, *_):
        return self._ask("exit", self)

    def __hash__(self):
        return self._ask("hash", self)

    def __eq__(self, other):
        return self is other or NotImplemented


class Made(Proxy):
    """An object that the test made by calling the entry point, a class: how it compares and counts
    is what is tested.
    """

    __hash__ = Proxy.__hash__


def _forward(owner, method, do, reflected=False):
    def forward(self, *args):
        return self._ask(do, args[0], self) if reflected else self._ask(do, self, *args)

    setattr(owner, method, forward)


for _name in "len bool str repr int float next getitem setitem delitem".split():
    _forward(Proxy, f"__{_name}__", _name)
for _name in "eq ne lt le gt ge contains neg pos abs".split():
    _forward(Made, f"__{_name}__", _name)
for _name in "add sub mul truediv floordiv mod pow matmul and_ or_ xor".split():
    _forward(Made, f"__{_name.rstrip('_')}__", _name)
    _forward(Made, f"__r{_name.rstrip('_')}__", _name, reflected=True)


class Items(list):
    """What came from an iterator: a list that is used up as an iterator is."""

    def __init__(self, values, rest):
        super().__init__(values)
        self._rest, self._source = rest, self._all()

    def _all(self):
        part = self
        yield from list.__iter__(part)
        while part._rest is not None:
            part = part._rest._ask("items", part._rest)
            yield from list.__iter__(part)

    def __iter__(self):
        return self._source

    def __next__(self):
        return next(self._source)


class AsyncItems:
    def __init__(self, values):
        self.values = iter(values)

    def __aiter__(self):
        return self

    async def __anext__(self):
        for value in self.values:
            return value
        raise StopAsyncIteration


def make_candidate(send, messages, names, is_class):
    """The Proxy of the solution's entry point.

    names: of the test, for the exceptions that it may define. is_class: whether the task asks for a
    class, see asks_for_class: only then may the solution's own operators see what the test compares
    with. Where a function is required they would let it equal anything.
    """
    proxies, turn = {}, _thread.allocate_lock()  # a test may have threads

    def refer(value):
        if isinstance(value, Opaque | AsyncItems | types.CoroutineType):
            raise TypeError(
                "the solution gave this value: that it cannot go back is the solution's fault"
            )
        if not isinstance(value, Proxy):
            send({"cannot_cross": type(value).__name__})
            raise CannotCross
        return {"$ref": value._number}

    def proxy(tree, kind=Proxy):
        number = tree["$ref"]
        if number not in proxies:
            proxies[number] = kind(ask, number)
        return proxies[number]

    def ask(do, /, *args, **kwargs):
        if do == "getattr" and args[1] in PREDICATES and not is_class:
            raise AttributeError(args[1])
        objects = []
        writer = Writer(objects, refer)
        message = {"do": do, "args": writer.tree(list(args)), "kwargs": writer.tree(kwargs)}
        given = list(objects)
        with turn:
            send(message)
            answer = next(messages)
        if "raised" in answer:
            error = exception_of(answer, names)
            if "awaitable" not in answer:
                raise error
            return awaiting(None, error)
        made = is_class and (
            (do == "call" and args[0]._number == 0)
            or (do in ARITHMETIC and any(isinstance(arg, Made) for arg in args))
        )
        reference = lambda tree: proxy(tree, Made if made and tree.get("made") is True else Proxy)
        reader = Reader(given, reference, Items)
        value = reader.value(answer["returned"])
        for number, content in answer.get("changed", ()):
            reader.refill(objects[number], content)
        if "awaitable" in answer:
            return (
                awaiting(value, None) if answer["awaitable"] == "coroutine" else AsyncItems(value)
            )
        return value

    return proxy({"$ref": 0})


ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and_",
    "or_",
    "xor",
    "neg",
    "pos",
    "abs",
)


BUILTIN = (str, bytes, list, dict, set, tuple, complex, int, collections.deque, collections.Counter)
NAMES_OF_BUILTIN = {name for kind in BUILTIN for name in dir(kind)}
# they are told what to compare with
PREDICATES = {name for name in NAMES_OF_BUILTIN if name.startswith(("is", "starts", "ends"))}


def asks_for_class(prompt, test, entry_point):
    """Whether a task asks for a class: its name has a capital, the prompt defines one, or the test
    uses the entry point as one.

    As a class is used what has attributes that no builtin type has, takes items, is entered by
    `with`, or is named by isinstance.
    """
    is_defined = any(
        isinstance(node, ast.ClassDef) and node.name == entry_point
        for node in ast.parse(prompt).body
    )
    if entry_point[:1].isupper() or is_defined:
        return True
    nodes = list(ast.walk(ast.parse(test)))
    names = {entry_point, "candidate"}
    names |= {
        a.asname
        for n in nodes
        if isinstance(n, ast.ImportFrom)
        for a in n.names
        if a.name == entry_point and a.asname
    }
    names |= {
        a.arg
        for n in nodes
        if isinstance(n, ast.FunctionDef) and n.name == "check"
        for a in n.args.args
    }
    is_candidate = lambda node: isinstance(node, ast.Name) and node.id in names
    is_call = lambda node: isinstance(node, ast.Call) and is_candidate(node.func)
    bound = {
        ast.unparse(t)
        for n in nodes
        if isinstance(n, ast.Assign) and is_call(n.value)
        for t in n.targets
    }
    is_object = lambda node: is_call(node) or ast.unparse(node) in bound

    def uses(node):
        if isinstance(node, ast.Attribute):
            of_class = is_candidate(node.value) and not node.attr.startswith("__")
            return of_class or (node.attr not in NAMES_OF_BUILTIN and is_object(node.value))
        if isinstance(node, ast.Subscript):
            return not isinstance(node.ctx, ast.Load) and is_object(node.value)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "isinstance"
        ):
            return any(map(is_candidate, node.args[1:]))
        return isinstance(node, ast.withitem) and is_object(node.context_expr)

    return any(map(uses, nodes))


async def awaiting(value, error):
    if error is not None:
        raise error
    return value


def exception_of(answer, names):
    """An exception of the nearest class that this side knows, a builtin or the test's own, with the
    solution's text.
    """
    known = [names.get(name, getattr(builtins, name, None)) for name in answer["raised"]]
    # SkipTest
    may_be = lambda k: (
        isinstance(k, type) and issubclass(k, Exception) and k.__module__ != "unittest.case"
    )
    kind = next(filter(may_be, known), RuntimeError)
    text = answer.get("text", "")
    shown = type(
        answer["raised"][0], (kind,), {"__str__": lambda self: text, "__init__": lambda self: None}
    )
    error = shown.__new__(shown)
    args = Reader().value(answer.get("args", []))
    error.args = tuple(args)  # pyright: ignore[reportArgumentType]  # no list: TypeError
    return error


# --- the test ---


def run_test():
    """Gets {"prompt", "test", "entry_point", "seal"}, then answers to what it asks of the solution,
    see code_guest.answer_calls.

    Says in the end {"passed": seal} or {"failed": type}, and {"cannot_cross": type} as soon as it
    gives the candidate such a value. The prompt gives what tests use beside the candidate.
    """
    send, messages = open_channel()
    task = next(messages)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    names = main.__dict__
    sys.modules.setdefault("pytest", pytest_module())
    try:
        is_class = asks_for_class(task["prompt"], task["test"], task["entry_point"])
        candidate = make_candidate(send, messages, names, is_class)
        exec(compile(task["prompt"], "<prompt>", "exec"), names)
        sys.modules["solution"] = main  # `from solution import add`
        names |= {task["entry_point"]: candidate, "candidate": candidate}
        given = dict(names)
        if "unittest" in task["test"]:
            import unittest

            unittest.main = lambda *args, **kwargs: None  # what it would run is run below
        try:
            exec(compile(task["test"], "<test>", "exec"), names)
        except SystemExit as end:  # the test's own: no solution can raise it here
            if end.code not in (None, 0, False):
                raise
        names[task["entry_point"]] = candidate
        run_all_of(names, given, candidate, task)
    except BaseException as error:
        send({"failed": type(error).__name__})
    else:
        send({"passed": task["seal"]})


def run_all_of(names, given, candidate, task):
    unittest = sys.modules.get("unittest")
    if callable(names.get("check")) and names["check"] is not candidate:
        names["check"](candidate)
    new = [
        value
        for name, value in names.items()
        if value is not given.get(name) and getattr(value, "__module__", "") == "__main__"
    ]
    classes = [c for c in new if isinstance(c, type)]
    called = {
        n.func.id
        for n in ast.walk(ast.parse(task["test"]))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    entry_point = task["entry_point"]
    functions = [f for f in new if inspect.isfunction(f) and f.__name__.startswith("test")]
    # else a helper of the test
    functions = [f for f in functions if f.__name__ not in called or not wants(f, entry_point)]
    calls = [(function, arguments(function, candidate, entry_point)) for function in functions]
    for kind in classes:
        if unittest is not None and issubclass(kind, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(result)
            if not result.wasSuccessful():
                raise AssertionError
        elif kind.__name__.startswith("Test"):
            calls += methods(kind, candidate, entry_point)
    for function, choices in calls:
        for chosen in choices:
            value = function(**chosen)
            if inspect.iscoroutine(value):
                import asyncio

                asyncio.run(value)


def methods(kind, candidate, entry_point):
    """pytest's: every method on an object of its own, after its setup_method."""
    found = []
    for name in [n for n in dir(kind) if n.startswith("test")]:

        def call(*, kind=kind, name=name, **chosen):
            own = kind()
            for before in ("setup_class", "setup_method", "setup"):
                if hasattr(own, before):
                    getattr(own, before)(
                        *[None] * len(inspect.signature(getattr(own, before)).parameters)
                    )
            return getattr(own, name)(**chosen)

        own = getattr(kind(), name)
        found.append((call, arguments(own, candidate, entry_point)))
    return found


def wants(function, entry_point):
    """Whether a function has parameters that are neither the candidate nor filled in by marks."""
    parameters = inspect.signature(function).parameters.items()
    needed = [
        name
        for name, p in parameters
        if p.default is p.empty and name not in ("candidate", entry_point)
    ]
    return bool(needed) and not hasattr(function, "parametrized")


def arguments(function, candidate, entry_point):
    """Choices of keyword arguments for a test: those of its `parametrize` marks, and the candidate
    by either of its names.

    Raises TypeError where it wants others, a fixture say: before any test has begun.
    """
    choices = [{}]
    for named, values in getattr(function, "parametrized", ()):
        rows = [dict(zip(named, row if len(named) > 1 else (row,), strict=True)) for row in values]
        choices = [a | b for a in choices for b in rows]
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("candidate", entry_point):
            choices = [c | {name: candidate} for c in choices]
        elif parameter.default is parameter.empty and choices and name not in choices[0]:
            raise TypeError(f"a test asks for {name}, which only pytest could give")
    return choices


def pytest_module():
    """The parts of pytest that tests of functions use; pytest itself is not in the sandbox."""
    module = types.ModuleType("pytest")

    @contextlib.contextmanager
    def raises(kind, match=None):
        found = types.SimpleNamespace(value=None, type=None)
        try:
            yield found
        except kind as error:
            found.value, found.type = error, type(error)
            if match is not None and not re.search(match, str(error)):
                raise AssertionError from error
        else:
            raise AssertionError(f"did not raise {kind}")

    class Mark:
        def __getattr__(self, name):
            return lambda *args, **kwargs: (
                args[0] if args and callable(args[0]) and not kwargs else lambda function: function
            )

        @staticmethod
        def parametrize(named, values, **_):
            named = [n.strip() for n in named.split(",")] if isinstance(named, str) else list(named)

            def mark(function):
                function.parametrized = [
                    (named, list(values)),
                    *getattr(function, "parametrized", ()),
                ]
                return function

            return mark

    class Approx:
        def __init__(self, expected, rel=1e-6, abs=1e-12):
            self.expected, self.rel, self.abs = expected, rel, abs

        def __eq__(self, found):
            return self._near(self.expected, found)

        __hash__ = None  # pyright: ignore[reportAssignmentType]  # Python's way to say unhashable

        def _near(self, expected, found):
            if isinstance(expected, dict):
                return (
                    isinstance(found, dict)
                    and expected.keys() == found.keys()
                    and all(self._near(v, found[k]) for k, v in expected.items())
                )
            if isinstance(expected, list | tuple):
                return (
                    isinstance(found, list | tuple)
                    and len(expected) == len(found)
                    and all(map(self._near, expected, found))
                )
            if not isinstance(expected, int | float | complex):
                return expected == found
            is_number = isinstance(found, int | float | complex) or type(found).__name__ in (
                "Fraction",
                "Decimal",
            )
            near = lambda: abs(complex(found) - expected) <= max(self.rel * abs(expected), self.abs)
            return is_number and (found == expected or near())

    def fail(reason=""):
        raise AssertionError(reason)

    vars(module).update(raises=raises, mark=Mark(), approx=Approx, fail=fail)
    return module
