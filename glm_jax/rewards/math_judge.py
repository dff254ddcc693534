"""Says whether two mathematical answers are the same, in a process of its own;
`glm_jax.rewards.mathematics` starts it and asks.

A question is one line of JSON, [reference, answer], and its verdict one line: same, different or
failed. As `10^{10^{10^{10}}}` or a hard simplification ends in C code that nothing interrupts,
every question is judged by a child of its own, which the kernel kills once its CPU time is used up
and refuses memory beyond its limit. Nor can a child leave anything for the next question.
Run as a script: it imports nothing of ours, so that it starts in a second.
"""

from __future__ import annotations

import gc
import itertools
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

# Judged once before the first child: what the parser and sympy load and remember for them, no child
# has to work out again.
WARM_UP = (
    ("\\frac{\\sqrt{2}}{2}", "2^{-1/2}"), ("x^2 + \\frac{1}{2}", "0.5 + x^2"),
    ("\\{1, 2\\}", "2, 1"), ("x = 3", "3.0"),
    ("(1, 2]", "1 < x \\le 2"), ("(3, -4)", "\\left(3, -4\\right)"), ("50\\%", "0.5"),
    ("12\\pi", "37.7\\text{ cm}^2"),
    ("\\text{even}", "odd"), ("1{,}000", "1,000"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\binom{2}{1}"),
    ("\\sin(\\theta)", "\\infty"), ("3 + 4i", "4i + 3"),
)  # fmt: skip
TARGETS = (LatexExtractionConfig(boxed_match_priority=0),)
MAX_PARTS = 12  # parts of a list that a comma makes, and members of a chain

# --- what math-verify drops from the text ---

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)\{,\}(?=\d)|\\!", ""),
        (r"(?<=\d)\.(?=\s*$)", ""),
        (r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?!\w)", r"\1 \\cdot 10^{\2}"),
        (r"<=|≤", r"\\le "),
        (r">=|≥", r"\\ge "),
        (r"!=|≠", r"\\ne "),
        (r"\\(?:approx|simeq|doteq|triangleq|equiv(?!.*mod))(?![a-zA-Z])|[≈≡]", "="),
        (r"\\text\s*\{\s*(?:percent|per cent)\s*\}|(?<=\d)\s*percent\b", r"\\%"),
        (r"(?<![A-Za-z])(\d[0-9A-F]*)_\\text\{two\}", r"\1_2"),
    )
)
_BASE = re.compile(r"(?<![\w^\\])[0-9A-Z]*\d[0-9A-Z]*\)?_\{?(\d+)\}?")
_DECIMAL = re.compile(
    r"(?<![\d.])(\d*\.\d+|\d+)"
    r"(?:\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\d+)\s*\}|(\d)))?(?![\d.])"
)
_POWER = r"(?:\^\{?-?\d\}?)?"
_SPACE = r"(?:\s|~|\\[,;: ])*"
_WORDS = rf"\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{{[^{{}}]*\}}{_POWER}"
_UNIT = re.compile(
    rf"(?<=[\w)\]}}!°%])"
    rf"({_SPACE}(?:\^\{{?\\circ\}}?|°)?(?:{_SPACE}(?:{_WORDS}|\\cdot|/))*){_SPACE}$"
)
_PLAIN_UNIT = re.compile(
    rf"(?<=[\d}})°]){_SPACE}([A-Za-zµμΩ][A-Za-z²³ ]*{_POWER}(?:[/*·][A-Za-z²³ ]+{_POWER})*)\.?\s*$"
)
_HEDGE = re.compile(
    r"\\text\w*\s*\{[^{}]*(?:(?<![A-Za-z])\d|\?|\bnot\b|\b(?:or|and)\s+\w)[^{}]*\}"
    r"|\d\s*\b(?:or|not)\b"
)
_NAMED = re.compile(r"\s*([A-Za-z](?:_\w|_\{\w+\}|'*))\s*=(.+)", re.DOTALL)
_SPELLINGS = {
    "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "centimeter": "cm",
    "centimetre": "cm", "millimeter": "mm",
    "millimetre": "mm", "gram": "g", "kilogram": "kg", "milligram": "mg", "second": "s", "sec": "s",
    "minute": "min", "hour": "h",
    "hr": "h", "liter": "L", "litre": "L", "l": "L", "milliliter": "mL", "ml": "mL", "inches": "in",
    "inch": "in", "foot": "ft",
    "feet": "ft", "mile": "mi", "degree": "°", "deg": "°", "newton": "N", "joule": "J", "watt": "W",
    "volt": "V", "kelvin": "K",
    "pascal": "Pa", "hertz": "Hz", "mole": "mol", "dollar": "$", "mph": "mi/h", "kmh": "km/h",
    "kph": "km/h",
}  # fmt: skip


