"""A hundred malformed outputs: each error names the part of the message and what is wrong with
it.
"""

import pytest

from data.chat_output import MalformedOutput, parse, parse_tokens
from tests.data.conversations import RUN, small_tokenizer

CALL = "<tool_call>run\n</tool_call>"
# What is malformed, the part, and the problem or its beginning. A call of which only the inside is
# of interest stands in CALLS.
OUTPUTS = [
    # The reasoning does not end, ...
    ("<think>", "reasoning_content", "<think> is not closed"),
    ("\n<think>\n\n", "reasoning_content", "<think> is not closed"),
    ("<think>perhaps \\boxed{1}", "reasoning_content", "<think> is not closed"),
    ("<think>a</thin", "reasoning_content", "<think> is not closed"),
    ("<think>a<|user|>", "reasoning_content", "<think> is not closed"),
    ("<think>a<|observation|>", "reasoning_content", "<think> is not closed"),
    ("<think>a<|endoftext|>", "reasoning_content", "<think> is not closed"),
    # ... or holds what must not be in it.
    ("<think><think>a</think>", "reasoning_content", "<think> out of place"),
    ("<think>a\n<think>b</think></think>", "reasoning_content", "<think> out of place"),
    (f"<think>a{CALL}</think>", "reasoning_content", "<tool_call> out of place"),
    ("<think>a</tool_call></think>b", "reasoning_content", "</tool_call> out of place"),
    ("<think><arg_key>a</arg_key></think>", "reasoning_content", "<arg_key> out of place"),
    ("<think>a</arg_key></think>", "reasoning_content", "</arg_key> out of place"),
    ("<think>a<arg_value>b</think>", "reasoning_content", "<arg_value> out of place"),
    ("<think>a</arg_value></think>", "reasoning_content", "</arg_value> out of place"),
    ("<think>a<|user|>b</think>c", "reasoning_content", "<|user|> out of place"),
    ("<think>a<|observation|>b</think>c", "reasoning_content", "<|observation|> out of place"),
    ("<think>a<|endoftext|>b</think>c", "reasoning_content", "<|endoftext|> out of place"),
    ("<think>a<|assistant|>b</think>c", "reasoning_content", "<|assistant|> out of place"),
    ("<think>a<|system|>b</think>c", "reasoning_content", "<|system|> out of place"),
    ("<think>a[gMASK]<sop></think>b", "reasoning_content", "[gMASK] out of place"),
    ("<think>a<sop></think>b", "reasoning_content", "<sop> out of place"),
    # The content.
    ("</think>", "content", "</think> out of place"),
    ("a</think>b", "content", "</think> out of place"),
    ("<think>a</think>b</think>c", "content", "</think> out of place"),
    ("<think>a</think></think>b", "content", "</think> out of place"),
    ("<think>a</think>\n<think>b</think>c", "content", "<think> out of place"),
    ("a<think>b</think>c", "content", "<think> out of place"),
    ("<think>a</think>b</tool_call>", "content", "</tool_call> out of place"),
    (
        "run\n<arg_key>code</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
        "content",
        "<arg_key> out of place",
    ),
    ("a</arg_key>", "content", "</arg_key> out of place"),
    ("a<arg_value>b", "content", "<arg_value> out of place"),
    ("a</arg_value>", "content", "</arg_value> out of place"),
    ("a<|user|>b", "content", "<|user|> out of place"),
    ("a<|user|><|user|>", "content", "<|user|> out of place"),
    ("a<|endoftext|>\n", "content", "<|endoftext|> out of place"),
    ("a<|endoftext|><|user|>", "content", "<|endoftext|> out of place"),
    ("<think>a</think>b<|observation|>c", "content", "<|observation|> out of place"),
    ("<think>a</think>b<|user|>\nc<|assistant|>\nd", "content", "<|user|> out of place"),
    ("<|assistant|>\n<think>a</think>b", "content", "<|assistant|> out of place"),
    ("a<|system|>\nb", "content", "<|system|> out of place"),
    ("[gMASK]<sop>a", "content", "[gMASK] out of place"),
    ("a<sop>", "content", "<sop> out of place"),
    # Behind a call.
    (f"{CALL} and more", "content", "' and more' after a tool call"),
    (f"a\n{CALL}\nb\n{CALL}", "content", "'\\nb\\n' after a tool call"),
    (f"{CALL}<|begin_of_box|>4", "content", "'<|begin_of_box|>' after a tool call"),
    (f"{CALL}<think>a</think>", "content", "<think> out of place"),
    (f"<think>a{CALL.replace('run', 'b')}", "reasoning_content", "<tool_call> out of place"),
    (f"{CALL}\n</think>", "content", "</think> out of place"),
    (f"{CALL}</tool_call>", "content", "</tool_call> out of place"),
    (f"{CALL}\n<arg_key>code</arg_key>", "content", "<arg_key> out of place"),
    (
        f"{CALL}<|observation|>\n<tool_response>\n5\n</tool_response>",
        "content",
        "<|observation|> out of place",
    ),
    (f"{CALL}<|assistant|>", "content", "<|assistant|> out of place"),
    # A call that is cut off, ...
    ("<tool_call>", "tool_calls[0]", "is not closed"),
    ("<tool_call>ru", "tool_calls[0]", "is not closed"),
    ("a\n<tool_call>run\n", "tool_calls[0]", "is not closed"),
    ("<think>a</think>\n<tool_call>run\n<arg_key>", "tool_calls[0]", "is not closed"),
    ("<tool_call>run\n<arg_key>code</arg_key>\n", "tool_calls[0]", "is not closed"),
    ("<tool_call>run\n<arg_key>code</arg_key>\n<arg_value>x", "tool_calls[0]", "is not closed"),
    (
        "<tool_call>run\n<arg_key>code</arg_key>\n<arg_value>x</arg_value>\n",
        "tool_calls[0]",
        "is not closed",
    ),
    ("<tool_call>run\n<|observation|>", "tool_calls[0]", "is not closed"),
    ("<tool_call>run\n</tool_call", "tool_calls[0]", "is not closed"),
    (f"{CALL}\n<tool_call>run\n", "tool_calls[1]", "is not closed"),
    (f"a{CALL}{CALL}<tool_call>walk", "tool_calls[2]", "is not closed"),
    # ... or wrong behind a right one.
    (
        f"{CALL}\n<tool_call>walk\n</tool_call>",
        "tool_calls[1].name",
        "'walk' is none of the tools: run",
    ),
    (
        f"{CALL}<tool_call>run\n<arg_key>code</arg_key></tool_call>",
        "tool_calls[1]",
        "</tool_call> where <arg_value> should be",
    ),
]
# What stands between <tool_call> and </tool_call>.
CALLS = [
    ("walk\n", ".name", "'walk' is none of the tools: run"),
    ("\n", ".name", "'' is none of the tools: run"),
    ("<arg_key>code</arg_key>\n<arg_value>x</arg_value>\n", ".name",
     "'' is none of the tools: run"),
    ("Run\n", ".name", "'Run' is none of the tools: run"),
    ("run(code='x')\n", ".name", "\"run(code='x')\" is none of the tools: run"),
    ("run\ncode: x\n", ".name", "'run\\ncode: x' is none of the tools: run"),
    ('{"name": "run", "arguments": {}}\n', ".name",
     "'{\"name\": \"run\", \"arguments\": {}}' is none of the tools: run"),
    ("run<|assistant|>\n", ".name", "'run<|assistant|>' is none of the tools: run"),
    ("run\n<arg_value>x</arg_value>\n", "", "<arg_value> where <arg_key> should be"),
    ("run\n</arg_key>\n", "", "</arg_key> where <arg_key> should be"),
    ("run\n<tool_call>run\n", "", "<tool_call> where <arg_key> should be"),
    ("run\n<arg_key>code", "", "</tool_call> where </arg_key> should be"),
    ("run\n<arg_key>code<arg_value>x</arg_value>\n", "", "<arg_value> where </arg_key> should be"),
    ("run\n<arg_key>code<arg_key>", "", "<arg_key> where </arg_key> should be"),
    ("run\n<arg_key>code</arg_key>\n</arg_value>", "", "</arg_value> where <arg_value> should be"),
    ("run\n<arg_key>code</arg_key>\n<arg_value>x", "", "</tool_call> where </arg_value> should be"),
    ("run\n<arg_key>code</arg_key>\n<arg_value>x</arg_key>", "",
     "</arg_key> where </arg_value> should be"),
    ("run\n<arg_key>code</arg_key>\n<arg_value>x</arg_value>\n</arg_value>\n", "",
     "</arg_value> where <arg_key> should be"),
    ("run\n<arg_key>code</arg_key>=<arg_value>x</arg_value>\n", ".arguments.code",
     "'=' between the tags"),
    ("run\n<arg_key>code</arg_key>\n<arg_value>x</arg_value>,\n", ".arguments.code",
     "',' between the tags"),
    ("run\n" + "<arg_key>code</arg_key>\n<arg_value>x</arg_value>\n" * 2, ".arguments.code",
     "is given twice"),
    ("run\n<arg_key>fast</arg_key>\n<arg_value>yes</arg_value>\n", ".arguments.fast",
     "'yes' is no JSON of type boolean: Expecting value"),
    ("run\n<arg_key>fast</arg_key>\n<arg_value>True</arg_value>\n", ".arguments.fast",
     "'True' is no JSON of type boolean"),
    ("run\n<arg_key>fast</arg_key>\n<arg_value></arg_value>\n", ".arguments.fast",
     "'' is no JSON of type boolean"),
    ("run\n<arg_key>ratio</arg_key>\n<arg_value>NaN</arg_value>\n", ".arguments.ratio",
     "'NaN' is no JSON of type number: NaN is not JSON"),
    ("run\n<arg_key>ratio</arg_key>\n<arg_value>1,5</arg_value>\n", ".arguments.ratio",
     "'1,5' is no JSON of type number: Extra data"),
    ("run\n<arg_key>ratio</arg_key>\n<arg_value>-Infinity</arg_value>\n", ".arguments.ratio",
     "'-Infinity' is no JSON of type number"),
    ("run\n<arg_key>ratio</arg_key>\n<arg_value>1e999</arg_value>\n", ".arguments",
     "cannot be written as JSON"),
    ("run\n<arg_key>options</arg_key>\n<arg_value>{'a': 1}</arg_value>\n", ".arguments.options",
     '"{\'a\': 1}" is no JSON of type object'),
    ("run\n<arg_key>options</arg_key>\n<arg_value>{\"a\": 1</arg_value>\n", ".arguments.options",
     "'{\"a\": 1' is no JSON of type object"),
    ("run\n<arg_key>options</arg_key>\n<arg_value>{\"a\": NaN}</arg_value>\n", ".arguments.options",
     "'{\"a\": NaN}' is no JSON"),
    ("run\n<arg_key>limits</arg_key>\n<arg_value>[1,]</arg_value>\n", ".arguments.limits",
     "'[1,]' is no JSON of type array"),
    ("run\n<arg_key>limits</arg_key>\n<arg_value>1 2</arg_value>\n", ".arguments.limits",
     "'1 2' is no JSON of type array: Extra data"),
    ('run\n<arg_key>limits</arg_key>\n<arg_value>["\\ud800"]</arg_value>\n', ".arguments",
     "holds half of a surrogate pair"),
]  # fmt: skip
TABLE = OUTPUTS + [
    (f"<tool_call>{inside}</tool_call>", f"tool_calls[0]{part}", problem)
    for inside, part, problem in CALLS
]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def test_there_are_a_hundred_of_them():
    assert len({text for text, _, _ in TABLE}) == len(TABLE) == 100


