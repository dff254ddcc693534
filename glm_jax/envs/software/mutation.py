"""Bugs to inject: small changes of Python, one at a time, as people make them by mistake."""

from __future__ import annotations

import ast
import dataclasses
import random
from collections.abc import Iterator

COMPARISONS = {
    ast.Eq: "!=", ast.NotEq: "==", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
ARITHMETIC = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "+",
    ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip

Change = tuple[int, int, int, str]  # line, first byte, end, new text


@dataclasses.dataclass(frozen=True)
class Mutation:
    """In the file, the text `before` of a line, counted from 1, becomes `after`."""

    file: str
    line: int
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        """Raises ValueError where the line is another."""
        lines = source.decode("utf-8").splitlines(keepends=True)
        found = lines[self.line - 1].rstrip("\r\n") if 0 < self.line <= len(lines) else ""
        if found != self.before:
            raise ValueError(
                f"line {self.line} of {self.file} is {found!r}, and must be {self.before!r}"
            )
        lines[self.line - 1] = self.after + lines[self.line - 1][len(found) :]
        return "".join(lines).encode("utf-8")


def compiles(source: bytes) -> bool:
    try:
        compile(source, "<source>", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def mutations(file: str, source: bytes) -> list[Mutation]:
    """All that are known for a file, in the order of its lines; none where it cannot be read.

    Only within functions: what runs at import breaks every test, and is found at once.
    """
    try:
        text = source.decode("utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return []
    lines, found = text.splitlines(), {}
    if text.count("\n") + (not text.endswith("\n")) != len(lines):
        return []  # a form feed or its like: lines would be counted in two ways
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    for function in functions:
        for statement in function.body:
            for node in ast.walk(statement):
                for line, start, end, new in _changes(node, lines):
                    # ast counts bytes
                    before = lines[line - 1].encode("utf-8")
                    after = before[:start] + new.encode("utf-8") + before[end:]
                    change = Mutation(file, line, before.decode("utf-8"), after.decode("utf-8"))
                    if change.before != change.after:
                        found[line, start, new] = change
    return [found[key] for key in sorted(found)]


def sample(file: str, source: bytes, seed: int) -> list[Mutation]:
    """At most one for each line, in a random order."""
    rng = random.Random(f"{seed} {file}")
    found = mutations(file, source)
    rng.shuffle(found)
    return list({change.line: change for change in found}.values())


def _changes(node: ast.AST, lines: list[str]) -> Iterator[Change]:
    """What can be changed at a node, within one line."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from _between(node.left, node.comparators[0], COMPARISONS[type(node.ops[0])], lines)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield from _between(node.left, node.right, ARITHMETIC[type(node.op)], lines)
    elif isinstance(node, ast.BoolOp):
        new = "or" if isinstance(node.op, ast.And) else "and"
        yield from _between(node.values[0], node.values[1], new, lines)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _whole(node, node.operand, "{}", lines)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield from _whole(node, node, repr(value), lines)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield from _whole(node.test, node.test, "not ({})", lines)
    elif isinstance(node, ast.Return) and node.value is not None:
        yield from _whole(node.value, node.value, "None", lines)
    elif isinstance(node, ast.AugAssign) and type(node.op) in (ast.Add, ast.Sub):
        new = "-=" if isinstance(node.op, ast.Add) else "+="
        yield from _between(node.target, node.value, new, lines)
    elif isinstance(node, ast.Break | ast.Continue):
        new = "continue" if isinstance(node, ast.Break) else "break"
        yield node.lineno, node.col_offset, node.col_offset + len(ast.unparse(node)), new


def _between(left: ast.expr, right: ast.expr, new: str, lines: list[str]) -> Iterator[Change]:
    """The operator between two operands, and the brackets around them with it."""
    assert left.end_col_offset is not None, "ast.parse gives it"
    if left.end_lineno == right.lineno:
        start, end = left.end_col_offset, right.col_offset
        old = lines[right.lineno - 1].encode("utf-8")[start:end].decode("utf-8")
        closing, opening = ")" * old.count(")"), "(" * old.count("(")
        yield right.lineno, start, end, f"{closing} {new} {opening}"


def _whole(node: ast.expr, part: ast.expr, pattern: str, lines: list[str]) -> Iterator[Change]:
    """The text of a node, made anew with that of a part of it."""
    assert node.end_col_offset is not None, "ast.parse gives it"
    if node.lineno == node.end_lineno:
        line = lines[node.lineno - 1].encode("utf-8")
        text = line[part.col_offset : part.end_col_offset].decode("utf-8")
        yield node.lineno, node.col_offset, node.end_col_offset, pattern.format(text)
