"""Mathematical answers: equal where they are, and harmless whatever they are."""

import threading
import time

import psutil
import pytest

from glm_jax.rewards import math_judge, mathematics
from glm_jax.rollouts.task import Task


def task(answer, name="t"):
    return Task(name, "algebra", "math", ({"role": "user", "content": "Solve."},), answer)


def rewards(pairs):
    return mathematics.score(
        [task(reference) for reference, _ in pairs],
        [{"content": f"So $\\boxed{{{box}}}$."} for _, box in pairs],
    )


SAME = [
    ("42", "42"), ("\\frac{1}{2}", "0.5"), ("\\frac{1}{2}", "1/2"), ("\\frac12", "\\dfrac{2}{4}"),
    ("x = 3", "3"), ("3", "x=3"),
    ("(3, -4)", "(3,-4)"), ("\\{1, 2\\}", "\\{2, 1\\}"), ("x^2 + 2x + 1", "(x+1)^2"),
    ("12", "12\\text{ cm}"), ("1000", "1{,}000"),
    ("\\sqrt{8}", "2\\sqrt{2}"), ("\\text{even}", "even"), ("50\\%", "0.5"), ("[0, 1)", "[0,1)"),
    ("\\infty", "\\infty"),
    ("10^{6}", "1000000"), ("-2", "- 2"), ("5", "5."), ("1000", "1e3"), ("0.5", "1/2 = 0.5"),
    ("5", "x = 5"),
    ("5\\text{ kg}", "5\\text{ kg}"), ("11_3", "11_3"),
    ("1.6\\times10^{-19}", "1.60\\times 10^{-19}"), ("50\\%", "50\\%"),
    ("1/2 = 0.5", "0.5"), ("x = 3", "x = 3 = 3.0"), ("3", "x = 3 = 3.0"), ("x=2, y=3", "x=2,y=3"),
    ("x=2, y=3", "y=3, x=2"),
    ("x=2, y=3", "2, 3"), ("x=2, y=3", "(2, 3)"), ("(2,3)", "x=2, y=3"),
    ("(-\\infty,2]", "x \\le 2"), ("x \\le 2", "(-\\infty,2]"),
    ("(-\\infty,2]", "x <= 2"), ("1000", "1\\times10^3"), ("1000", "10^3"), ("1e3", "1000"),
    ("50\\%", "1/2"),
    ("50\\%", "50\\text{ percent}"), ("0.5", "50\\%"), ("6.626\\times 10^{-34}", "6.626e-34"),
    ("1.60\\times10^{-19}", "1.602\\times10^{-19}"), ("3.14", "3.14159"), ("0.333", "\\frac{1}{3}"),
    ("5\\text{ kg}", "5 kg"),
    ("5\\text{ kg}", "5\\,\\mathrm{kg}"), ("5\\text{ kg}", "5\\text{ kg.}"),
    ("5\\text{ kg}", "5\\text{ kilograms}"),
    ("10\\text{ m/s}", "10\\,\\mathrm{m}/\\mathrm{s}"),
    ("10\\text{ m/s}", "10\\text{ meters per second}"),
    ("12\\text{ cm}^2", "12\\text{ square centimeters}"),
    ("12\\text{ cm}^2", "12\\ \\text{cm}^{2}"), ("90^\\circ", "90"),
    ("90^\\circ", "90\\text{ degrees}"), ("\\$5", "5"), ("\\$5", "5\\text{ dollars}"),
    ("11_3", "11_{3}"),
    ("x = \\pm 2", "x = 2, x = -2"), ("\\pm 2", "2, -2"), ("2, 3", "x = 2, x = 3"),
    ("2, 3", "x = 3 \\text{ or } x = 2"),
    ("\\frac{1}{2004!}", "\\frac{1}{2004!}"),
    ("\\frac{2^{2005}+1}{3\\cdot 2^{2006}}", "\\frac{1}{6}+\\frac{1}{3\\cdot 2^{2006}}"),
    ("\\frac{1}{3}", "x = \\frac{1}{3} \\approx 0.333"), ("\\sqrt{3+2\\sqrt{2}}", "1+\\sqrt{2}"),
    ("10^{-20}x+1", "1+10^{-20}x"),
    ("1 < x \\le 2", "(1, 2]"), ("(1, 2]", "1 < x \\le 2"),
    ("(-\\infty, 2) \\cup (2, \\infty)", "x \\ne 2"), ("x > 2", "2 < x"),
    ("x < 1 \\text{ or } x > 2", "(-\\infty,1)\\cup(2,\\infty)"),
    ("\\begin{pmatrix} 0.5 & 1 \\end{pmatrix}", "\\begin{pmatrix} \\frac12 & 1 \\end{pmatrix}"),
    ("(0.5, 3)", "(\\frac12, 3)"),
    ("y = 2x+1", "y = 1 + 2x"), ("x+y=3", "y + x = 3"), ("2x", "x \\cdot 2"), ("2 x", "2x"),
    ("\\frac{x}{2}", "0.5x"),
    ("\\log_2 8", "3"), ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt 2}"),
    ("e^{-40}", "\\frac{1}{e^{40}}"), ("(x,y)=(2,3)", "(2,3)"),
    ("x \\in (1, 2)", "(1,2)"), ("6.02\\times10^{23}", "602000000000000000000000"), ("2.50", "2.5"),
    ("1,000,000", "10^6"),
    ("\\{(1,2), (3,4)\\}", "\\{(3,4),(1,2)\\}"), ("2^{100}", "1267650600228229401496703205376"),
    ("\\frac{3}{4}", "75\\%"),
    ("3+4i", "4i+3"), ("-\\frac{1}{2}", "\\frac{-1}{2}"), ("5\\text{ m}", "5 m"),
    ("5\\text{ m}", "5m"),
    ("0", "\\sqrt{3+2\\sqrt{2}}-1-\\sqrt{2}"), ("y=2x+1", "2x+1-y=0"),
    ("\\text{no solution}", "no solution"),
    ("5", "5\\text{ apples}"), ("5\\text{ or }6", "6, 5"), ("5", "5\\text{ m}^2"),
]  # fmt: skip
DIFFERENT = [
    ("42", "43"), ("42", "-42"), ("\\frac{1}{2}", "0.51"), ("2", "2, 3"), ("2", "2 \\text{ or } 3"),
    ("(1, 2)", "(2, 1)"),
    ("x + 1", "y + 1"), ("odd", "even"), ("2", "x"), ("[0, 1)", "[0, 1]"), ("2", "?"),
    ("\\infty", "-\\infty"), ("1", "0.99999"),
    ("7", "\\text{no idea, 7}"), ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("0.0000001", "0.0000004"), ("5\\text{ kg}", "5\\text{ s}"), ("10\\text{ km}", "10\\text{ m}"),
    ("11_3", "11_2"), ("101_2", "101"),
    ("50\\%", "50"), ("50", "50\\%"), ("5", "3 = 5"), ("2", "4 = 3 = 2"), ("e^{-40}", "e^{-41}"),
    ("1.6\\times10^{-19}", "9.1\\times10^{-31}"),
    ("6.626\\times 10^{-34}", "6.626\\times 10^{-35}"),
    ("6.626\\times 10^{-34}", "6.627\\times 10^{-34}"), ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"),
    ("\\frac{2^{2005}+1}{3\\cdot 2^{2006}}", "\\frac{1}{3\\cdot 2^{2006}}"),
    ("\\frac{2^{2005}+1}{3\\cdot 2^{2006}}", "\\frac{1}{6}"),
    ("5 kg", "5 s"), ("5 kg", "5 g"), ("5m", "5s"), ("5", "5\\%"), ("101_2", "5"), ("101", "101_2"),
    ("x=2, y=3", "3, 2"), ("x=2, y=3", "(3, 2)"), ("x=2, y=3", "x=3, y=2"),
    ("x=2, y=3", "y=2, x=3"), ("(2,3)", "x=3, y=2"),
    ("5", "5 = 3"), ("5", "x = 3 = 5"), ("5", "3 \\approx 5"), ("\\frac{2}{3}", "0.666667"),
    ("\\pi", "3.14159265"), ("\\pi", "3.14"),
    ("\\sqrt{2}", "1.41421356"), ("(-\\infty,2]", "x < 2"), ("(-\\infty,2]", "x \\ge 2"),
    ("x \\le 2", "x < 2"),
    ("x \\le 2", "(-\\infty,2)"), ("1000", "1e4"), ("1e3", "1.2e3"), ("1\\times10^3", "1200"),
    ("0.5", "0.54"), ("0.5", "0.51"),
    ("0.3", "\\frac13"), ("3.14", "3.15"), ("3.14159", "3.14"),
    ("(1\\times10^{-20}, 2)", "(1\\times10^{-21}, 2)"),
    ("\\{10^{-20}, 1\\}", "\\{10^{-30}, 1\\}"), ("x = 10^{-20}", "x = 10^{-21}"),
    ("x = 10^{-20}", "10^{-21}"),
    ("\\begin{pmatrix} 10^{-20} & 1 \\end{pmatrix}",
     "\\begin{pmatrix} 10^{-21} & 1 \\end{pmatrix}"), ("10^{-20}x+1", "10^{-21}x+1"),
    ("10^{-20}x", "10^{-21}x"), ("[10^{-20}, 1)", "[10^{-21}, 1)"),
    ("x < 10^{-20}", "x < 10^{-21}"), ("2^{100}", "2^{100}+1"),
    ("10^{60}", "10^{60}+1"), ("10^{-20}", "0"), ("0", "10^{-20}"), ("0", "e^{-50}"),
    ("10\\text{ m/s}", "10\\text{ km/h}"),
    ("12\\text{ cm}^2", "12\\text{ cm}"), ("12\\text{ cm}^2", "12\\text{ cm}^3"),
    ("5\\text{ kg}", "5"),
    ("90^\\circ", "90\\text{ rad}"), ("\\$5", "5\\text{ euros}"), ("x > 2", "y > 2"),
    ("x=3", "y=3"), ("2, 3", "x = 2"),
    ("2", "\\pm 2"), ("3", "2 < 3"), ("1 < x \\le 2", "[1, 2]"),
    ("x < 1 \\text{ or } x > 2", "(1, 2)"), ("5", "1 = 2 = 5"),
    ("5", "5, 3 = 5"), ("5 m", "5 s"), ("0.333", "0.34"),
    ("\\frac{1}{3}", "x = \\frac{1}{2} \\approx 0.333"), ("50\\%", "5"),
    ("11_3", "4"), ("25^\\circ\\text{C}", "25^\\circ\\text{F}"),
    ("3\\text{ hours}", "3\\text{ minutes}"),
    ("5\\text{ bps}", "5\\text{ bp}"),  # no plural
    ("10^{50}", "\\sqrt{10^{100}+1}"), ("0", "e^{-1000}"), ("\\frac{22}{7}", "\\pi"),
    ("5", "3 \\equiv 5"), ("5", "3 \\simeq 5"), ("5", "5\\text{ or 6}"), ("5", "5\\text{ (not 6)}"),
    ("5", "5 or 6"),
    ("5", "5\\text{ or six}"),
    ("5", "5 \\pm 1"), ("5", "3 \\to 5"), ("5", "3 < 5"), ("\\{5, 6\\}", "\\{5, 3 = 6\\}"),
    ("5", "x=3 \\text{ and } x=5"),
    ("\\frac{x}{2^{99}}", "\\frac{x}{2^{98}}"), ("x + 0.0000001", "x + 0.0000004"),
    ("10^{-20} < x < 1", "10^{-21} < x < 1"),
]  # fmt: skip


