"""Constraints on what a request may write: JSON of a schema, tool calls in GLM's format, any
grammar. llguidance makes the masks.

Grammars are written in llguidance's Lark dialect, where `<[7]>` is the token with id 7. Free text
never matches a special token.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Literal

import llguidance
import numpy as np

from data import json_schema as schemas
from data.chat_messages import TemplateError, check_tools
from data.chat_template import STOP_TOKENS
from data.tokenizer import Tokenizer

TEXT = "/(.|\\n)*/"
# Otherwise a weak model may write white space for ever.
_JSON_SPACE = {"whitespace_pattern": r"[ \n]{0,16}"}
# as chat_template writes arguments
_TEMPLATE_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_RESOLVED_DEPTH = 16  # of references to references
# in front of what is constrained: none; `<think>`, text and `</think>`; text and `</think>`
Reasoning = Literal["", "whole", "rest"]
_TYPES = frozenset(("string", "number", "integer", "boolean", "null", "object", "array"))


class Grammar:
    """A `sampling.Constraint`: a compiled grammar, shared by all samples."""

    def __init__(self, tokenizer: Tokenizer, text: str):
        """text: a grammar in Lark. Raises ValueError with the library's message where it cannot be
        compiled.
        """
        self._matcher = llguidance.LLMatcher(_guidance_tokenizer(tokenizer), text, log_level=0)
        if self._matcher.get_error():
            raise ValueError(self._matcher.get_error().strip())

    def start(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy())


class GrammarState:
    """A `sampling.ConstraintState`."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return mask

    def accept(self, token: int):
        self._matcher.consume_token(token)
        self._check()

    def _check(self):
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error().strip())


def lark(tokenizer: Tokenizer, text: str) -> Grammar:
    """A grammar in llguidance's Lark dialect."""
    return Grammar(tokenizer, text)


def regex(tokenizer: Tokenizer, pattern: str) -> Grammar:
    """All of the output matches a regular expression (of Rust's regex crate, without
    look-around).
    """
    return Grammar(tokenizer, llguidance.LLMatcher.grammar_from_regex(pattern))


def json_schema(tokenizer: Tokenizer, schema: Mapping, *, reasoning: Reasoning = "") -> Grammar:
    """JSON of a schema. Raises ValueError for a schema that is invalid or uses what the library
    does not know.
    """
    if not isinstance(schema, Mapping):
        raise ValueError(f"a JSON schema must be an object, not {type(schema).__name__}")
    return Grammar(
        tokenizer, f"start: {_opening(tokenizer, reasoning)} {_json(schema, _JSON_SPACE)}\n"
    )


def json_object(tokenizer: Tokenizer, *, reasoning: Reasoning = "") -> Grammar:
    """Any JSON object."""
    return json_schema(tokenizer, {"type": "object"}, reasoning=reasoning)


def tool_call(
    tokenizer: Tokenizer,
    tools: Sequence[Mapping],
    name: str | None = None,
    *,
    reasoning: Reasoning = "",
    parallel: bool = True,
) -> Grammar:
    """One or more calls of the tools, or of the one named, as chat_template writes them and
    chat_output reads them.

    Arguments come in the schema's order; those declared only, the required ones always. A value is
    raw text where a string will do, else JSON of the parameter's schema. parallel: more than one
    call. Raises ValueError.
    """
    try:
        parameters = check_tools(tools)
    except TemplateError as error:
        raise ValueError(str(error)) from None
    if not parameters or (name is not None and name not in parameters):
        raise ValueError(
            f"tool {name!r} is none of the tools: {', '.join(parameters) or 'there are none'}"
        )
    terminals: list[str] = []
    calls = [
        _call(tokenizer, *item, terminals) for item in parameters.items() if name in (None, item[0])
    ]
    call = (
        f'"\\n"? {_token(tokenizer, "<tool_call>")} ({" | ".join(calls)})'
        f" {_token(tokenizer, '</tool_call>')}"
    )
    rules = [
        f"start: {_opening(tokenizer, reasoning)} call{'+' if parallel else ''}",
        f"call: {call}",
        *terminals,
    ]
    return Grammar(tokenizer, "\n".join(rules) + "\n")


def _call(tokenizer: Tokenizer, name: str, schema: Mapping, terminals: list[str]) -> str:
    """A call without its outer tags. Adds what it needs to the grammar's terminals."""
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    parts = [f"{_literal(name)} {_literal(chr(10))}"]
    for key in dict.fromkeys([*properties, *required]):
        tags = [
            _token(tokenizer, tag)
            for tag in ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
        ]
        value = _value(properties.get(key, {}), schema, terminals)
        argument = (
            f'({tags[0]} {_literal(key)} {tags[1]} "\\n" {tags[2]} ({value}) {tags[3]} "\\n")'
        )
        parts.append(argument if key in required else f"{argument}?")
    return f"({' '.join(parts)})"


