"""Right and wrong solutions of tests as people and models write them, and the verdict that each
deserves.
"""

from __future__ import annotations

import pytest

from glm_jax.rewards import code, code_tester
from glm_jax.rewards.code import Verdict, judge
from glm_jax.sandbox import STANDARD
from tests.sandboxes import needs_sandbox

ADD = "def f(a, b): return a + b"
STACK = (
    "class f:\n  def __init__(s): s.items = []\n  def push(s, x): s.items.append(x)\n"
    "  def pop(s): return s.items.pop()\n  def __len__(s): return len(s.items)\n"
)
VECTOR = (
    "class f:\n  def __init__(s, x, y): s.x, s.y = x, y\n"
    "  def __add__(s, o): return f(s.x + o.x, s.y + o.y)\n"
    "  def __mul__(s, k): return f(s.x * k, s.y * k)\n  __rmul__ = __mul__\n"
    "  def __eq__(s, o): return (s.x, s.y) == (o.x, o.y)\n"
    "  def __lt__(s, o): return s.x < o.x\n"
    "  def __repr__(s): return f'({s.x}, {s.y})'\n"
    "  def norm(s): return (s.x**2 + s.y**2) ** 0.5\n"
)
UNITTEST = (
    "import unittest\nclass T(unittest.TestCase):\n  def setUp(self): self.x = 1\n"
    "  def test(self):\n    self.assertEqual(f(self.x, 2), 3)\n"
    "    with self.subTest('more'): self.assertEqual(f(2, 2), 4)\n"
)
LIAR = (
    "class Liar:\n  __eq__ = __lt__ = __contains__ = __bool__ = lambda s, *o: True\n"
    "  __sub__ = __abs__ = lambda s, *o: 0\n  __hash__ = None\n"
)