def test_answers_that_are_the_same():
    assert [r.value for r in rewards(SAME)] == [1.0] * len(SAME)


def test_answers_that_are_not():
    assert [r.value for r in rewards(DIFFERENT)] == [0.0] * len(DIFFERENT)
    assert {r.parts["judged"] for r in rewards(DIFFERENT)} == {1.0}


def test_only_the_last_box_counts():
    contents = [
        "42",
        "\\boxed{42} or \\boxed{43}",
        "\\boxed{42",
        "",
        "\\boxed{43}, so \\boxed{42}",
        f"\\boxed{{{'0' * 2000}42}}",
    ]
    scores = mathematics.score(
        [task("42")] * len(contents), [{"content": content} for content in contents]
    )
    assert [score.value for score in scores] == [0, 0, 0, 0, 1, 0]
    assert [score.parts["answered"] for score in scores] == [0, 1, 0, 0, 1, 1]


HOSTILE = [
    "10^{10^{10^{10}}}",
    "\\prod_{k=1}^{10^8} k",
    "\\binom{10^9}{5 \\cdot 10^8}",
    "(" * 400 + "1" + ")" * 400,
]
HARMLESS = [
    "9**9**9**9", "\\frac{1}{0}", "__import__('os').getcwd()", "\x00", "\ud800", "\n\n",
    "\\frac{1}" * 100, "\\end{x}\\begin{y}",
    "\\char`\\\\",
]  # fmt: skip


