"""What grammars let through, token by token, against our own readers of the same text."""

import json

import numpy as np
import pytest

from data.chat_output import parse_tokens
from data.chat_template import encode
from glm_jax.infer import grammar
from tests.serve.serving import tiny_tokenizer

STRICT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"$ref": "#/$defs/Unit"},
        "zip": {"allOf": [{"$ref": "#/$defs/Text"}, {"pattern": "^[0-9]{5}$"}]},
        "where": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        "kind": {"const": "10"},
        "level": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "note": {"type": "string", "maxLength": 3},
    },
    "required": ["city", "unit", "level"],
    "$defs": {"Unit": {"enum": ["C", "F", 3]}, "Text": {"type": "string"}},
}


def tool(name: str, schema: dict) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("weather", TOOL), tool("now", {})]


def allowed(state) -> list[int]:
    bits = np.unpackbits(state.mask().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[: tiny_tokenizer().vocab_size]).tolist()


def follows(constraint, text: str, *, ends: bool = True) -> bool:
    """Whether the constraint lets the text through and, with `ends`, lets it end there; special
    tokens where they are spelled.
    """
    state = constraint.start()
    for token in tiny_tokenizer().encode(text, allow_special=True):
        if state.finished or token not in allowed(state):
            return False
        state.accept(token)
    return not ends or state.finished or tiny_tokenizer().eos_id in allowed(state)


def sampled(constraint, seed: int) -> list[int]:
    """Random allowed tokens to the end, special ones preferred, so that it comes."""
    state, rng, tokens = constraint.start(), np.random.default_rng(seed), []
    while not state.finished:
        choices = allowed(state)
        special = [t for t in choices if t >= tiny_tokenizer().special("<|endoftext|>")]
        tokens.append(int(rng.choice(special if special and rng.random() < 0.3 else choices)))
        state.accept(tokens[-1])
        assert len(tokens) < 2000
    return tokens


def call(name: str, *arguments: tuple[str, str]) -> str:
    inner = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in arguments)
    return f"\n<tool_call>{name}\n{inner}</tool_call>"


WEATHER = (("city", 'a\n"b" </arg'), ("unit", "C"), ("level", "null"))


@pytest.mark.parametrize(("text", "right"), [
    ('{"a": 1}', True), ('{"a":-12}', True), ('\n{ "a": 1\n}', True), ('{"a": 1.5}', False),
    ("{}", False), ('{"b": 1}', False),
    ('{"a": 1} x', False), ("<think>x</think>\n" '{"a": 1}', False),
    (f'{{"a":{" " * 40}1}}', False),
])  # fmt: skip
def test_json_of_a_schema(text, right):
    assert follows(grammar.json_schema(tiny_tokenizer(), STRICT), text) == right


def test_a_json_object_is_any_and_only_an_object():
    constraint = grammar.json_object(tiny_tokenizer())
    assert follows(constraint, '{"x": [1, {"ü": null}]}')
    assert not follows(constraint, "[1]", ends=False)


def test_reasoning_is_free_and_must_be_closed():
    constraint = grammar.json_schema(tiny_tokenizer(), STRICT, reasoning="whole")
    assert follows(constraint, '\n<think>\nanything: {"a"\n</think>\n{"a": 1}')
    assert follows(constraint, '<think></think>{"a": 1}')
    assert not follows(constraint, '{"a": 1}', ends=False)
    assert not follows(constraint, "<think>x<|user|>", ends=False)
    # the prompt has begun it
    rest = grammar.json_schema(tiny_tokenizer(), STRICT, reasoning="rest")
    assert follows(rest, ' and so</think>{"a": 1}')
    assert not follows(rest, '<think></think>{"a": 1}', ends=False)


