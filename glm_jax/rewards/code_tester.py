"""The test's side of a verdict, sent into its sandbox after code_guest as text: runs a test whose candidate is in another sandbox.

The test is run whole: its top level, `check(candidate)`, functions `test_*`, methods `test_*` of classes `Test*`, and
unittest.TestCases. Values that the candidate gives are this side's own copies, so that `==` is Python's and not the solution's. What
the solution keeps (functions, objects of its own classes) is here a Proxy: its attributes, calls, items, length and text are
asked for, its comparisons and arithmetic only where the test made it by calling the class that is the entry point.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import re
import sys
import types

from glm_jax.rewards.code_guest import Reader, Writer, open_channel


class CannotCross(BaseException):
    """The test gives the candidate something that cannot go to the solution: the verdict says nothing about the solution."""


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
    """An object that the test made by calling the entry point, a class: how it compares and counts is what is tested."""

    __hash__ = Proxy.__hash__


def _forward(owner, method, do, reflected=False):
    def forward(self, *args):
        return self._ask(do, args[0], self) if reflected else self._ask(do, self, *args)

    setattr(owner, method, forward)


for _name in ("len", "bool", "str", "repr", "int", "float", "next", "getitem", "setitem", "delitem"):
    _forward(Proxy, f"__{_name}__", _name)
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "contains", "neg", "pos", "abs"):
    _forward(Made, f"__{_name}__", _name)
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor"):
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


def make_candidate(send, messages, names):
    """The Proxy of the solution's entry point. names: of the test, for the exceptions that it may define."""
    proxies = {}

    def refer(value):
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
        writer = Writer([], refer)
        send({"do": do, "args": writer.tree(list(args)), "kwargs": writer.tree(kwargs)})
        given = list(writer.objects)
        answer = next(messages)
        if "raised" in answer:
            error = exception_of(answer, names)
            if "awaitable" not in answer:
                raise error
            return awaiting(None, error)
        made = (do == "call" and args[0]._number == 0) or (do in ARITHMETIC and any(isinstance(arg, Made) for arg in args))
        reference = lambda tree: proxy(tree, Made if made and tree.get("made") is True else Proxy)  # noqa: E731
        reader = Reader(given, reference, Items)
        value = reader.value(answer["returned"])
        for number, content in answer.get("changed", ()):
            reader.refill(writer.objects[number], content)
        if "awaitable" in answer:
            return awaiting(value, None) if answer["awaitable"] == "coroutine" else AsyncItems(value)
        return value

    return proxy({"$ref": 0})


ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "neg", "pos", "abs")


async def awaiting(value, error):
    if error is not None:
        raise error
    return value


def exception_of(answer, names):
    """An exception of the nearest class that this side knows, a builtin or the test's own, with the solution's text."""
    known = [names.get(name, getattr(builtins, name, None)) for name in answer["raised"]]
    kind = next((k for k in known if isinstance(k, type) and issubclass(k, Exception)), RuntimeError)
    text = answer.get("text", "")
    shown = type(answer["raised"][0], (kind,), {"__str__": lambda self: text, "__init__": lambda self: None})
    error = shown.__new__(shown)
    error.args = tuple(Reader().value(answer.get("args", [])))
    return error


# --- the test ---


def run_test():
    """Gets {"prompt", "test", "entry_point", "seal"}, then answers to what it asks of the solution, see code_guest.answer_calls.

    Says in the end {"passed": seal} or {"failed": type}, and {"cannot_cross": type} as soon as it gives the candidate such a value. The
    prompt gives what tests use beside the candidate.
    """
    send, messages = open_channel()
    task = next(messages)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    names = main.__dict__
    candidate = make_candidate(send, messages, names)
    sys.modules.setdefault("pytest", pytest_module())
    try:
        exec(compile(task["prompt"], "<prompt>", "exec"), names)
        sys.modules["solution"] = main  # `from solution import add`
        names |= {task["entry_point"]: candidate, "candidate": candidate}
        given = dict(names)
        if "unittest" in task["test"]:
            import unittest

            unittest.main = lambda *args, **kwargs: None  # what it would run is run below
        exec(compile(task["test"], "<test>", "exec"), names)
        names[task["entry_point"]] = candidate
        run_all_of(names, given, candidate, task["entry_point"])
    except BaseException as error:
        send({"failed": type(error).__name__})
    else:
        send({"passed": task["seal"]})


def run_all_of(names, given, candidate, entry_point):
    unittest = sys.modules.get("unittest")
    if callable(names.get("check")) and names["check"] is not candidate:
        names["check"](candidate)
    new = [value for name, value in names.items() if value is not given.get(name) and getattr(value, "__module__", "") == "__main__"]
    classes = [c for c in new if isinstance(c, type)]
    functions = [f for f in new if inspect.isfunction(f) and f.__name__.startswith("test")]
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
    for name in [n for n in vars(kind) if n.startswith("test")]:

        def call(*, kind=kind, name=name, **chosen):
            own = kind()
            for before in ("setup_class", "setup_method", "setup"):
                if hasattr(own, before):
                    getattr(own, before)(*[None] * len(inspect.signature(getattr(own, before)).parameters))
            return getattr(own, name)(**chosen)

        own = getattr(kind(), name)
        found.append((call, arguments(own, candidate, entry_point)))
    return found


def arguments(function, candidate, entry_point):
    """Choices of keyword arguments for a test: those of its `parametrize` marks, and the candidate by either of its names.

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
            return lambda *args, **kwargs: args[0] if args and callable(args[0]) and not kwargs else lambda function: function

        @staticmethod
        def parametrize(named, values, **_):
            named = [n.strip() for n in named.split(",")] if isinstance(named, str) else list(named)

            def mark(function):
                function.parametrized = [(named, list(values)), *getattr(function, "parametrized", ())]
                return function

            return mark

    class Approx:
        def __init__(self, expected, rel=1e-6, abs=1e-12):
            self.expected, self.rel, self.abs = expected, rel, abs

        def __eq__(self, found):
            return self._near(self.expected, found)

        __hash__ = None

        def _near(self, expected, found):
            if isinstance(expected, dict):
                return (
                    isinstance(found, dict)
                    and expected.keys() == found.keys()
                    and all(self._near(v, found[k]) for k, v in expected.items())
                )
            if isinstance(expected, list | tuple):
                return isinstance(found, list | tuple) and len(expected) == len(found) and all(map(self._near, expected, found))
            if not isinstance(expected, int | float | complex):
                return expected == found
            is_number = isinstance(found, int | float | complex) or type(found).__name__ in ("Fraction", "Decimal")
            near = lambda: abs(complex(found) - expected) <= max(self.rel * abs(expected), self.abs)  # noqa: E731
            return is_number and (found == expected or near())

    def fail(reason=""):
        raise AssertionError(reason)

    module.raises, module.mark, module.approx, module.fail = raises, Mark(), Approx, fail
    return module
