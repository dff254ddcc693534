"""Conversations of all kinds for the chat template, their normal form, and whether the way there
and back loses anything.
"""

from __future__ import annotations

import json

from hypothesis import strategies as st

from data.chat_output import parse_tokens
from data.chat_reading import read_conversation
from data.chat_template import encode, encode_for_training
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

RUN = {
    "type": "function",
    "function": {
        "name": "run",
        "parameters": {
            "type": "object",
            "properties": {
                "code": {"type": "string"}, "options": {"type": "object"},
                "limits": {"type": "array"}, "fast": {"type": "boolean"},
                "note": {"type": ["string", "null"]}, "ratio": {"type": "number"},
                "level": {"anyOf": [{"type": "integer"}, {"enum": ["low", "high"]}]},
            },
        },
    },
}  # fmt: skip
NOW = {"type": "function", "function": {"name": "now"}}
# What a careless reader or writer would trip over.
FRAGMENTS = (
    *SPECIAL_TOKENS, "<tools>", "</tools>", "\n# Tools\n", "\n", "\r\n", " ", "\t", '"', "'", '"""',
    "{", "}", "[", "\\", "\\n", "\\u00e9",
    "null", "true", "1", "-0.0", "1e5", '{"a": [1]}', "def f(a, b='\"'):\n    return a", "é",
    "e\u0301", "変数", "👩\u200d💻", "\u2028",
    "\x00", "\ufeff", "\ufffd", "</arg_value>\n", "&lt;", "$x$", "```",
)  # fmt: skip


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


def small_tokenizer() -> Tokenizer:
    return train_tokenizer(
        ["def add(a, b):\n    return a + b\n", "größer 変数 😀 {}[]\"'\n"] * 20, 330
    )


# --- strategies ---

plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tame = plain.filter(lambda text: not any(name in text for name in SPECIAL_TOKENS))
nasty = plain | st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)


def values(strings):
    """JSON values."""
    return st.recursive(
        st.none() | st.booleans() | numbers | strings,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
        max_leaves=5,
    )


def run_arguments(strings):
    """Arguments of RUN, of the types that its schema names."""
    return st.fixed_dictionaries(
        {},
        optional={
            "code": strings, "options": st.dictionaries(strings, values(strings), max_size=3),
            "limits": st.lists(values(strings), max_size=3), "fast": st.booleans(),
            "note": st.none() | strings.filter(lambda s: s.strip() != "null"), "ratio": numbers,
            "level": st.integers() | st.sampled_from(["low", "high"]),
        },
    )  # fmt: skip


def messages_of(strings):
    """Assistant messages with calls of RUN, in normal form."""
    calls = st.lists(
        run_arguments(strings).map(lambda a: call("run", json.dumps(a, ensure_ascii=False))),
        max_size=3,
    )
    stripped = strings.map(str.strip)
    return st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "reasoning_content": stripped,
            "content": stripped,
            "tool_calls": calls,
        }
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _calls(offered: bool):
    # Without a schema a string that is JSON cannot be told from what it spells.
    untyped = st.dictionaries(
        nasty, values(nasty).filter(lambda v: not isinstance(v, str) or not _is_json(v)), max_size=3
    )
    if offered:
        functions = st.tuples(st.just("run"), run_arguments(nasty)) | st.tuples(
            st.just("now"), st.just({}) | untyped
        )
    else:
        functions = st.tuples(st.from_regex(r"[\w.:/-]{1,8}", fullmatch=True), untyped)
    as_text = st.booleans()
    written = st.tuples(functions, as_text).map(
        lambda f: call(f[0][0], json.dumps(f[0][1]) if f[1] else f[0][1])
    )
    return st.lists(written, max_size=3)