def _unit(text: str, value) -> str:
    r"""The unit at the end of a quantity, in one spelling; "" where it has none.

    `5 m` and `5m` have one where math-verify has dropped the letters; `5x` stays a product."""
    found = _UNIT.search(text)
    words = found and found.group(1)
    if not words or words.isspace():
        plain = _PLAIN_UNIT.search(text)
        if not plain or getattr(value, "free_symbols", ()):
            return "$" if text.lstrip().startswith(("\\$", "$")) else ""
        words = plain.group(1)
    words = re.sub(
        r"\\circ(?![a-zA-Z])|\\degree", "°", words.replace("^\\circ", "°").replace("^{\\circ}", "°")
    )
    words = re.sub(
        r"\\(?:text|textrm|mathrm|mbox|operatorname)(?![a-zA-Z])|\\[,;: ]|[{}~^.]", " ", words
    )
    words = re.sub(r"\\cdot|[*·]", " ", words.replace("²", "2").replace("³", "3")).replace(
        " per ", "/"
    )
    words = re.sub(r"\bsquare\s+(\w+)", r"\1 2", words)
    words = re.sub(r"\bcubic\s+(\w+)", r"\1 3", words)
    return "/".join("·".join(map(_spelling, part.split())) for part in words.split("/"))


def _spelling(word: str) -> str:
    word = word.lower() if len(word) > 3 else word
    single = word[:-1] if len(word) > 3 and word.endswith("s") else word
    return _SPELLINGS.get(word, _SPELLINGS.get(single, single))


def _split(text: str, marks: str) -> list[str]:
    """The parts between the marks that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character in marks and depth <= 0 and not parts[-1].endswith(("<", ">", "!", "\\")):
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _half_units(text: str) -> dict:
    """Of every decimal in the text of at least three significant digits, two where a power of ten
    stands with it: its value, and half a unit of its last digit.
    """
    halves = {}
    for digits, *powers in _DECIMAL.findall(text):
        power = sympy.Integer(10) ** int("".join(powers) or 0)
        if "." in digits and len(digits.replace(".", "").lstrip("0")) >= (2 if any(powers) else 3):
            halves[sympy.Rational(digits) * power] = (
                power / sympy.Integer(10) ** len(digits.partition(".")[2]) / 2
            )
    return halves


# --- comparison ---


def is_same(reference: str, answer: str) -> bool:
    """Both are LaTeX; the rules stand in `glm_jax.rewards.mathematics`. False where math-verify
    cannot read one of them.
    """
    for pattern, replacement in _REWRITES:
        reference, answer = pattern.sub(replacement, reference), pattern.sub(replacement, answer)
    bases = [[base for base in _BASE.findall(text) if base != "10"] for text in (reference, answer)]
    parts = [_split(text, ",;") for text in (reference, answer)]
    # math-verify reads no words after a number
    hedged = _HEDGE.search(answer) and not _HEDGE.search(reference)
    if hedged or bases[0] != bases[1] or max(map(len, parts)) > MAX_PARTS:
        return False
    names = [_named(of) for of in parts]
    if names[0] and names[1]:
        return names[0].keys() == names[1].keys() and all(
            is_same(value, names[1][name]) for name, value in names[0].items()
        )
    if names[0]:  # values without names are in the order of the reference, bare or as a point
        bare = (
            _split(answer.strip()[1:-1], ",;")
            if len(parts[1]) == 1 and answer.strip()[:1] == "("
            else parts[1]
        )
        return len(bare) == len(names[0]) and all(map(is_same, names[0].values(), bare))
    if names[1]:
        values = ",".join(names[1].values())
        answer = f"({values})" if reference.strip().startswith("(") else values
        parts[1] = _split(answer, ",;")
    references, answers = _read(reference), _read(answer)
    if (
        not references
        or not answers
        or not _units_match(parts[0], parts[1], references[-1], answers[-1])
    ):
        return False
    halves = _half_units(reference)
    return any(_equal(one, other, halves) for one in references for other in answers)


def _named(parts: list[str]) -> dict[str, str]:
    """{name: value} where the parts give values to several names."""
    found = [_NAMED.fullmatch(part) for part in parts]
    names = {match.group(1): match.group(2) for match in found if match}
    return names if len(names) == len(parts) > 1 else {}


def _read(text: str) -> list:
    """The values that the text gives: one, or the members of a chain of numbers, any of which may
    be compared; none where it cannot be read or a chain's members are not equal.
    """
    for part in _split(text, ",;"):
        members = _split(part, "=")
        if len(members) == 1:
            continue
        if len(members) > MAX_PARTS:
            return []
        values = [(member, _parsed(member)) for member in members]
        numbers = [(member, value) for member, value in values if _is_number(value)]
        for (one, first), (other, second) in itertools.pairwise(numbers):
            if not _equal(first, second, _half_units(one)) and not _equal(
                second, first, _half_units(other)
            ):
                return []
        if part == text and len(numbers) == len(members):
            return [value for _, value in numbers]
        if (
            part == text
            and len(numbers) == len(members) - 1
            and isinstance(values[0][1], sympy.Symbol)
        ):
            return [sympy.Eq(values[0][1], value, evaluate=False) for _, value in numbers]
    value = _parsed(text)
    return [] if value is None else [value]


def _parsed(text: str):
    """sympy's object with exact numbers; None where math-verify reads none."""
    # Without limits of its own, which are signals of Python's and stop no C code.
    read = parse(
        f"\\boxed{{{text}}}",
        TARGETS,
        fallback_mode="no_fallback",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]  # none; it says int
    )
    if not read:
        return None
    exact = {float(digits): sympy.Rational(digits) for digits, *_ in _DECIMAL.findall(text)}
    rational = lambda number: exact.get(float(number), sympy.Rational(str(number)))
    value = read[0]
    if isinstance(value, sympy.MatrixBase):
        return value.applyfunc(
            lambda entry: entry.xreplace(
                {number: rational(number) for number in entry.atoms(sympy.Float)}
            )
        )
    return value.xreplace({number: rational(number) for number in value.atoms(sympy.Float)})


