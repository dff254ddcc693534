"""An argument's type comes from all of its schema: references, `allOf`, `anyOf`, `const`,
`enum`.
"""

import json

import pytest

from data.chat_output import parse

DEFS = {
    "S": {"type": "string", "enum": ["10", "12"]}, "N": {"type": "integer"},
    "T": {"$ref": "#/$defs/S"}, "C": {"$ref": "#/$defs/C"},
    "U": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}, "a/b": {"type": "string"},
    "L": {"allOf": [{"$ref": "#/$defs/L"}, {"type": "string"}]},
}  # fmt: skip
STRING = {"type": "string"}
ANY_ORDER = {"type": ["string", "integer"]}
# (schema, text, value)
CASES = [
    ({"$ref": "#/$defs/S"}, "12", "12"), ({"allOf": [STRING]}, "51234", "51234"),
    ({"allOf": [STRING]}, "01234", "01234"),
    ({"const": "5"}, "5", "5"), ({"const": 5}, "5", 5), ({"enum": ["10", "12"]}, "10", "10"),
    ({"enum": [10, 12]}, "10", 10),
    ({"$ref": "#/$defs/T"}, "12", "12"), ({"$ref": "#/definitions/S"}, "12", "12"),
    ({"$ref": "#/$defs/N"}, "12", 12),
    ({"$ref": "#/$defs/a~1b"}, "12", "12"), ({"$ref": "#/$defs/C"}, "12", 12),
    ({"$ref": "#/$defs/L"}, "12", "12"),
    ({"$ref": "#/$defs/none"}, "12", 12), ({"$ref": "http://x/y"}, "12", 12),
    ({"$ref": "#/$defs/U"}, "12", 12),
    ({"$ref": "#/$defs/U"}, "null", None),
    ({"anyOf": [{"$ref": "#/$defs/S"}, {"type": "null"}]}, "12", "12"),
    ({"anyOf": [{"$ref": "#/$defs/S"}, {"type": "null"}]}, "null", None),
    ({"oneOf": [STRING, {"type": "integer"}]}, "12", 12),
    ({"allOf": [ANY_ORDER, STRING]}, "12", "12"),
    ({"allOf": [ANY_ORDER, {"type": "number"}]}, "12", 12),
    ({"type": ["string", "null"]}, "12", "12"), ({"type": ["string", "null"]}, "null", None),
    (STRING, "true", "true"),
    ({"allOf": [{"$ref": "#/$defs/S"}], "default": "10"}, "12", "12"),
    ({"type": "string", "anyOf": [{"minLength": 1}]}, "7", "7"),
    ({"const": "true"}, "true", "true"), ({"const": None}, "null", None), ({}, "12", 12),
    (STRING, "[1]", "[1]"),
]  # fmt: skip


def argument(parameters, text):
    tools = [{"type": "function", "function": {"name": "o", "parameters": parameters}}]
    turn = (
        f"<think></think>\n<tool_call>o\n<arg_key>k</arg_key>\n<arg_value>{text}</arg_value>\n"
        f"</tool_call>"
    )
    arguments = parse(turn, tools)["tool_calls"][0]["function"]["arguments"]
    return (json.loads(arguments) if isinstance(arguments, str) else arguments)["k"]


@pytest.mark.parametrize(("schema", "text", "value"), CASES)
def test_an_argument_has_the_type_that_its_schema_says(schema, text, value):
    found = argument({"$defs": DEFS, "definitions": DEFS, "properties": {"k": schema}}, text)
    assert found == value and type(found) is type(value)


def test_the_parameters_may_be_referred_to():
    inner = {"A": {"properties": {"k": STRING}}}
    assert argument({"$defs": inner, "$ref": "#/$defs/A"}, "12") == "12"
    assert argument({"allOf": [{"properties": {"k": STRING}}]}, "12") == "12"


def test_a_schema_that_grows_with_every_reference_costs_little():
    many = {f"A{i}": {"anyOf": [{"$ref": f"#/$defs/A{i + 1}"}] * 2} for i in range(2000)}
    assert argument({"$defs": many, "properties": {"k": {"$ref": "#/$defs/A0"}}}, "12") == 12