# test: solutions that pass it, solutions that do not
TESTS = {
    "def check(candidate):\n  assert candidate(1, 2) == 3\n": (
        [ADD, "f = lambda a, b: a + b", "from operator import add as f"],
        [
            "def f(a, b): return 0",
            "def f(a): return 3",
            "def g(a, b): return a + b",
            "x",
            LIAR + "def f(a, b): return Liar()",
        ],
    ),
    "def test_add():\n  assert f(1, 2) == 3\n": (
        [ADD],
        ["def f(a, b): return 0", LIAR + "def f(a, b): return Liar()"],
    ),
    "def test_one(candidate):\n  assert candidate(1, 2) == 3\ndef test_two(f):\n"
    "  assert f(2, 2) == 4\n": ([ADD], ["def f(a, b): return 3"]),
    "async def test_add():\n  assert f(1, 2) == 3\n": ([ADD], ["def f(a, b): return 0"]),
    "class TestAdd:\n  def setup_method(self): self.x = 1\n  def test_add(self):\n"
    "    assert f(self.x, 2) == 3\n": ([ADD], ["def f(a, b): return 0"]),
    UNITTEST: ([ADD], ["def f(a, b): return 0", "def f(a, b): return 3"]),
    UNITTEST + "if __name__ == '__main__':\n  unittest.main()\n": (
        [ADD],
        ["def f(a, b): return 0"],
    ),
    "import unittest\nclass T(unittest.IsolatedAsyncioTestCase):\n  async def test(self):\n"
    "    self.assertEqual(f(1, 2), 3)\n": ([ADD], ["def f(a, b): return 0"]),
    "if __name__ == '__main__':\n  assert f(1, 2) == 3\n": ([ADD], ["def f(a, b): return 0"]),
    "from solution import f as add\nassert add(1, 2) == 3\n": ([ADD], ["def f(a, b): return 0"]),
    "import pytest\n@pytest.mark.parametrize('a, b, c', [(1, 2, 3), (2, 2, 4)])\n"
    "def test_add(a, b, c):\n  assert f(a, b) == c\n": ([ADD], ["def f(a, b): return 3"]),
    "import pytest\ndef test_near():\n  assert f(0.1, 0.2) == pytest.approx(0.3)\n": (
        [ADD],
        ["def f(a, b): return 0.31", LIAR + "def f(a, b): return Liar()"],
    ),
    "import pytest\ndef test_refuses():\n  with pytest.raises(ValueError, match='neg'):\n"
    "    f(-1)\n  assert f(1) == 1\n": (
        ["def f(x):\n  if x < 0: raise ValueError('negative')\n  return x"],
        [
            "def f(x): return x",
            "def f(x): raise ValueError('negative')",
            "def f(x):\n  if x < 0: raise ValueError('bad')\n  return x",
            "def f(x):\n  if x < 0: raise TypeError('negative')\n  return x",
        ],
    ),
    # in place
    "x = [3, 1]\nf(x)\nassert x == [1, 3]\n": (
        ["def f(x): x.sort()", "def f(x): x[:] = sorted(x)", "def f(x): x.reverse()"],
        ["def f(x): return sorted(x)", "def f(x): pass", "def f(x): x.clear()"],
    ),
    "x = [3, 1]\nassert f(x) == [1, 3] and x == [3, 1]\n": (
        ["def f(x): return sorted(x)"],
        ["def f(x):\n  x.sort()\n  return x"],
    ),
    "x = [1]\nassert f(x) is x and x == [1, 2]\n": (
        ["def f(x):\n  x.append(2)\n  return x"],
        ["def f(x): return x + [2]"],
    ),
    "a, b = [2], [1]\nx = [a, b]\nf(x)\nassert x == [[1], [2]] and x[1] is a and a == [2]\n": (
        ["def f(x): x.sort()"],
        ["def f(x): x[0][0], x[1][0] = 1, 2"],
    ),
    "a = [1]\nx = [a, a]\nf(x)\nassert x == [[1, 5], [1, 5]] and a == [1, 5]\n": (
        ["def f(x): x[0].append(5)"],
        ["def f(x):\n  x[0].append(5)\n  x[1].append(5)"],
    ),
    "d = {'a': {1, 2}}\nf(d)\nassert d == {'a': {1, 2, 3}, 5: 0}\n": (
        ["def f(d):\n  d['a'].add(3)\n  d[5] = 0"],
        ["def f(d): d['a'].add(3)"],
    ),
    "from collections import deque, Counter, defaultdict\n"
    "d, c, e = deque([1], maxlen=2), Counter('a'), defaultdict(list)\nf(d, c, e)\n"
    "assert d == deque([1, 2]) and c['b'] == 1 and e[0] == [] and e[7] == 1\n": (
        ["def f(d, c, e):\n  d.append(2)\n  c['b'] = 1\n  e[7] = 1"],
        ["def f(d, c, e): pass"],
    ),
    "b = bytearray(b'ab')\nf(b, k=[b])\nassert b == b'xb'\n": (
        ["def f(b, k): b[0] = 120"],
        ["def f(b, k): pass"],
    ),
    "m = [[1, 2], [3, 4]]\nf(m)\nassert m == [[3, 1], [4, 2]]\n": (
        ["def f(m): m[:] = [list(r) for r in zip(*m[::-1])]"],
        ["def f(m): m.reverse()"],
    ),
    # exceptions
    "try: f(-1)\nexcept ValueError as e: assert 'negative' in str(e)\nelse: assert False\n": (
        [
            "class Own(ValueError): pass\ndef f(x): raise Own('negative number')",
            "def f(x): raise ValueError('negative')",
        ],
        [
            "def f(x): raise ValueError('no')",
            "def f(x): return x",
            "class Own(Exception): pass\ndef f(x): raise Own('negative')",
        ],
    ),
    "try: f('{')\nexcept ValueError: pass\nelse: assert False\nassert f('1') == 1\n": (
        [
            "import json\ndef f(x): return json.loads(x)",
            "def f(x):\n  if x == '{': b'\\xff'.decode()\n  return 1",
        ],
        ["def f(x): return 1", "def f(x): raise KeyError(x)"],
    ),
    "try: f({}, 'k')\nexcept KeyError as e: assert e.args == ('k',)\nelse: assert False\n": (
        ["def f(d, k): return d[k]"],
        ["def f(d, k): return d.get(k)"],
    ),
    "try: f()\nexcept LookupError as e:\n"
    "  assert type(e).__name__ == 'Missing' and str(e) == 'gone'\n": (
        [
            "class Missing(LookupError):\n  def __init__(self, a): self.a = a\n"
            "  def __str__(self): return 'gone'\ndef f(): raise Missing(1)"
        ],
        ["def f(): raise LookupError('gone')"],
    ),
    # iterators
    "assert list(f(3)) == [0, 1, 2]\n": (
        [
            "def f(n):\n  for i in range(n): yield i",
            "def f(n): return range(n)",
            "def f(n): return iter([0, 1, 2])",
            "def f(n): return (i for i in range(n))",
            "def f(n): return {0: 1, 1: 1, 2: 1}.keys()",
            "def f(n): return map(int, '012')",
        ],
        ["def f(n):\n  for i in range(n + 1): yield i", "def f(n): return n"],
    ),
    "g = f()\nassert next(g) == 0 and next(g) == 1 and next(g) == 2\n": (
        [
            "import itertools\ndef f(): return itertools.count()",
            "def f():\n  i = 0\n  while True:\n    yield i\n    i += 1",
        ],
        ["def f(): return [0, 1, 2]", "def f():\n  while True: yield 0"],
    ),
    "import itertools\nassert sum(itertools.islice(f(), 20005)) == 20005\n": (
        ["def f():\n  while True: yield 1"],
        ["def f(): yield 1"],
    ),
    # types
    "from fractions import Fraction\nassert f(1, 2) == Fraction(1, 2)\n": (
        ["from fractions import Fraction\ndef f(a, b): return Fraction(a, b)"],
        ["from fractions import Fraction\ndef f(a, b): return Fraction(b, a)"],
    ),
    "from collections import deque\nassert f([1]) == deque([1, 2])\n": (
        ["from collections import deque\ndef f(x): return deque(x + [2])"],
        ["def f(x): return x + [2]"],
    ),
    "from decimal import Decimal\nassert f('1.10') == Decimal('2.20')\n": (
        ["from decimal import Decimal\ndef f(x): return Decimal(x) * 2"],
        ["def f(x): return float(x) * 3"],
    ),
    "import datetime\nassert f(datetime.date(2024, 2, 28)) == datetime.date(2024, 2, 29)\n": (
        ["import datetime\ndef f(d): return d + datetime.timedelta(days=1)"],
        ["def f(d): return d"],
    ),
    "assert f('aab')['a'] == 2 and f('aab')['z'] == 0 and f('ab').most_common(1)\n": (
        ["from collections import Counter\ndef f(s): return Counter(s)"],
        ["def f(s): return {c: s.count(c) for c in s}"],
    ),
    "assert f(2)(3) == 6\n": (
        [
            "def f(a): return lambda b: a * b",
            "def f(a):\n  class By:\n    def __call__(s, b): return a * b\n  return By()",
        ],
        ["def f(a): return lambda b: a + b"],
    ),
    "n = f([1, 2])\nassert n.val == 1 and n.next.val == 2 and n.next.next is None\n": (
        [
            "class N:\n"
            "  def __init__(s, v, n): s.val, s.next = v, n\n"
            "def f(x): return N(x[0], f(x[1:])) if x else None"
        ],
        ["class N:\n  val, next = 1, None\ndef f(x): return N"],
    ),
    "assert abs(f(2) - 1.4142) < 1e-3\n": (
        ["def f(x): return x ** 0.5"],
        ["def f(x): return 1.5", LIAR + "def f(x): return Liar()"],
    ),
    "assert 3 in f()\nassert sorted(f()) == [1, 3]\n": (
        ["def f(): return {1, 3}"],
        ["def f(): return [1]", LIAR + "def f(): return Liar()"],
    ),
    # classes
    "s = f()\ns.push(1)\ns.push([2])\nassert s.pop() == [2] and len(s) == 1 and s.items == [1] and "
    "isinstance(s, f)\ntry:\n  s.pop(), s.pop()\nexcept IndexError: pass\nelse: assert False\n": (
        [STACK],
        [
            STACK.replace("pop()", "pop(0)"),
            STACK.replace("len(s.items)", "0"),
            "def f(): return []",
            LIAR + "def f(): return Liar()",
        ],
    ),
    "v = f(1, 2)\nassert v + f(2, 2) == f(3, 4) and v != f(1, 1) and 2 * v == v * 2 == f(2, 4) and "
    "str(v) == '(1, 2)' and f(3, 4).norm() == 5\nassert sorted([f(2, 0), f(1, 0)])[0].x == 1\n": (
        [VECTOR],
        [
            VECTOR.replace("s.x + o.x", "s.x"),
            VECTOR.replace("(s.x, s.y) == (o.x, o.y)", "True"),
            VECTOR.replace("s.x**2", "s.x"),
        ],
    ),
    "with f() as c: assert c.open\nassert not c.open\n": (
        [
            "class f:\n  def __enter__(s):\n"
            "    s.open = True\n    return s\n  def __exit__(s, *_): s.open = False"
        ],
        ["class f:\n  open = True\n  def __enter__(s): return s\n  def __exit__(s, *_): pass"],
    ),
    "d = f()\nd['a'] = 1\nassert d['a'] == 1 and 'a' in d and 'b' not in d\ndel d['a']\n"
    "assert 'a' not in d\n": (
        [
            "class f(dict): pass",
            "class f:\n  def __init__(s): s.d = {}\n"
            "  def __setitem__(s, k, v): s.d[k] = v\n  def __getitem__(s, k): return s.d[k]\n"
            "  def __delitem__(s, k): del s.d[k]\n  def __contains__(s, k): return k in s.d",
        ],
        [
            "class f:\n  __setitem__ = __delitem__ = lambda *_: None\n"
            "  __getitem__ = lambda *_: 1\n  __contains__ = lambda *_: True"
        ],
    ),
    # asynchronous
    "import asyncio\nassert asyncio.run(f(2)) == 4\n": (
        [
            "async def f(x): return x * x",
            "import asyncio\nasync def f(x):\n  await asyncio.sleep(0)\n  return x * x",
        ],
        ["async def f(x): return x", "def f(x): return 4"],
    ),
    "async def test_it():\n  try: await f(-1)\n  except ValueError: pass\n  else: assert False\n"
    "  assert await f(3) == 3\n": (
        ["async def f(x):\n  if x < 0: raise ValueError\n  return x"],
        ["async def f(x): return x"],
    ),
    "import asyncio\nasync def main(): return [x async for x in f(3)]\n"
    "assert asyncio.run(main()) == [0, 1, 2]\n": (
        ["async def f(n):\n  for i in range(n): yield i"],
        ["async def f(n): yield n"],
    ),
}


