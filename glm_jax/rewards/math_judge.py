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
import resource
import signal
import sys

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
TARGETS = (LatexExtractionConfig(boxed_match_priority=0),)


def is_same(reference: str, answer: str) -> bool:
    """Both are LaTeX. False where math-verify cannot read one of them."""
    # Without limits of its own, which are signals of Python's and stop no C code.
    read = [parse(f"\\boxed{{{text}}}", TARGETS, fallback_mode="no_fallback", parsing_timeout=None) for text in (reference, answer)]
    return verify(*read, timeout_seconds=None)


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
