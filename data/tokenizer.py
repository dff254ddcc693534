"""Byte-level BPE with GLM's special tokens: trained here, or loaded from a released model's
tokenizer.json.
"""

import functools
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

# GLM-4.5's 36 special tokens in their published order; ids follow the BPE base without a gap
# (151329 + k there).
SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>",
    "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "/nothink", "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip

# GPT-4's split, which GLM shares: a word takes one leading space, digits go by threes, and a run of
# indentation stays one piece up to the space that its word takes.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_BYTES = 256


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE spells bytes as characters: printable ones of Latin-1 as themselves, the
    others by those from U+0100 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(_NUM_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


_BYTE_OF = _byte_of_character()


class Tokenizer:
    """Text <-> token ids, lossless for any text.

    Text never becomes a special token unless `allow_special` says so: a source file that spells
    `<|user|>` is only text.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """backend: a byte-level BPE whose added tokens hold all of SPECIAL_TOKENS. Raises
        ValueError naming those it lacks.
        """
        ids = ((name, backend.token_to_id(name)) for name in SPECIAL_TOKENS)
        self._special = {name: index for name, index in ids if index is not None}
        missing = [name for name in SPECIAL_TOKENS if name not in self._special]
        if missing:
            raise ValueError(
                f"the tokenizer lacks the special tokens {missing}; needed are"
                f" {list(SPECIAL_TOKENS)}"
            )
        self._backend = backend
        # The library's own switch only covers tokens flagged as special, and released files do not
        # flag `<think>` and the tool tags: a second tokenizer without any added token is the one
        # that cannot produce them.
        spec = json.loads(backend.to_str())
        spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec))

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in the folder `path` (a dataset, a released model).
        Raises ValueError.
        """
        file = pathlib.Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(f"no tokenizer at {str(file)!r}")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text("utf-8-sig"))
        # the library raises bare Exception for a file that it cannot parse
        except Exception as error:
            raise ValueError(f"{str(file)!r} is no tokenizer.json: {error}") from error
        return cls(backend)

    def to_json(self) -> str:
        """The text of a tokenizer.json that `load` and Hugging Face read."""
        return self._backend.to_str()

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`, nothing prepended or appended; with allow_special, spelled-out special
        tokens become themselves.
        """
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """Ids of each text, on all cores."""
        backend = self._backend if allow_special else self._plain
        return [
            encoding.ids
            for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelled out.

        Bytes that are no UTF-8 (a character cut in half) become U+FFFD; ids at or above vocab_size
        (a model's padding rows) decode to nothing.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, index: int) -> bytes:
        """The bytes of text that an id stands for, be they whole characters or not; a special
        token's are those of its name.
        """
        if not 0 <= index < self.vocab_size:
            return b""
        token = self._backend.id_to_token(index)
        if token is None:
            return b""
        if index in self._backend.get_added_tokens_decoder():
            return token.encode()
        return bytes(_BYTE_OF[character] for character in token)

    def special(self, name: str) -> int:
        """The id of a special token, or ValueError with the valid names."""
        if name not in SPECIAL_TOKENS:
            raise ValueError(f"{name!r} is no special token; valid: {list(SPECIAL_TOKENS)}")
        return self._special[name]

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_id(self) -> int:
        """`<|endoftext|>`: ends every document."""
        return self.special("<|endoftext|>")

    @functools.cached_property
    def start_ids(self) -> tuple[int, int]:
        """`[gMASK]<sop>`: begins every document, in training, in sampling and in the chat
        template.
        """
        return self.special("[gMASK]"), self.special("<sop>")

    @property
    def fim_ids(self) -> tuple[int, int, int]:
        """Ids of `<|code_prefix|>`, `<|code_middle|>`, `<|code_suffix|>`."""
        return (
            self.special("<|code_prefix|>"),
            self.special("<|code_middle|>"),
            self.special("<|code_suffix|>"),
        )

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of text that each id stands for, 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int32)
        added = self._backend.get_added_tokens_decoder()
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            if index not in added:
                # Byte-level BPE spells every byte as one character.
                lengths[index] = len(token)
        return lengths


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE; `vocab_size` counts the 256 bytes and the special tokens.

    A small corpus may run out of pairs to merge: the vocabulary is then smaller. Raises ValueError
    for a size below 292.
    """
    smallest = _NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is below {smallest} (256 bytes and {len(SPECIAL_TOKENS)}"
            " special tokens)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A special token that the split leaves whole (`/nothink`) could be learned as a merge; its id
    # would then lie in the base.
    whole = [
        name for name in SPECIAL_TOKENS if len(backend.pre_tokenizer.pre_tokenize_str(name)) == 1
    ]

    def without_whole_specials():
        for text in texts:
            for name in whole:
                text = text.replace(name, "")  # noqa: PLW2901
            yield text

    backend.train_from_iterator(without_whole_specials(), trainer)
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    tokenizer = Tokenizer(backend)
    ids = [tokenizer.special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(tokenizer.vocab_size - len(ids), tokenizer.vocab_size)), ids
    return tokenizer