@st.composite
def conversations(draw):
    """(messages, tools, thinking) that the template takes, in whatever order of roles."""
    describe = st.builds(
        lambda tool, text: {**tool, "function": {**tool["function"], "description": text}},
        st.just(RUN),
        nasty,
    )
    tools = draw(st.just([]) | describe.map(lambda run: [run, NOW]))
    calls = _calls(bool(tools))
    content = nasty | st.lists(nasty.map(lambda text: {"type": "text", "text": text}), max_size=2)
    messages = []
    for role in draw(
        st.lists(
            st.sampled_from(["user", "assistant", "assistant", "system"]), min_size=1, max_size=7
        )
    ):
        if role != "assistant":
            messages.append({"role": role, "content": draw(content)})
            continue
        own = draw(calls)
        answer = {
            "role": role,
            "content": draw(content),
            "reasoning_content": draw(nasty),
            "tool_calls": own,
        }
        messages.append(answer)
        if own:
            messages += draw(
                st.lists(
                    st.builds(lambda text: {"role": "tool", "content": text}, content), max_size=3
                )
            )
    return messages, tools, draw(st.booleans())


# --- there and back ---


def normal_form(messages, thinking: bool) -> list[dict]:
    """What read_conversation promises of them, except that arguments are parsed and written once
    more, and calls are always there.
    """
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    found = []
    for i, message in enumerate(messages):
        text = message["content"] or ""
        text = text if isinstance(text, str) else "".join(part["text"] for part in text)
        if message["role"] == "assistant":
            reasoning = message["reasoning_content"].strip() if i > last_user else ""
            found.append(
                {"role": "assistant", "reasoning_content": reasoning, "content": text.strip()}
                | _normal_calls(message)
            )
        else:
            switched = message["role"] == "user" and not thinking
            found.append(
                {
                    "role": message["role"],
                    "content": text.removesuffix("/nothink") if switched else text,
                }
            )
    return found


def _normal_calls(message) -> dict:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    arguments = [
        json.loads(f["arguments"]) if isinstance(f["arguments"], str) else f["arguments"]
        for f in calls
    ]
    return {
        "tool_calls": [
            [f["name"], json.dumps(own)] for f, own in zip(calls, arguments, strict=True)
        ]
    }


def normal_message(message) -> dict:
    """A message that was read, in the form of `normal_form`."""
    return message | _normal_calls(message) if message["role"] == "assistant" else message


def losses(tokenizer: Tokenizer, messages, tools, thinking: bool) -> list[str]:
    """What goes wrong between messages -> tokens -> messages; for a finished conversation, also
    what is wrong with its training form.
    """
    expected = normal_form(messages, thinking)
    encoded = {
        "encode": encode(tokenizer, messages, tools, thinking=thinking, generation_prompt=False)
    }
    wrong = []
    may_train = messages[-1]["role"] == "assistant" and (
        thinking or not any(m.get("reasoning_content") for m in expected)
    )
    if may_train:
        encoded["encode_for_training"], learnt = encode_for_training(
            tokenizer, messages, tools, thinking=thinking
        )
        wrong += _wrong_in_training(
            tokenizer, encoded["encode_for_training"], learnt, (messages, tools, thinking), expected
        )
    for name, ids in encoded.items():
        read = read_conversation(tokenizer, ids)
        if [normal_message(m) for m in read.messages] != expected:
            wrong.append(f"{name}: {read.messages} of {messages}")
        if read.tools != tools or (
            read.thinking != thinking and any(m["role"] == "user" for m in messages)
        ):
            wrong.append(f"{name}: {read.tools}, {read.thinking} of {tools}, {thinking}")
    return wrong


def _wrong_in_training(tokenizer, ids, learnt, conversation, expected) -> list[str]:
    messages, tools, thinking = conversation
    wrong = []
    first = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1) + 1
    for i in range(max(first, 1), len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        prompt = encode(tokenizer, messages[:i], tools, thinking=thinking)
        if ids[: len(prompt)] != prompt or learnt[len(prompt) - 1]:
            wrong.append(f"training: the prompt of turn {i} of {messages}")
        length = [*learnt[len(prompt) :], False].index(False)
        answer = parse_tokens(tokenizer, ids[len(prompt) : len(prompt) + length], tools or None)
        if normal_message(answer) != expected[i]:
            wrong.append(f"training: {answer} is learnt as turn {i} of {messages}")
    return wrong