@pytest.mark.parametrize(("text", "right"), [
    (call("weather", *WEATHER), True),
    (call("weather", *WEATHER) + call("now"), True),
    (call("now"), True),
    (call("weather", ("city", ""), ("days", "12"), ("unit", "3"), ("zip", "01234"),
          ("where", "[15, 2]"), ("kind", "10"),
          ("level", "7"), ("note", "ü変")), True),
    (call("weather", *WEATHER[:2]), False),  # a required one is missing
    (call("weather", *WEATHER, ("other", "1")), False),
    (call("weather", ("city", "x"), ("days", "x"), *WEATHER[1:]), False),
    (call("weather", ("city", "x"), ("unit", "K"), ("level", "1")), False),
    (call("weather", ("city", "x"), ("unit", "C"), ("zip", "123456"), ("level", "1")), False),
    (call("weather", ("city", "x"), ("unit", "C"), ("where", "[1]"), ("level", "1")), False),
    (call("weather", ("city", "x"), ("unit", "C"), ("level", '"1"')), False),
    (call("weather", *WEATHER, ("note", "four")), False),
    (call("other"), False), ("text" + call("now"), False), (call("now") + "text", False),
    ("", False),
])  # fmt: skip
def test_tool_calls_follow_their_schemas(text, right):
    assert follows(grammar.tool_call(tiny_tokenizer(), TOOLS), text) == right


def test_a_named_tool_and_a_single_call():
    assert not follows(grammar.tool_call(tiny_tokenizer(), TOOLS, "now"), call("weather", *WEATHER))
    alone = grammar.tool_call(tiny_tokenizer(), TOOLS, "now", parallel=False)
    assert follows(alone, call("now"))
    assert not follows(alone, call("now") * 2)


def test_what_the_template_writes_is_allowed_and_what_is_sampled_is_read_back():
    tokenizer = tiny_tokenizer()
    constraint = grammar.tool_call(tokenizer, TOOLS, "weather", reasoning="whole")
    arguments = {"city": "größer", "days": 2, "unit": "F", "where": [1, -2], "level": None}
    message = {
        "role": "assistant",
        "reasoning_content": "so",
        "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}],
    }
    messages = [{"role": "user", "content": "?"}]
    written = encode(tokenizer, [*messages, message], TOOLS, generation_prompt=False)[
        len(encode(tokenizer, messages, TOOLS)) :
    ]
    assert follows(constraint, tokenizer.decode(written))
    for seed in range(20):
        for one in parse_tokens(tokenizer, sampled(constraint, seed), TOOLS)["tool_calls"]:
            found = json.loads(one["function"]["arguments"])
            assert one["function"]["name"] == "weather"
            assert {"city", "unit", "level"} <= found.keys() <= TOOL["properties"].keys()
            assert type(found.get("days", 0)) is int
            assert len(found.get("where", "ab")) == 2


def test_regexes_and_grammars_and_samples_that_share_them():
    constraint = grammar.regex(tiny_tokenizer(), "[ab]{2}")
    first, second = constraint.start(), constraint.start()
    for token in tiny_tokenizer().encode("a"):
        first.accept(token)
    assert not first.finished
    assert len(allowed(first)) == len(allowed(second)) == 2
    assert follows(constraint, "ab")
    assert follows(grammar.lark(tiny_tokenizer(), 'start: "x" | "y"'), "y")


@pytest.mark.parametrize(("make", "message"), [
    (lambda t: grammar.json_schema(t, {"type": "bogus"}), "bogus"),
    (lambda t: grammar.json_schema(t, {"$ref": "#/x"}), "does not exist"),
    (lambda t: grammar.json_schema(t, [1]), "must be an object, not list"),
    (lambda t: grammar.regex(t, "["), "unclosed character class"),
    (lambda t: grammar.lark(t, "start: other"), "other"),
    (lambda t: grammar.tool_call(t, TOOLS, "nobody"),
     "'nobody' is none of the tools: weather, now"),
    (lambda t: grammar.tool_call(t, [], None), "there are none"),
    (lambda t: grammar.tool_call(t, [{"type": "x"}]), r"tools\[0\].type"),
    (lambda t: grammar.tool_call(t, [tool("f", {"properties": {"a": {"$ref": "#/$defs/b"}}})]),
     "leads nowhere"),
    (lambda t: grammar.tool_call(t, [tool("f", {"properties": {"a": {"$ref": "#/properties/a"}}})]),
     "circle"),
    (lambda t: grammar.tool_call(t, [tool("f", {"properties": {"a": {"type": "text"}}})]),
     "type .*text"),
    (lambda t: grammar.tool_call(t,
                                 [tool("f",
                                       {"properties": {"a": {"type": "string", "enum": [1]}}})]),
                                       "no value fits"),
])  # fmt: skip
def test_what_cannot_be_a_grammar_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_tokenizer())
