"""Text that comes in pieces is the text of the whole, in whole characters, and nothing of a stop
string.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.serve.text_stream import Detokenizer, TextStream

# Every byte; whole characters of several bytes; tokens that begin, end or cross characters; one
# that stands for nothing.
VOCABULARY = [bytes([b]) for b in range(256)] + [
    t if isinstance(t, bytes) else t.encode()
    for t in ("é", "€", "😀", "ab", "stop", "\ufffd", b"\xe2\x82", b"\x82\xacx", b"x\xf0\x9f", b"")
]
CHARACTERS = [0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, *range(256, len(VOCABULARY))]
ids = st.lists(
    st.integers(0, len(VOCABULARY) - 1)
    | st.sampled_from(CHARACTERS)
    | st.sampled_from([97, 98, 259]),
    max_size=25,
)
stop_strings = st.lists(
    st.sampled_from(["ab", "bab", "aba", "abab", "é€", "\ufffd\ufffd", "top", "😀a", "x"]),
    max_size=2,
).map(tuple)


def decode(tokens):
    return b"".join(VOCABULARY[t] for t in tokens).decode("utf-8", "replace")


@settings(deadline=None, max_examples=500)
@given(ids)
def test_parts_add_up_to_the_text_of_all_ids(tokens):
    detokenizer, text = Detokenizer(decode), ""
    for i, token in enumerate(tokens):
        text += "".join(detokenizer.push(token))
        assert decode(tokens[: i + 1]).startswith(text)
        assert decode(tokens).startswith(text), "took half a character for a broken one"
        assert len(detokenizer._ids) <= 4
    assert text + detokenizer.finish() == decode(tokens)


@settings(deadline=None, max_examples=500)
@given(ids, stop_strings)
def test_nothing_of_a_stop_string_comes_out(tokens, stops):
    stream, out = TextStream(decode, stops), []
    for i, token in enumerate(tokens):
        out += stream.push(token, -float(i))
        if stream.stopped:
            break
        known, shown = decode(tokens[: i + 1]).removesuffix("\ufffd"), "".join(t.text for t in out)
        assert not any(
            stop.startswith(known[start:]) for start in range(len(shown)) for stop in stops
        ), "a stop string may begin in it"
    else:
        out += stream.finish()
    shown, whole = "".join(t.text for t in out), decode(tokens)
    assert [t.id for t in out] == tokens[: len(out)]
    assert [t.logprob for t in out] == [-float(i) for i in range(len(out))]
    assert stream.stopped == any(stop in whole for stop in stops)
    if stream.stopped:
        assert any(whole.startswith(shown + stop) for stop in stops)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == whole
        assert len(out) == len(tokens)


def test_a_token_keeps_its_text_behind_half_a_character():
    stream = TextStream(decode)
    out = [t for token in (0xE2, 260, 0xF0, 0x9F, 260) for t in stream.push(token, 0.0)]
    assert [t.text for t in out] == ["\ufffd", "stop", "", "\ufffd", "stop"]