def _value(schema, root: Mapping, terminals: list[str]) -> str:
    """An argument's text: strings raw, other values as JSON."""
    values, others = [], set()
    for form in _forms(schema, root, 0):
        if form.values is not None:
            values += [
                _literal(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False))
                for v in form.values
            ]
            continue
        if "string" in form.types:
            values.append(_text(form, terminals))
        others |= form.types - {"string"}
    if others and TEXT not in values:  # which would cover them
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        values.append(
            _json({"allOf": [schema, {"type": sorted(others)}], **definitions}, _TEMPLATE_SPACE)
        )
    if not values:
        raise ValueError(f"no value fits the schema {json.dumps(schema)}")
    return " | ".join(values)


@dataclasses.dataclass(frozen=True)
class _Form:
    """One alternative of a schema: JSON types, what is asked of a string (regexes that it matches
    whole), and the values of an enum.
    """

    types: frozenset[str]
    regexes: tuple[str, ...] = ()
    values: tuple | None = None

    def __and__(self, other: _Form) -> _Form:
        values = self.values
        if values is None or other.values is None:
            values = other.values if values is None else values
        else:
            values = tuple(v for v in values if v in other.values)
        types = self.types & other.types
        if values is not None:
            values = tuple(v for v in values if schemas.type_of(v) & types)
        return _Form(types, self.regexes + other.regexes, values)


def _forms(schema, root: Mapping, depth: int) -> list[_Form]:
    """The alternatives of a schema, with local references resolved."""
    if depth > _RESOLVED_DEPTH:
        raise ValueError("the references of a tool's schema go in a circle")
    if not isinstance(schema, Mapping):
        return [_Form(_TYPES)]
    parts = [[_own_form(schema)]]
    if "$ref" in schema:
        parts.append(_forms(_referred(schema["$ref"], root), root, depth + 1))
    parts += [_forms(part, root, depth + 1) for part in schema.get("allOf") or ()]
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            parts.append([form for part in schema[key] for form in _forms(part, root, depth + 1)])
    together = [functools.reduce(_Form.__and__, choice) for choice in itertools.product(*parts)]
    return [form for form in together if form.types]


def _own_form(schema: Mapping) -> _Form:
    """What a schema says itself, not by reference or combination."""
    named = schema.get("type", list(_TYPES))
    types = frozenset([named] if isinstance(named, str) else named)
    if unknown := types - _TYPES:
        raise ValueError(
            f"type {sorted(unknown)} of a JSON schema is unknown; valid:"
            f" {', '.join(sorted(_TYPES))}"
        )
    types |= {"integer"} if "number" in types else set()
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    regexes = [f"(.|\\n){{{least},{most}}}"] if least or most != "" else []
    if "pattern" in schema:
        pattern = schema["pattern"]
        before = "" if pattern.startswith("^") else "(.|\\n)*"
        after = "" if pattern.endswith("$") else "(.|\\n)*"
        regexes.append(
            before
            + f"({llguidance.regex_to_lark(pattern.removeprefix('^').removesuffix('$'), 'dw')})"
            + after
        )
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    form = _Form(types, tuple(regexes))
    return form if values is None else form & _Form(_TYPES, (), tuple(values))


def _referred(reference, root: Mapping):
    found = schemas.referred(root, reference)
    if found is None:
        raise ValueError(
            f"$ref {reference!r} of a tool's schema leads nowhere; only references within it are"
            " followed"
        )
    return found


def _text(form: _Form, terminals: list[str]) -> str:
    if not form.regexes:
        return TEXT
    terminals.append(f"TEXT_{len(terminals)}: {' & '.join(f'/{regex}/' for regex in form.regexes)}")
    return f"TEXT_{len(terminals) - 1}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Mapping, options: Mapping) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _token(tokenizer: Tokenizer, name: str) -> str:
    return f"<[{tokenizer.special(name)}]>"


def _opening(tokenizer: Tokenizer, reasoning: Reasoning) -> str:
    rest = f'{TEXT} {_token(tokenizer, "</think>")} "\\n"?'
    return {"": '"\\n"?', "whole": f'"\\n"? {_token(tokenizer, "<think>")} {rest}', "rest": rest}[
        reasoning
    ]


@functools.lru_cache(maxsize=4)
def _guidance_tokenizer(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """Takes a second with a vocabulary of GLM's size."""
    spec = json.loads(tokenizer.to_json())
    # Released files do not flag `<think>` and the tool tags; unflagged they would match text that
    # spells them.
    for token in spec["added_tokens"]:
        token["special"] = True
    stops = [tokenizer.special(name) for name in STOP_TOKENS]
    return llguidance.LLTokenizer(json.dumps(spec), n_vocab=tokenizer.vocab_size, eos_token=stops)
