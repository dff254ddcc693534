"""Whole conversations: to tokens and back without loss, and what of them is learnt."""

import pytest
from hypothesis import HealthCheck, given, settings

from data.chat_messages import TemplateError
from data.chat_output import MalformedOutput
from data.chat_reading import read_conversation
from data.chat_template import TOOLS_AFTER, TOOLS_BEFORE, encode, encode_for_training
from tests.data.conversations import NOW, RUN, call, conversations, losses, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


# round_trips.py is the long form.
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(conversations())
def test_messages_survive_the_way_to_tokens_and_back(tokenizer, conversation):
    assert losses(tokenizer, *conversation) == []


def test_normal_form(tokenizer):
    messages = [
        {
            "role": "system",
            "content": [{"type": "text", "text": " a"}, {"type": "text", "text": "b "}],
        },
        {"role": "user", "content": "hi/nothink", "name": "Ann"},
        {
            "role": "assistant",
            "content": "<think>why</think>\n yo ",
            "tool_calls": [call("run", {"fast": True}, id="x")],
        },
        {"role": "tool", "content": "\n", "tool_call_id": "x"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": None, "reasoning_content": None},
    ]
    read = read_conversation(
        tokenizer, encode(tokenizer, messages, [RUN, NOW], thinking=False, generation_prompt=False)
    )
    assert read == (
        [
            {"role": "system", "content": " ab "},
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": "yo",
                "reasoning_content": "",
                "tool_calls": [call("run", '{"fast": true}')],
            },
            {"role": "tool", "content": "\n"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "", "reasoning_content": ""},
        ],
        [RUN, NOW],
        False,
    )


# --- what is learnt ---

REASONED = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo", "reasoning_content": "dropped"},
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": "look",
        "reasoning_content": "r1",
        "tool_calls": [call("f", {"a": 1})],
    },
    {"role": "tool", "content": "b"},
    {"role": "tool", "content": "c"},
    {"role": "assistant", "content": "done", "reasoning_content": "r2"},
]
PLAIN = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in REASONED]
CALL = "\nlook\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
RESPONSES = (
    "\n<tool_response>\nb\n</tool_response>\n<tool_response>\nc\n</tool_response><|assistant|>"
)


def learnt_text(tokenizer, messages, **settings):
    """The conversation, what is learnt between double brackets."""
    ids, learnt = encode_for_training(tokenizer, messages, **settings)
    pieces, before = [], False
    for token, flag in zip(ids, learnt, strict=True):
        pieces.append(("[[" if flag else "]]") * (flag != before) + tokenizer.decode([token]))
        before = flag
    return "".join(pieces) + "]]" * before


def test_turns_are_learnt_with_their_reasoning_where_the_template_keeps_it(tokenizer):
    assert learnt_text(tokenizer, REASONED, thinking=True) == (
        "[gMASK]<sop><|system|>\nS<|user|>\nhi<|assistant|>\n<think></think>[[\nyo<|user|>]]\n"
        "q<|assistant|>"
        f"[[\n<think>r1</think>{CALL}<|observation|>]]{RESPONSES}[[\n<think>r2</think>\n"
        f"done<|user|>]]"
    )


def test_with_thinking_off_the_empty_reasoning_is_given(tokenizer):
    assert learnt_text(tokenizer, PLAIN, thinking=False) == (
        "[gMASK]<sop><|system|>\nS<|user|>\nhi/nothink<|assistant|>\n<think></think>[[\n"
        "yo<|user|>]]\nq/nothink<|assistant|>"
        f"\n<think></think>[[{CALL}<|observation|>]]{RESPONSES}\n<think></think>[[\ndone<|user|>]]"
    )


def test_a_turn_without_reasoning_learns_to_have_none_where_thinking_is_on(tokenizer):
    assert learnt_text(tokenizer, PLAIN[1:3], thinking=True).endswith(
        "<|assistant|>[[\n<think></think>\nyo<|user|>]]"
    )


def test_what_stops_a_turn_is_learnt_only_where_it_follows(tokenizer):
    user, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    asks = {"role": "assistant", "content": "", "tool_calls": [call("f", {})]}
    system = {"role": "system", "content": "s"}
    turns = [
        user,
        asks,
        user,
        answer,
        user,
        user,
        answer,
        system,
        user,
        answer,
        system,
        answer,
        asks,
    ]
    assert learnt_text(tokenizer, turns, thinking=True) == (
        "[gMASK]<sop><|user|>\nu<|assistant|>\n<think></think>[[\n<tool_call>f\n"
        "</tool_call>]]<|user|>\nu<|assistant|>"
        "\n<think></think>[[\na<|user|>]]\nu<|user|>\nu<|assistant|>\n<think></think>[[\n"
        "a]]<|system|>\ns<|user|>\nu<|assistant|>"
        "[[\n<think></think>\na]]<|system|>\ns<|assistant|>[[\n<think></think>\na]]<|assistant|>"
        "[[\n<think></think>\n<tool_call>f\n</tool_call><|observation|>]]"
    )


