"""The code of an answer: CommonMark's fenced blocks, and which of them is the solution."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import re
from collections.abc import Iterator

# A fence may stand in a quotation or a list item. An info string after backticks has none itself.
OPENING = re.compile(
    r"(?P<before>[ \t]*(?:(?:>|[-*+]|\d{1,9}[.)])["
    r" \t]+|>)*)(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)$"
)
PYTHON = re.compile(r"(?:i?py(?:thon)?[\d.]*|sage)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Block:
    language: str  # '': not said
    code: str

    @property
    def is_python(self) -> bool:
        return bool(PYTHON.fullmatch(self.language))


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of a text in their order; one that is not closed goes to the end.

    The indentation of the opening fence, or of the list item or quotation that it is in, is taken
    off every line. A block ends at the first fence that is as long and stands no further in than
    the opening one (code may hold fences of its own further in).
    """
    lines, blocks, number = re.split(r"\r\n|\n|\r", text), [], 0
    while number < len(lines):
        opening = OPENING.match(lines[number])
        number += 1
        if not opening:
            continue
        before, fence = opening["before"], opening["fence"]
        indent, quotes = len(before.expandtabs(4)), before.count(">")
        content, closing = [], re.compile(rf"[ \t]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$")
        while number < len(lines):
            line = _unquoted(lines[number], quotes)
            number += 1
            if closing.match(line) and len(line.expandtabs(4)) - len(
                line.expandtabs(4).lstrip()
            ) <= max(indent, 0):
                break
            content.append(_dedented(line, indent - (2 * quotes if quotes else 0)))
        else:
            # the end of the text is no line
            content = content[:-1] if content and not content[-1] else content
        blocks.append(Block(_language(opening["info"]), "".join(f"{line}\n" for line in content)))
    return blocks


def _language(info: str) -> str:
    """The first word of an info string, with or without the braces and the point of `{.python}`; ''
    where it is an attribute.
    """
    word = re.split(r"[\s,:;\]}]", info.strip().lstrip("{[ "))[0].removeprefix(".")
    return "" if "=" in word else word


def _unquoted(line: str, quotes: int) -> str:
    for _ in range(quotes):
        line = re.sub(r"^[ \t]{0,3}>[ ]?", "", line)
    return line


def _dedented(line: str, indent: int) -> str:
    """Without up to `indent` columns of white space."""
    if indent <= 0:
        return line
    stripped = line.lstrip(" \t")
    width = len(line[: len(line) - len(stripped)].expandtabs(4))
    return (
        " " * max(width - indent, 0) + stripped
        if width <= indent or "\t" in line[: len(line) - len(stripped)]
        else line[indent:]
    )


def solution(text: str, entry_point: str | None = None) -> str:
    """The code that answers a task: of several blocks the last that defines the entry point, else
    the last.

    Blocks of other languages do not count, and those said to be Python come before those that say
    nothing. What the chosen block uses and an earlier one defines (imports, helpers) is put in
    front of it. A text without fences is code itself.
    """
    found = fenced_blocks(text)
    blocks = [b for b in found if b.is_python or not b.language]
    if not blocks and entry_point is not None:  # labelled `code`, say
        blocks = [b for b in found if _parsed(b.code) and _defines(b.code, entry_point)]
    if not blocks:
        return text
    defining = []
    if entry_point is not None:
        defining = [i for i, b in enumerate(blocks) if _defines(b.code, entry_point)]
        defining = [i for i in defining if not _imports(blocks[i].code, entry_point)] or defining
    python = [i for i, b in enumerate(blocks) if b.is_python]
    chosen = (defining or python or [len(blocks) - 1])[-1]
    return (
        "".join(_needed(blocks[chosen].code, [b.code for b in blocks[:chosen]], entry_point))
        + blocks[chosen].code
    )


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Those of a module's top level, within `if`, `try` and `with` too."""
    for name in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, name, ()):
            if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                yield from _statements(child)
            else:
                yield child


def _imports(code: str, name: str) -> bool:
    """Whether all that binds the name is an import: a test or an example often begins so."""
    tree = _parsed(code)
    if tree is None:
        return False
    binding = [node for node in _statements(tree) if name in _names_of(ast.Module([node], []))]
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in binding)


def _names_of(tree: ast.Module) -> set[str]:
    """Names that the top level of a module binds."""
    names = set()
    for node in _statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            names |= {
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
    return names


def _defines(code: str, name: str) -> bool:
    tree = _parsed(code)
    if tree is not None:
        return name in _names_of(tree)
    return (
        re.search(
            rf"^\s*(?:(?:async\s+)?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=",
            code,
            re.MULTILINE,
        )
        is not None
    )


def _needed(code: str, earlier: list[str], entry_point: str | None) -> list[str]:
    """Of the earlier blocks those that define what the code uses and nobody else gives."""
    tree = _parsed(code)
    if tree is None:
        return []
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    missing, taken = used - _names_of(tree) - set(dir(builtins)), []
    for before in reversed(earlier):
        found = _parsed(before)
        if found is None:
            continue
        names = _names_of(found)
        if names & missing and entry_point not in names:
            taken.insert(0, before)
            inner = {
                n.id
                for n in ast.walk(found)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
            }
            missing = (missing - names) | (inner - names - set(dir(builtins)))
    return taken