def inputs(right: bool) -> list[tuple[str, str]]:
    return [
        (test, solution) for test, solutions in TESTS.items() for solution in solutions[not right]
    ]


@needs_sandbox
@pytest.mark.parametrize("test", TESTS, ids=range(len(TESTS)))
def test_verdicts(test):
    answer = {"entry_point": "f", "prompt": "", "test": test}
    code.check_answer(answer)
    code.check_test(answer, STANDARD)
    for solutions, verdict in zip(TESTS[test], (Verdict.PASSED, Verdict.WRONG), strict=True):
        for solution in solutions:
            assert judge(answer, solution, STANDARD).verdict is verdict, solution


@needs_sandbox
@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("", "calls nothing"),
        ("def check(candidate): pass", "calls nothing"),
        ("def helper(): assert f(1) == 1", "calls nothing"),
        ("try: f(1)\nexcept Exception: pass", "passes with a solution that raises"),
        ("def test_it(tmp_path): assert f(1)", "before it calls the solution: TypeError"),
        ("import numpy\nassert f(1)", "before it calls the solution: ModuleNotFoundError"),
        ("assert f(print)", "cannot go to its sandbox"),
        ("class Own: pass\nassert f([Own()])", "gives the solution a Own"),
    ],
)
def test_a_test_that_judges_nothing_is_refused_and_rewards_nothing(test, message):
    answer = {"entry_point": "f", "prompt": "", "test": test}
    with pytest.raises(ValueError, match=message):
        code.check_test(answer, STANDARD)
    assert (
        judge(answer, "def f(x): return x", STANDARD).verdict
        in (Verdict.ENVIRONMENT, Verdict.PASSED)[: 1 + ("Exception" in test)]
    )


