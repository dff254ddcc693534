"""Lossless, and closed against text that spells special tokens."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

# Written out a second time, from docs/glm45.md, "Chat template": id offsets after the 151,329
# tokens of GLM's base vocabulary.
PUBLISHED_OFFSETS = {
    "<|endoftext|>": 0, "[gMASK]": 2, "<sop>": 4, "<|system|>": 6, "<|user|>": 7,
    "<|assistant|>": 8, "<|observation|>": 9,
    "<|begin_of_image|>": 10, "<|end_of_video|>": 13, "<|begin_of_audio|>": 14,
    "<|end_of_transcription|>": 17,
    "<|code_prefix|>": 18, "<|code_middle|>": 19, "<|code_suffix|>": 20, "<think>": 21,
    "</think>": 22, "<tool_call>": 23,
    "</tool_response>": 26, "<arg_key>": 27, "</arg_value>": 30, "/nothink": 31,
    "<|end_of_box|>": 33, "<|video|>": 35,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return Tokenizer.load(dataset)


def test_special_tokens_follow_the_base_in_published_order(tokenizer):
    assert len(SPECIAL_TOKENS) == 36
    base = tokenizer.vocab_size - 36
    assert {name: tokenizer.special(name) - base for name in PUBLISHED_OFFSETS} == PUBLISHED_OFFSETS
    assert tokenizer.eos_id == base
    assert tokenizer.start_ids == (base + 2, base + 4)
    assert tokenizer.fim_ids == (base + 18, base + 19, base + 20)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_encode_decode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[np.asarray(ids, int)].sum() == len(text.encode())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n    ", "x", "<|", "|>"])))
def test_text_that_spells_special_tokens_stays_text(tokenizer, pieces):
    text = "".join(pieces)
    ids = tokenizer.encode(text)
    assert all(i < tokenizer.vocab_size - 36 for i in ids)
    assert tokenizer.decode(ids) == text


def test_allow_special_turns_spelled_tokens_into_one_id(tokenizer):
    for name in SPECIAL_TOKENS:
        assert tokenizer.encode(name, allow_special=True) == [tokenizer.special(name)]
        assert tokenizer.decode([tokenizer.special(name)]) == name


def test_leading_space_is_neither_added_nor_lost(tokenizer):
    assert tokenizer.encode("return") != tokenizer.encode(" return")


def test_indentation_run_is_one_token(tokenizer):
    trained = train_tokenizer(["def f():\n        return x\n"] * 50, 400)
    assert len(trained.encode("        return")) == 2


def test_special_string_in_the_corpus_is_never_learnt_as_a_merge():
    trained = train_tokenizer(["x /nothink\n/nothink /nothink"] * 100, 600)
    assert trained.special("/nothink") == trained.vocab_size - 36 + 31
    assert trained.decode(trained.encode("/nothink")) == "/nothink"


def test_released_file_with_unflagged_added_tokens_keeps_text_as_text(tokenizer, tmp_path):
    # Released tokenizer.json files list `<think>` and the tool tags as added but not special.
    spec = json.loads(tokenizer.to_json())
    for token in spec["added_tokens"]:
        token["special"] = token["content"].startswith("<|")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    released = Tokenizer.load(tmp_path / "tokenizer.json")
    assert released.special("<think>") == tokenizer.special("<think>")
    assert released.encode("<think>") == tokenizer.encode("<think>")
    assert released.special("<think>") not in released.encode("a <think> b")


def test_hugging_face_tokenizers_read_our_file_alike(tokenizer, dataset):
    theirs = tokenizers.Tokenizer.from_file(str(dataset / "tokenizer.json"))
    text = "def größe(self):\n    return 変数 + 1"
    assert theirs.encode(text).ids == tokenizer.encode(text)


def test_errors_name_the_value_and_the_valid_ones(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"<\|usr\|>.*<\|user\|>"):
        tokenizer.special("<|usr|>")
    with pytest.raises(ValueError, match="291.*292"):
        train_tokenizer(["x"], 291)
    with pytest.raises(ValueError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="lacks the special tokens.*endoftext"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
