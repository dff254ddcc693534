"""The format of a turn, part by part, and the answer in its box."""

import pytest

from glm_jax.rewards.answer_format import boxed_answer, format_parts
from tests.data.conversations import RUN, small_tokenizer

ALL = {"readable", "thinking", "tool_calls", "ended", "boxed"}
CALL = "<tool_call>run\n<arg_key>code</arg_key>\n<arg_value>x</arg_value>\n</tool_call>"


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{\\frac{1}{2}} and more", "\\frac{1}{2}"),
        ("\\boxed{1}, no: \\boxed{ 2 }", "2"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{x : x > 0\\right.}", "\\left\\{x : x > 0\\right."),
        ("\\boxed{a \\\\}", "a \\\\"),
        ("\\boxed{a\\\\\\}b}", "a\\\\\\}b"),
        ("\\boxed{1", None),
        ("\\boxed{1\\}", None),
        ("\\boxed{ }", None),
        ("\\boxed 1", None),
        ("", None),
    ],
)
def test_the_answer_is_what_stands_in_the_last_box(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("\n<think>why</think>\n\\boxed{4}<|user|>", set()),
        ("<think></think>\\boxed{4}<|endoftext|>", set()),
        ("<think>why</think>4<|user|>", {"boxed"}),
        ("<think>\\boxed{4}</think>4<|user|>", {"boxed"}),
        ("<think>why</think>\\boxed{4<|user|>", {"boxed"}),
        ("<think>why</think>\\boxed{4}", {"ended"}),
        ("<think>why</think>\\boxed{4}<|observation|>", {"ended"}),
        ("<think>why</think>\\boxed{4}<|user|>\nthanks", {"readable", "ended"}),
        ("<think>why</think>\\boxed{4}<|user|><|user|>", {"readable"}),
        ("\\boxed{4}<|user|>", {"thinking"}),
        ("so <think>why</think>\\boxed{4}<|user|>", {"readable", "thinking"}),
        ("<think>why", {"readable", "thinking", "ended", "boxed"}),
        ("<think>why\\boxed{4}<|user|>", {"readable", "thinking", "boxed"}),
        ("<think>why</think>\\boxed{4}</think><|user|>", {"readable", "thinking"}),
        ("<think>why</think>\\boxed{4}<think>no</think><|user|>", {"readable", "thinking"}),
        (f"<think>why</think>\\boxed{{4}}{CALL}<|observation|>", set()),
        (f"<think>why</think>{CALL}{CALL}<|observation|>", {"boxed"}),
        (f"<think>why</think>{CALL}<|user|>", {"ended", "boxed"}),
        (f"<think>why</think>{CALL}\\boxed{{4}}<|observation|>", {"readable"}),
        (
            f"<think>why</think>\\boxed{{4}}{CALL[:-12]}<|observation|>",
            {"readable", "tool_calls", "ended"},
        ),
        (
            f"<think>why</think>\\boxed{{4}}{CALL.replace('run', 'walk')}<|observation|>",
            {"readable", "tool_calls", "ended"},
        ),
        ("", {"thinking", "ended", "boxed"}),
    ],
)
def test_each_part_fails_alone(tokenizer, text, lacks):
    parts = format_parts(
        tokenizer, tokenizer.encode(text, allow_special=True), [RUN], thinking=True
    )
    assert parts.keys() == ALL and set(parts.values()) <= {0.0, 1.0}
    assert {name for name, value in parts.items() if not value} == lacks


def test_with_thinking_off_there_must_be_no_reasoning(tokenizer):
    def thinks(text):
        return format_parts(tokenizer, tokenizer.encode(text, allow_special=True), thinking=False)[
            "thinking"
        ]

    assert [
        thinks("\n\\boxed{4}<|user|>"),
        thinks("<think></think>\\boxed{4}<|user|>"),
        thinks("\\boxed{4}</think>"),
    ] == [1, 0, 0]


def test_spelled_tags_are_text(tokenizer):
    ids = [
        *tokenizer.encode("<think>", True),
        *tokenizer.encode("</think>"),
        *tokenizer.encode("</think>", True),
    ]
    ids += [*tokenizer.encode("<tool_call>\\boxed{4}<|user|>"), *tokenizer.encode("<|user|>", True)]
    assert format_parts(tokenizer, ids, [RUN], thinking=True) == dict.fromkeys(ALL, 1.0)