STDIO = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "cases", "tolerance", "share"),
    [
        ("print(sum(map(int, input().split())))", STDIO, 0, 1.0),
        (
            "import sys\na, b = map(int, sys.stdin.read().split())\n"
            "sys.stdout.write(f'{a + b}  \\n\\n')",
            STDIO,
            0,
            1.0,
        ),
        (
            "if __name__ == '__main__':\n  print(sum(map(int, open(0).read().split())))",
            STDIO,
            0,
            1.0,
        ),
        ("print(3)", STDIO, 0, 0.5),
        ("print(3)\nraise SystemExit(1)", STDIO, 0, 0.0),
        ("print('3 ', end='')", STDIO, 0, 0.5),
        ("print(' 3')", STDIO, 0, 0.0),
        ("print('Sum: 3')", STDIO, 0, 0.0),
        ("print(1 / 3)", [{"input": "", "output": "0.33333"}], 1e-4, 1.0),
        ("print(1 / 3)", [{"input": "", "output": "0.33333"}], 0, 0.0),
        ("print(0.34)", [{"input": "", "output": "0.33333"}], 1e-4, 0.0),
        ("print('a', 0.3333333)", [{"input": "", "output": "b 0.33333"}], 1e-4, 0.0),
        ("print('nan')", [{"input": "", "output": "0.33333"}], 1e-4, 0.0),
        ("print('é\\n\\n1')", [{"input": "é", "output": "é\n\n1"}], 0, 1.0),
        ("import os\nos._exit(0)", STDIO, 0, 0.0),
        ("while True: print('3')", STDIO, 0, 0.0),
    ],
)
def test_programs_are_compared_as_judges_do(program, cases, tolerance, share):
    answer = {"stdio": cases, "tolerance": tolerance}
    code.check_answer(answer)
    judgement = judge(answer, program, STANDARD)
    assert judgement.share == share and (judgement.verdict is Verdict.PASSED) == (share == 1.0)


