"""What a tool's JSON schema says of the types of its arguments: local references, `allOf`, `anyOf`,
`oneOf`, enums and constants.
"""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import Mapping, Sequence

MAX_DEPTH = 64  # a deeper schema says nothing about types


def argument(root: Mapping, key: str) -> dict:
    """The schema of an argument: all that the parameters' schema, what it refers to and its `allOf`
    say about it.
    """
    found, seen = [], []
    todo: list = [root]
    while todo:
        schema = todo.pop()
        if not isinstance(schema, Mapping) or any(schema is one for one in seen):
            continue
        seen.append(schema)
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and key in properties:
            found.append(properties[key])
        todo += schema["allOf"] if isinstance(schema.get("allOf"), list) else []
        todo.append(referred(root, schema.get("$ref")))
    return {"allOf": found}


def referred(root: Mapping, reference):
    """What a local reference (`#/$defs/Size`) points at in the parameters' schema; None where it
    points at nothing there.
    """
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for escaped in urllib.parse.unquote(reference[1:]).split("/")[1:]:
        part = escaped.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif (
            isinstance(found, list)
            and part.isascii()
            and part.isdigit()
            and int(part[:9]) < len(found)
        ):
            found = found[int(part[:9])]
        else:
            return None
    return found


def types(schema, root: Mapping) -> set[str] | None:
    """Names of the JSON types that a schema lets through; None: any, as far as can be told. root:
    what its references refer to.
    """
    return _types(schema, root, {})


def _types(
    schema, root: Mapping, known: dict[str, set[str] | None], depth: int = 0
) -> set[str] | None:
    """known: the types of the references met so far, so that each is followed once; one that leads
    back to itself says nothing.
    """
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return None
    demands = []
    if isinstance(schema.get("type"), (str, list)):
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        demands.append({name for name in names if isinstance(name, str)} or None)
    if isinstance(schema.get("enum"), list):
        demands.append(_either([type_of(one) for one in schema["enum"]]))
    if "const" in schema:
        demands.append(type_of(schema["const"]))
    if isinstance(schema.get("$ref"), str):
        reference = schema["$ref"]
        if reference not in known:
            known[reference] = None
            known[reference] = _types(referred(root, reference), root, known, depth + 1)
        demands.append(known[reference])
    if isinstance(schema.get("allOf"), list):
        demands += [_types(one, root, known, depth + 1) for one in schema["allOf"]]
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            demands.append(_either([_types(one, root, known, depth + 1) for one in schema[key]]))
    demands = [demand for demand in demands if demand is not None]
    return functools.reduce(_both, demands) or None if demands else None


def _either(several: Sequence[set[str] | None]) -> set[str] | None:
    """The types in any of the sets; None, any type, where one of them is None or all are empty."""
    found = set()
    for one in several:
        if one is None:
            return None
        found |= one
    return found or None


def _both(one: set[str], other: set[str]) -> set[str]:
    """The types in both sets; an integer is a number."""
    integers = (
        {"integer"}
        if {"integer", "number"} & one
        and {"integer", "number"} & other
        and "integer" in one | other
        else set()
    )
    return (one & other) | integers


def type_of(value) -> set[str]:
    """Names of the JSON types that a value is of."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return {"integer", "number"}
    names = {str: "string", float: "number", type(None): "null", dict: "object", list: "array"}
    return {names[type(value)]}