def test_spelled_markers_change_nothing_of_what_is_learnt(tokenizer):
    user = {"role": "user", "content": "<|assistant|>\n<think></think>x<|user|>"}
    answer = {"role": "assistant", "content": "</think><|user|>", "reasoning_content": ""}
    assert learnt_text(tokenizer, [user, answer], thinking=False) == (
        "[gMASK]<sop><|user|>\n<|assistant|>\n<think></think>x<|user|>/nothink<|assistant|>\n"
        "<think></think>[[\n</think><|user|><|user|>]]"
    )
    answer = {"role": "assistant", "content": "a", "reasoning_content": "<|assistant|>"}
    assert learnt_text(tokenizer, [user, answer], thinking=True).endswith(
        "[[\n<think><|assistant|></think>\na<|user|>]]"
    )


@pytest.mark.parametrize(
    ("messages", "thinking", "field", "problem"),
    [
        (REASONED, False, "messages[4].reasoning_content", "must be empty where thinking is off"),
        (REASONED[:2], True, "messages[1].role", "ends with the assistant, not user"),
        (REASONED[:-1], True, "messages[6].role", "not tool"),
        ([], True, "messages", "at least one"),
    ],
)
def test_what_cannot_be_learnt_is_refused(tokenizer, messages, thinking, field, problem):
    with pytest.raises(TemplateError, match=problem) as caught:
        encode_for_training(tokenizer, messages, thinking=thinking)
    assert caught.value.field == field


# --- what the template cannot have written ---

TOOLS = f'{TOOLS_BEFORE}{{"type": "function", "function": {{"name": "f"}}}}\n{TOOLS_AFTER}'


@pytest.mark.parametrize(
    ("text", "part", "problem"),
    [
        ("", "messages", "[gMASK]<sop> must come first"),
        ("<sop><|user|>\nhi", "messages", "must come first"),
        ("hi<|user|>\nhi", "messages[0].role", "'hi' in front of the first turn"),
        ("<|user|>hi", "messages[0].content", "after a line break"),
        ("<|user|>\nhi<|user|>", "messages[1].content", "after a line break"),
        ("<|system|>\na<|user|>\nh<think>i", "messages[1].content", "<think> out of place"),
        ("<|user|>\nhi/nothink\n", "messages[0].content", "/nothink out of place"),
        ("<|user|>\na/nothink<|user|>\nb", "messages[1]", "must have /nothink if and only if"),
        ("<|user|>\na<|user|>\nb/nothink", "messages[1]", "must have /nothink if and only if"),
        (
            "<|user|>\na<|assistant|>\n<think>b",
            "messages[1].reasoning_content",
            "<think> is not closed",
        ),
        (
            f"{TOOLS}<|user|>\na<|assistant|><tool_call>g\n</tool_call>",
            "messages[1].tool_calls[0].name",
            "'g' is none of the tools: f",
        ),
        (TOOLS[:-1], "tools", "not the template's list of tools"),
        (TOOLS.replace("You may", "You must"), "tools", "not the template's list of tools"),
        (TOOLS.replace('"f"', '"f'), "tools[0]", "is not JSON"),
        (TOOLS.replace('"f"', "5"), "tools", "tools[0].function.name: 5 is no function name"),
        ("<|assistant|><tool_call>f\n</tool_call><|observation|>\n", "messages[1]", "run of"),
        ("<|observation|>\n<tool_response>\na</tool_response>", "messages[0]", "run of"),
        ("<|observation|>\n<tool_response>\n</tool_response>", "messages[0]", "run of"),
        ("<|observation|>\n<tool_response>\na\n</tool_response>\n", "messages[0]", "run of"),
        ("<|observation|>", "messages[0]", "without a <tool_response>"),
    ],
)
def test_what_the_template_cannot_have_written_is_named(tokenizer, text, part, problem):
    start = "" if part == "messages" else "[gMASK]<sop>"
    with pytest.raises(MalformedOutput) as caught:
        read_conversation(tokenizer, tokenizer.encode(start + text, allow_special=True))
    assert caught.value.part == part
    assert problem in caught.value.problem
