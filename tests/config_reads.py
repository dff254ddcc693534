"""Which field of which class the product reads, told by types: `loop.seed` read in one place says
nothing about `tasks.seed`.

An expression's class is what its annotation says; without one, what was assigned to the name, or
given for the parameter where the function is called.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
from collections.abc import Iterable, Iterator

# methods; a field that only its class's own checks read is not in use
OWN_CHECKS = ("__post_init__", "check")
MOST_STEPS = 8  # from an expression to an annotation


def fields_read(trees: Iterable[ast.Module]) -> set[tuple[str, str]]:
    """(class, field) of every attribute that is loaded from something whose class is known."""
    program = _Program(list(trees))
    return {
        (cls, node.attr)
        for node, scope in program.nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        for cls in program.classes_of(node.value, scope)
    }


@dataclasses.dataclass
class _Scope:
    """A function, or the top of a module or class. owner: the class that it stands in, or ''."""

    owner: str
    outer: _Scope | None = None
    callee: str = ""  # the name that it is called by: of __init__ the class's
    parameters: dict[str, ast.arg] = dataclasses.field(default_factory=dict)
    values: dict[str, list] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )


class _Program:
    def __init__(self, trees: list[ast.Module]):
        self.bases: dict[str, list[str]] = {}  # of every class
        self.annotated = collections.defaultdict(dict)  # class -> attribute -> annotation
        self.assigned = collections.defaultdict(list)  # (class, attribute) -> (value, scope)
        self.returns = collections.defaultdict(list)  # function -> annotations
        self.calls = collections.defaultdict(list)  # function or class -> (call, scope)
        self.nodes = [pair for tree in trees for pair in self._walk(tree, _Scope(""))]
        for node, scope in self.nodes:
            self._take(node, scope)

    def _walk(self, node, scope: _Scope) -> Iterator[tuple[ast.AST, _Scope]]:
        yield node, scope
        if isinstance(node, ast.ClassDef):
            scope = _Scope(node.name, scope)
        elif isinstance(node, ast.FunctionDef | ast.Lambda):
            name = getattr(node, "name", "")
            if scope.owner and name in OWN_CHECKS:
                return
            args = node.args
            arguments = [*args.posonlyargs, *args.args, *args.kwonlyargs]
            scope = _Scope(
                scope.owner,
                scope,
                scope.owner if name == "__init__" else name,
                {a.arg: a for a in arguments},
            )
        for child in ast.iter_child_nodes(node):
            yield from self._walk(child, scope)

    def _take(self, node, scope: _Scope):
        if isinstance(node, ast.ClassDef):
            self.bases[node.name] = [_last_name(base) for base in node.bases]
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            decorators = {_last_name(d) for d in node.decorator_list}
            if decorators & {"property", "cached_property"}:
                self.annotated[scope.owner][node.name] = node.returns
            self.returns[node.name].append(node.returns)
        elif isinstance(node, ast.AnnAssign) and scope.owner and not scope.callee:
            self.annotated[scope.owner][_last_name(node.target)] = node.annotation
        elif isinstance(node, ast.Call):
            names = [_last_name(node.func)]
            if names == ["__init__"]:  # of super()
                names = self.bases.get(scope.owner, [])
            for name in names:
                self.calls[name].append((node, scope))
        for target, value in _assignments(node):
            if isinstance(target, ast.Name):
                scope.values[target.id].append(value)
            elif isinstance(target, ast.Attribute) and _last_name(target.value) == "self":
                self.assigned[scope.owner, target.attr].append((value, scope))

    def classes_of(self, node, scope: _Scope, steps: int = MOST_STEPS) -> set[str]:
        """Names of the classes that an expression may be of; empty where nothing says so."""
        found, again = set(), lambda n: self.classes_of(n, scope, steps - 1)
        if steps == 0:
            pass
        elif isinstance(node, ast.Name):
            found = self._of_name(node.id, scope, steps)
        elif isinstance(node, ast.Attribute):
            for cls in again(node.value):
                found |= self._of_attribute(cls, node.attr, steps)
        elif isinstance(node, ast.IfExp):
            found = again(node.body) | again(node.orelse)
        elif isinstance(node, ast.Call) and _last_name(node.func) == "replace" and node.args:
            found = again(node.args[0])
        elif isinstance(node, ast.Call):
            name = _last_name(node.func)
            found = {name} & self.bases.keys()
            found = found.union(*(self._named(a) for a in self.returns.get(name, ())))
        return found

    def _of_attribute(self, cls: str, attribute: str, steps: int) -> set[str]:
        found = set()
        for name in (cls, *self.bases.get(cls, ())):
            found |= self._named(self.annotated[name].get(attribute))
            for value, where in self.assigned.get((name, attribute), ()):
                found |= self.classes_of(value, where, steps - 1)
        return found

    def _of_name(self, name: str, scope: _Scope | None, steps: int) -> set[str]:
        while scope is not None:
            if name == "self" and name in scope.parameters:
                return {scope.owner}
            found = set()
            for value in scope.values.get(name, ()):
                found |= self.classes_of(value, scope, steps - 1)
            if name in scope.parameters:
                annotation = scope.parameters[name].annotation
                return found | (
                    self._given(name, scope, steps)
                    if annotation is None
                    else self._named(annotation)
                )
            if name in scope.values:
                return found
            scope = scope.outer
        return set()

    def _given(self, name: str, scope: _Scope, steps: int) -> set[str]:
        """What the calls of a function give for its parameter."""
        place = [p for p in scope.parameters if p != "self"].index(name)
        found = set()
        for call, where in self.calls.get(scope.callee, ()):
            given = [k.value for k in call.keywords if k.arg == name] or call.args[place:][:1]
            for value in given:
                found |= self.classes_of(value, where, steps - 1)
        return found

    def _named(self, annotation) -> set[str]:
        """The classes that an annotation names: of `X | None` X."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.BinOp):
            return self._named(annotation.left) | self._named(annotation.right)
        return {_last_name(annotation)} & self.bases.keys()


def _last_name(node) -> str:
    """`c` of `c` and of `a.b.c`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _assignments(node) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment, those of `a, b = x, y` one by one."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) or node.value is None:
        return
    for target in targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value