CLASS_LIAR = (
    "class f:\n  def __init__(s, *a, **k): pass\n"
    "  __eq__ = __lt__ = __gt__ = __contains__ = __bool__ = lambda s, *o: True\n"
    "  __sub__ = __abs__ = __add__ = lambda s, *o: 0\n  __hash__ = None\n"
    "  startswith = isdigit = lambda s, *o: True\n"
)


@needs_sandbox
@pytest.mark.parametrize(
    "test",
    [
        "assert f(1, 2) == 303",
        "assert 303 in f(1)",
        "assert abs(f(1) - 303) < 1e-6",
        "assert f('a').startswith('b303')",
        "def check(candidate):\n  assert candidate(1) == 303",
        "import unittest\nclass T(unittest.TestCase):\n"
        "  def test(self): self.assertEqual(f(1), 303)",
        "import pytest\ndef test(): assert f(1) == pytest.approx(303)",
    ],
)
def test_a_class_in_place_of_a_function_equals_nothing(test):
    """Its operators would be the solution's own."""
    answer = {"entry_point": "f", "prompt": "", "test": test}
    assert judge(answer, CLASS_LIAR, STANDARD).verdict is Verdict.WRONG
    assert (
        judge(
            answer,
            CLASS_LIAR.replace("class f", "class Liar") + "def f(*a): return Liar()",
            STANDARD,
        ).verdict
        is Verdict.WRONG
    )


@needs_sandbox
def test_what_a_method_returns_is_compared_by_us():
    """Only what the test itself has made of the class compares as the class says."""
    answer = {"entry_point": "f", "prompt": "class f: ...", "test": "assert f(1).add(f(2)) == 303"}
    honest = "class f:\n  def __init__(s, x): s.x = x\n  def add(s, o): return {}"
    assert judge(answer, honest.format("300 + s.x + o.x"), STANDARD).verdict is Verdict.PASSED
    liar = honest.format("f(0)") + "\n  __eq__ = lambda s, o: True\n  __hash__ = None"
    assert judge(answer, liar, STANDARD).verdict is Verdict.WRONG


