"""Says whether two mathematical answers are the same, in a process of its own; `glm_jax.rewards.mathematics` starts it and asks.

A question is one line of JSON, [reference, answer], and its verdict one line: same, different or failed. As `10^{10^{10^{10}}}` or a
hard simplification ends in C code that nothing interrupts, every question is judged by a child of its own, which the kernel kills
once its CPU time is used up and refuses memory beyond its limit. Nor can a child leave anything behind for the next question.
Run as a script: it imports nothing of ours, so that it starts in a second.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import resource
import signal
import sys

import sympy
from math_verify import LatexExtractionConfig, parse, verify

CPU_SECONDS = 3
WALL_SECONDS = 60  # should a child wait for something
MEMORY_BYTES = 2 << 30  # address space; some 0.3 GiB of it are sympy
VERDICTS = {10: "same", 11: "different"}  # by a child's exit status; any other: failed
SAME, DIFFERENT = VERDICTS

# Judged once before the first child: what the parser and sympy load and remember for them, no child has to work out again.
WARM_UP = (
    ("\\frac{\\sqrt{2}}{2}", "2^{-1/2}"), ("x^2 + \\frac{1}{2}", "0.5 + x^2"), ("\\{1, 2\\}", "2, 1"), ("x = 3", "3.0"),
    ("(1, 2]", "1 < x \\le 2"), ("(3, -4)", "\\left(3, -4\\right)"), ("50\\%", "0.5"), ("12\\pi", "37.7\\text{ cm}^2"),
    ("\\text{even}", "odd"), ("1{,}000", "1,000"), ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\binom{2}{1}"),
    ("\\sin(\\theta)", "\\infty"), ("3 + 4i", "4i + 3"),
)  # fmt: skip
RELATIVE_ERROR = 1e-5
_BASE = re.compile(r"(?<=\d)_\{?(\d+)\}?")
_UNIT = re.compile(r"\d[\s~]*\\(?:text|mathrm)\{\s*([^{}]*?)\s*\}(\^\{?-?\d+\}?)?\s*$")
_SCIENTIFIC = re.compile(r"(\d)[eE]([+-]?\d+)\b")
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
TARGETS = (LatexExtractionConfig(boxed_match_priority=0),)


def is_same(reference: str, answer: str) -> bool:
    """Both are LaTeX. False where math-verify cannot read one of them.

    math-verify drops units and bases, takes the last member of a chain and compares numbers absolutely. So beyond its verdict, the
    bases must be equal; a reference with a unit needs that unit; a number in percent is not the bare one; a chain of numbers needs
    equal members; and two numbers must agree to RELATIVE_ERROR, however small they are.
    """
    reference, answer = (_SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text) for text in (reference, answer))
    if _BASE.findall(reference) != _BASE.findall(answer):
        return False
    unit = _UNIT.search(reference)
    if unit and (not (found := _UNIT.search(answer)) or found.groups() != unit.groups()):
        return False
    if ("\\%" in reference) != ("\\%" in answer) and is_same(reference.replace("\\%", ""), answer.replace("\\%", "")):
        return False
    members = answer.split("=")
    numbers = not any(_VARIABLE.search(member) for member in members)
    if numbers and not all(is_same(members[-1], member) for member in members[:-1]):
        return False
    # Without limits of its own, which are signals of Python's and stop no C code.
    read = [parse(f"\\boxed{{{text}}}", TARGETS, fallback_mode="no_fallback", parsing_timeout=None) for text in (reference, answer)]
    return verify(*read, timeout_seconds=None) and _agree(*read)


def _agree(reference: list, answer: list) -> bool:
    """False for two real numbers that differ relatively."""
    if not reference or not answer:
        return True
    one, other = reference[0], answer[0]
    if not all(isinstance(value, sympy.Expr) and value.is_number and value.is_real and value.is_finite for value in (one, other)):
        return True
    if one.is_Rational and other.is_Rational and one == other:
        return True
    one, other = one.evalf(30), other.evalf(30)
    return bool(abs(one - other) <= RELATIVE_ERROR * abs(one))


def judge(reference: str, answer: str) -> str:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _limit()
            status = SAME if is_same(reference, answer) else DIFFERENT
        finally:
            os._exit(status)
    return VERDICTS.get(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "failed")


def _limit():
    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS, resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WALL_SECONDS)


def main():
    logging.disable()  # math-verify warns that it has no limits
    for pair in WARM_UP:
        is_same(*pair)
    gc.freeze()  # a child that collected garbage would copy the whole heap
    print("ready", flush=True)
    for line in sys.stdin:
        print(judge(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
