"""Rendered conversations, character for character.

golden/NAME.json holds arguments of `render`, golden/NAME.txt what the released chat_template.jinja
makes of them.
"""

import json
import pathlib

import pytest

from data.chat_template import encode, render
from tests.data.conversations import small_tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.json")))
def test_a_rendered_conversation_is_the_golden_text(tokenizer, name):
    arguments = json.loads((GOLDEN / f"{name}.json").read_bytes())
    golden = (GOLDEN / f"{name}.txt").read_bytes().decode()
    assert render(**arguments) == golden
    assert tokenizer.decode(encode(tokenizer, **arguments)) == golden


def test_every_golden_text_is_compared():
    names = {path.stem for path in GOLDEN.iterdir()}
    assert (
        names
        == {path.stem for path in GOLDEN.glob("*.json")}
        == {path.stem for path in GOLDEN.glob("*.txt")}
    )
    assert len(names) == 8