def test_a_hostile_answer_costs_its_limit_and_nothing_else():
    """Even from a thread, where math-verify's own limits refuse to work."""
    pairs, found = [("42", box) for box in HOSTILE + HARMLESS] + [("42", "42")], []
    start = time.monotonic()
    thread = threading.Thread(target=lambda: found.extend(rewards(pairs)))
    thread.start()
    most = 0
    while thread.is_alive():
        most = max([most, *map(memory_of, psutil.Process().children(recursive=True))])
        thread.join(0.02)
    assert [r.value for r in found] == [0.0] * (len(pairs) - 1) + [1.0]
    assert sum(not r.parts["judged"] for r in found) >= 3, "the limits were met"
    assert all(r.parts.keys() == {"correct", "answered", "judged"} for r in found)
    assert most < math_judge.MEMORY_BYTES
    assert time.monotonic() - start < 10 * math_judge.CPU_SECONDS * len(HOSTILE)


def memory_of(process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def test_a_dead_judge_is_the_environments_fault_and_is_replaced(monkeypatch):
    judge = mathematics._Judge()
    judge._process.kill()
    judge._process.wait()
    idle = mathematics.queue.SimpleQueue()
    idle.put(judge)
    monkeypatch.setattr(mathematics, "_idle", idle)
    assert rewards([("42", "42")])[0].parts == {
        "correct": 0.0,
        "answered": 1.0,
        "judged": 0.0,
        "environment_error": 1.0,
    }
    assert rewards([("42", "42")])[0].value == 1


def test_references_that_cannot_be_used_are_refused(monkeypatch):
    mathematics.check([task(reference) for reference, _ in SAME])
    for answer in ("?", "", "\\frac{", "9^{9^{9^{9}}}", 42, None, "1" * 2000, "0" * 2000 + "1"):
        with pytest.raises(ValueError, match="task 'bad': .*answer"):
            mathematics.check([task("1"), task(answer, "bad")])
    monkeypatch.setattr(mathematics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="math-verify: pip install"):
        mathematics.check([task("1")])
