"""Fill-in-the-middle loses nothing, at the asked rates, from its three seeds alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.fim import document_rng, fim_prompt, rearrange
from data.tokenizer import Tokenizer

TEXT = "def größe(self):\n    return 変数 + 12345  # 😀\n" * 3


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return Tokenizer.load(dataset)


def pieces_of(ids, tokenizer):
    """(format, prefix, middle, suffix) ids, read back from the sentinels."""
    prefix_id, middle_id, suffix_id = tokenizer.fim_ids
    ids = list(ids)
    assert ids[0] == prefix_id and [ids.count(i) for i in tokenizer.fim_ids] == [1, 1, 1]
    at_suffix, at_middle = ids.index(suffix_id), ids.index(middle_id)
    assert at_suffix < at_middle
    before, suffix, after = ids[1:at_suffix], ids[at_suffix + 1 : at_middle], ids[at_middle + 1 :]
    return ("spm", [], after, suffix) if at_suffix == 1 else ("psm", before, after, suffix)


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    level=st.sampled_from(["character", "token"]),
    psm_fraction=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_pieces_reassemble_to_the_document(tokenizer, text, level, psm_fraction, seed):
    ids = np.asarray(tokenizer.encode(text), np.int32)
    moved = rearrange(ids, tokenizer, document_rng(seed, 0, 0), 1.0, psm_fraction, level)
    assert moved.dtype == np.int32
    _, prefix, middle, suffix = pieces_of(moved, tokenizer)
    joined = [*prefix, *middle, *suffix]
    # In SPM `middle` is prefix and middle in one, so the same concatenation holds for both.
    assert tokenizer.decode(joined) == text
    if level == "token":
        assert joined == ids.tolist()


def test_format_is_psm_or_spm_as_asked(tokenizer):
    ids = np.asarray(tokenizer.encode(TEXT), np.int32)
    for level in ("character", "token"):
        for psm_fraction, expected in ((1.0, "psm"), (0.0, "spm")):
            found = {
                pieces_of(
                    rearrange(ids, tokenizer, document_rng(0, 0, i), 1.0, psm_fraction, level),
                    tokenizer,
                )[0]
                for i in range(20)
            }
            # A prefix of length zero makes PSM read as SPM.
            assert expected in found and (expected == "psm" or found == {"spm"})


def test_character_level_cuts_inside_tokens_and_token_level_does_not(tokenizer):
    ids = np.asarray(tokenizer.encode(TEXT), np.int32)
    joined = {"character": [], "token": []}
    for level, found in joined.items():
        for i in range(20):
            _, prefix, middle, suffix = pieces_of(
                rearrange(ids, tokenizer, document_rng(0, 0, i), 1.0, 1.0, level), tokenizer
            )
            found.append([*prefix, *middle, *suffix] == ids.tolist())
    assert all(joined["token"]) and not all(joined["character"])


def test_rates_are_those_of_the_config(tokenizer):
    ids = np.arange(50, dtype=np.int32)
    results = [
        rearrange(ids, tokenizer, document_rng(1, 0, i), 0.6, 0.3, "token") for i in range(3000)
    ]
    moved = [r for r in results if len(r) != len(ids)]
    assert all(np.array_equal(r, ids) for r in results if len(r) == len(ids))
    assert abs(len(moved) / 3000 - 0.6) < 0.04
    num_psm = sum(pieces_of(r, tokenizer)[0] == "psm" for r in moved)
    assert abs(num_psm / len(moved) - 0.3) < 0.05


def test_cuts_are_uniform_over_all_positions(tokenizer):
    ids = np.arange(4, dtype=np.int32)
    counts = np.zeros((5, 5))
    for i in range(5000):
        _, prefix, middle, _ = pieces_of_marked(
            rearrange(ids, tokenizer, document_rng(2, 0, i), 1.0, 1.0, "token"), tokenizer
        )
        counts[len(prefix), len(prefix) + len(middle)] += 1
    # Two independent uniform draws out of 0..4, sorted: 1/25 on the diagonal, 2/25 above it,
    # nothing below.
    expected = (2 * np.triu(np.ones((5, 5)), 1) + np.eye(5)) / 25
    np.testing.assert_allclose(counts / 5000, expected, atol=0.02)


def pieces_of_marked(ids, tokenizer):
    _, middle_id, suffix_id = tokenizer.fim_ids
    ids = list(ids)
    at_suffix, at_middle = ids.index(suffix_id), ids.index(middle_id)
    return "psm", ids[1:at_suffix], ids[at_middle + 1 :], ids[at_suffix + 1 : at_middle]


def test_randomness_is_of_seed_epoch_and_index_alone(tokenizer):
    ids = np.asarray(tokenizer.encode(TEXT), np.int32)

    def moved(seed, epoch, index):
        return rearrange(
            ids, tokenizer, document_rng(seed, epoch, index), 1.0, 0.5, "character"
        ).tolist()

    assert moved(1, 2, 3) == moved(1, 2, 3)
    assert (
        len({tuple(moved(*key)) for key in [(1, 2, 3), (1, 3, 3), (1, 2, 4), (2, 2, 3), (2, 1, 3)]})
        == 5
    )


def test_prompt_is_what_training_shows_before_the_middle(tokenizer):
    ids = fim_prompt(tokenizer, "def f(", "): pass")
    prefix_id, middle_id, suffix_id = tokenizer.fim_ids
    expected = [
        *tokenizer.start_ids,
        prefix_id,
        *tokenizer.encode("def f("),
        suffix_id,
        *tokenizer.encode("): pass"),
        middle_id,
    ]
    assert ids == expected


def test_unknown_level_is_named(tokenizer):
    with pytest.raises(ValueError, match="'word'.*character.*token"):
        rearrange(np.arange(3, dtype=np.int32), tokenizer, document_rng(0, 0, 0), 1.0, 1.0, "word")