def _units_match(reference_parts: list[str], answer_parts: list[str], reference, answer) -> bool:
    """A reference's unit must be the answer's; degrees and dollars may be left out."""
    asked = {_unit(part, reference) for part in reference_parts} - {""}
    given = {_unit(part, answer) for part in answer_parts} - {""}
    return not asked or given == asked or (not given and asked <= {"°", "$"})


def _is_number(value) -> bool:
    return (
        isinstance(value, sympy.Expr)
        and not isinstance(value, sympy.MatrixExpr)
        and value.is_number
        and value.is_finite is not False
    )


def _equal(one, other, halves: dict) -> bool:
    """halves: what the first one's decimals may be off, see `_half_units`. What is neither a number
    nor made of numbers is compared by math-verify.
    """
    if (
        isinstance(other, sympy.Eq)
        and _is_number(other.lhs)
        and not _equal(other.lhs, other.rhs, {})
    ):
        return False
    one, other = _right_sides(one, other)
    if _is_number(one) and _is_number(other):
        return _equal_numbers(one.doit(), other.doit(), halves)
    one, other = _solutions(one, other), _solutions(other, one)
    if isinstance(one, sympy.FiniteSet | sympy.Union) and type(one) is type(other):
        return _equal_sets(one, other, halves)
    pairs = _pairs(one, other)
    if pairs is not None:
        return all(_equal(first, second, halves) for first, second in pairs)
    return verify([one], [other], timeout_seconds=None)


def _right_sides(one, other) -> tuple:
    """The right sides of two equations for one name, and of an equation beside a value."""
    equations = [isinstance(value, sympy.Eq) for value in (one, other)]
    named = (
        all(equations) and one.lhs == other.lhs and isinstance(one.lhs, sympy.Symbol | sympy.Tuple)
    )
    if not named and all(equations):
        return one, other
    return one.rhs if equations[0] else one, other.rhs if equations[1] else other


def _pairs(one, other) -> list | None:
    """The corresponding entries of two intervals, tuples or matrices of one form; None for anything
    else.
    """
    both = lambda kind: isinstance(one, kind) and isinstance(other, kind)
    if both(sympy.Interval) and (one.left_open, one.right_open) == (
        other.left_open,
        other.right_open,
    ):
        return [(one.start, other.start), (one.end, other.end)]
    if both(sympy.Tuple) and len(one) == len(other):
        return list(zip(one, other, strict=True))
    if both(sympy.MatrixBase) and one.shape == other.shape:
        return list(zip(one.flat(), other.flat(), strict=True))
    return None


def _equal_numbers(one, other, halves: dict) -> bool:
    if one.is_Rational and other.is_Rational:
        difference = abs(one - other)
        if difference == 0:
            return True
    else:
        difference = abs((one - other).evalf(30, maxn=400))
        if not difference.is_number or not difference.is_finite:
            return False
        if (
            other.equals(0)
            if one.is_zero
            else difference <= sympy.Rational(1, 10**300) * abs(one.evalf(30))
        ):
            return True
    half = halves.get(abs(one))
    return half is not None and bool(difference <= half)


def _equal_sets(one, other, halves: dict) -> bool:
    """Members in any order; each has its own partner."""
    left = list(other.args)
    for member in one.args:
        partner = next(
            (place for place, candidate in enumerate(left) if _equal(member, candidate, halves)),
            None,
        )
        if partner is None:
            return False
        left.pop(partner)
    return not left


def _solutions(value, beside):
    """Inequalities in one variable as the set that solves them, where a set or inequalities in the
    same variable stand beside them.
    """
    logic = (sympy.core.relational.Relational, sympy.And, sympy.Or)
    comparable = isinstance(beside, sympy.Set) or (
        isinstance(beside, logic) and beside.free_symbols == value.free_symbols
    )
    if isinstance(value, sympy.FiniteSet) and value.args:
        parts = [part for part in value.args if isinstance(part, logic)]
        value = sympy.Or(*parts) if len(parts) == len(value.args) else value
    if (
        not isinstance(value, logic)
        or isinstance(value, sympy.Eq)
        or not comparable
        or len(value.free_symbols) != 1
    ):
        return value
    try:
        return value.as_set()
    except (NotImplementedError, TypeError, ValueError):
        return value


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
        resource.RLIMIT_CPU: CPU_SECONDS, resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0,
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
