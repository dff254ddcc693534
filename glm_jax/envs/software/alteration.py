"""Tests that must fail: what they say is equal is another value, or, where they say of nothing that
it is equal, they raise at their end.

An honest run of altered tests fails. Whoever makes tests pass without doing what they ask, by a
pytest that is patched, a result that equals everything or a report of his own, passes them too, and
is found out.
"""

from __future__ import annotations

import ast

EQUALITIES = {"assertEqual", "assertEquals", "assertListEqual", "assertDictEqual", "assert_equal",
              "assertTupleEqual", "assertSetEqual", "assertSequenceEqual", "eq_"}  # fmt: skip


def altered(source: bytes) -> bytes:
    """A file of tests, of which most that passed fail. Raises ValueError or
    SyntaxError for what is no Python.
    """
    tree = _Alteration().visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree)).encode("utf-8", "surrogatepass")


class _Alteration(ast.NodeTransformer):
    altered = 0  # equalities so far

    def visit_Assert(self, node: ast.Assert):
        for part in ast.walk(node.test):
            if isinstance(part, ast.Compare) and isinstance(part.ops[-1], ast.Eq):
                part.comparators[-1] = _other(part.comparators[-1])
                self.altered += 1
        return node

    def visit_Call(self, node: ast.Call):
        self.generic_visit(node)
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in EQUALITIES and len(node.args) >= 2:
            node.args[1] = _other(node.args[1])
            self.altered += 1
        return node

    def _function(self, node):
        before = self.altered
        self.generic_visit(node)
        # Not after an equality: what equals everything would fail here as an honest run does.
        if node.name.startswith("test") and self.altered == before:
            node.body += ast.parse("raise AssertionError('altered')").body
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function


def _other(node: ast.expr) -> ast.expr:
    """An expression of another value, and of the same type where it is written down."""
    more = ast.Constant(0)
    if isinstance(node, ast.List):
        return ast.List([*node.elts, more], ast.Load())
    if isinstance(node, ast.Tuple):
        return ast.Tuple([*node.elts, more], ast.Load())
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bool):
        return ast.Constant(not value)
    if isinstance(value, int | float):
        return ast.Constant(value + 1)
    if isinstance(value, str):
        return ast.Constant(value + "x")
    return ast.Tuple([node, more], ast.Load())