@pytest.mark.parametrize(("text", "part", "problem"), TABLE)
def test_malformed_output_says_what_is_malformed(tokenizer, text, part, problem):
    reads = {
        "text": lambda: parse(text, [RUN]),
        "tokens": lambda: parse_tokens(tokenizer, tokenizer.encode(text, True), [RUN]),
    }
    for read in reads.values():
        with pytest.raises(MalformedOutput) as caught:
            read()
        assert caught.value.part == part
        assert caught.value.problem.startswith(problem)
        assert str(caught.value) == f"{part}: {caught.value.problem}"


def test_an_output_cut_anywhere_says_what_is_open(tokenizer):
    arguments = (
        "<arg_key>code</arg_key>\n<arg_value>x ="
        ' "ü"\n</arg_value>\n<arg_key>limits</arg_key>\n<arg_value>[1, 2]</arg_value>\n'
    )
    pieces = [  # text, and what is open once some of it is there
        ("\n", None), ("<think>größer?", "reasoning_content: <think> is not closed"),
        ("</think>\nI look.\n", None),
        (f"<tool_call>run\n{arguments}", "tool_calls[0]: is not closed"), ("</tool_call>\n", None),
        (f"<tool_call>run\n{arguments}", "tool_calls[1]: is not closed"), ("</tool_call>", None),
        ("<|observation|>", None),
    ]  # fmt: skip
    before, errors = [], []
    for text, problem in pieces:
        for token in tokenizer.encode(text, allow_special=True):
            before.append(token)
            if problem is None:
                assert parse_tokens(tokenizer, before, [RUN])["role"] == "assistant"
            else:
                with pytest.raises(MalformedOutput) as caught:
                    parse_tokens(tokenizer, before, [RUN])
                assert str(caught.value) == problem
                errors.append(problem)
    assert len(errors) > 80 and len(set(errors)) == 3