@pytest.mark.parametrize(
    ("prompt", "test", "entry_point", "is_class"),
    [
        ("", "assert Box(1)", "Box", True), ("class box: ...", "assert box(1)", "box", True),
        ("", "assert box(1) == 2", "box", False), ("class Other: ...", "box(1)", "box", False),
        ("", "assert box(1).width == 2", "box", True), ("", "with box(1): pass", "box", True),
        ("", "assert isinstance(x, box)", "box", True), ("", "assert box(1)[0]", "box", False),
    ],
)  # fmt: skip
def test_a_task_that_asks_for_a_class_is_known_by_its_prompt_name_or_use(
    prompt, test, entry_point, is_class
):
    assert code_tester.asks_for_class(prompt, test, entry_point) is is_class


@needs_sandbox
@pytest.mark.parametrize(("result", "passes"), [("3", True), ("4", False)])
def test_marks_of_pytest_change_no_test(result, passes):
    test = (
        "import pytest\n@pytest.mark.slow\ndef test_add(): assert f(1, 2) == 3\n"
        "@pytest.mark.timeout(5)\nclass TestMore:\n  @pytest.mark.slow\n"
        "  def test(self): assert f(1, 2) == 3\n"
    )
    answer = {"entry_point": "f", "prompt": "", "test": test}
    verdict = judge(answer, f"def f(a, b): return {result}", STANDARD).verdict
    assert (verdict is Verdict.PASSED) == passes


@needs_sandbox
@pytest.mark.parametrize(("result", "passes"), [("[a, b]", 1), ("[a, b + 1]", 0), ("[a]", 0)])
def test_every_entry_of_a_list_has_to_be_near(result, passes):
    test = "import pytest\ndef test(): assert f(1.0, 2.0) == pytest.approx([1.0, 2.0 + 1e-9])"
    answer = {"entry_point": "f", "prompt": "", "test": test}
    verdict = judge(answer, f"def f(a, b): return {result}", STANDARD).verdict
    assert (verdict is Verdict.PASSED) == passes


@pytest.mark.parametrize(
    ("prompt", "program", "goes_on"),
    [("def f():\n", "    return 1", True), ("def f():\n", "\treturn 1", True),
     ("def f():\n", "def f(): return 1", False), ("", "    return 1", False),
     ("def f():\n", "", False)],
)  # fmt: skip
def test_indented_code_goes_on_where_the_prompt_ends(prompt, program, goes_on):
    assert code.is_continued(prompt, program) is goes_on


@needs_sandbox
def test_a_solution_cannot_skip_a_test_or_end_it():
    test = (
        "import unittest\nclass T(unittest.TestCase):\n"
        "  def test(self): self.assertEqual(f(1), 303)"
    )
    skip = "import unittest\ndef f(x): raise unittest.SkipTest('no')"
    answer = {"entry_point": "f", "prompt": "", "test": test}
    assert judge(answer, skip, STANDARD).verdict is Verdict.WRONG
    assert judge(answer, "def f(x): raise SystemExit(0)", STANDARD).verdict is Verdict.WRONG


@needs_sandbox
@pytest.mark.parametrize(
    ("test", "right", "wrong"),
    [
        (
            "p = f(1, 2)\nassert p.x == 1 and p == (1, 2)",
            "from collections import namedtuple\nP = namedtuple('P', 'x y')\n"
            "def f(a, b): return P(a, b)",
            "def f(a, b): return (a, b)",
        ),
        (
            "d = f()\nd['a'] += 1\nassert d['a'] == 1",
            "from collections import defaultdict\ndef f(): return defaultdict(int)",
            "def f(): return {}",
        ),
        ("assert f(1) == 2\nraise SystemExit(0)", "def f(x): return 2", "def f(x): return 1"),
        ("import sys\nsys.exit(f(1) != 2)", "def f(x): return 2", "def f(x): return 1"),
    ],
)
def test_more_of_what_tests_do(test, right, wrong):
    answer = {"entry_point": "f", "prompt": "", "test": test}
    assert judge(answer, right, STANDARD).verdict is Verdict.PASSED
    assert judge(answer, wrong, STANDARD).verdict is Verdict.WRONG


def test_there_are_enough_of_both():
    assert len(inputs(True)) >= 55 and len(inputs(False)) >= 65
