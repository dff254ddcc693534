"""Rows of supervised fine-tuning: finished conversations, packed, with loss on what the assistant
says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from grain import experimental as grain_experimental

from data.chat_messages import TemplateError
from data.chat_template import encode_for_training
from data.pipeline import READ_OPTIONS, PackedBatches, assemble
from data.tokenizer import Tokenizer
from glm_jax.config import check_types
from glm_jax.files import write_json_lines
from glm_jax.train.loop import Source

logger = logging.getLogger(__name__)
FIELDS = ("messages", "tools", "thinking")


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """Which conversations, and how they are packed; they are kept in memory as tokens.

    paths: JSONL files, an object a line: `messages`, and maybe `tools` and `thinking` (whether it
    is written with reasoning).
    tokenizer: path of a tokenizer.json or a folder that has one, the start's.
    thinking_share: of the conversations that have reasoning and do not say `thinking` themselves,
    so many keep it; the others lose it, and are asked with thinking off.
    held_out_fraction: share of the conversations, by the hash of their messages, that is never
    trained on. The others as in data.pipeline.DataConfig; rows are filled best fit, conversations
    longer than a row are left out.
    """

    paths: tuple[str, ...]
    tokenizer: str
    thinking_share: float
    held_out_fraction: float
    batch_size: int
    sequence_length: int
    num_packing_bins: int
    virtual_shards: int
    seed: int
    epochs: int

    def __post_init__(self):
        check_types(self)
        object.__setattr__(self, "paths", tuple(self.paths))
        if not self.paths:
            raise ValueError("data.paths is empty: give files of conversations")
        for name in ("thinking_share", "held_out_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}={getattr(self, name)}; valid: 0 to 1")
        for name in ("batch_size", "sequence_length", "num_packing_bins", "virtual_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}; valid: 1 or more")
        if self.batch_size % self.virtual_shards:
            raise ValueError(
                f"data.batch_size={self.batch_size} is no multiple of"
                f" virtual_shards={self.virtual_shards}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed={self.seed}; valid: 0 to 2**32 - 1")
        if self.epochs < 0:
            raise ValueError(f"data.epochs={self.epochs}; valid: 0 (endless) or more")

    @property
    def packing(self) -> str:
        return "best_fit"


def read_conversations(path: str | pathlib.Path) -> Iterator[tuple[str, dict]]:
    """(where, conversation) of each line. Raises ValueError naming the line."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"no file of conversations at {str(path)!r}")
    for number, line in enumerate(file.read_bytes().rstrip(b"\n").split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON: {error}") from None
        if (
            not isinstance(entry, dict)
            or "messages" not in entry
            or not entry.keys() <= set(FIELDS)
        ):
            raise ValueError(
                f"{where}: must be an object with messages, and maybe tools and thinking"
            )
        if not isinstance(entry["messages"], list) or not all(
            isinstance(m, dict) for m in entry["messages"]
        ):
            raise ValueError(f"{where}: messages must be a list of objects")
        if not isinstance(entry.get("thinking", True), bool):
            raise ValueError(f"{where}: thinking must be true or false, not {entry['thinking']!r}")
        yield where, entry


def write_conversations(path: pathlib.Path, conversations: Sequence[Mapping]):
    """A file that read_conversations reads; it appears as a whole."""
    write_json_lines(path, conversations)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The conversations of a config as features, by split; sha256 is over all of them."""

    train: list[dict[str, np.ndarray]]
    held_out: list[dict[str, np.ndarray]]
    sha256: str


def encode_all(config: ConversationConfig, tokenizer: Tokenizer) -> Encoded:
    """Raises ValueError naming the line of a conversation that cannot be written, or where none is
    short enough.
    """
    splits: dict[bool, list] = {True: [], False: []}
    digest, too_long = hashlib.sha256(), 0
    for path in config.paths:
        for where, entry in read_conversations(path):
            digest.update(json.dumps(entry, sort_keys=True).encode())
            key = hashlib.sha256(json.dumps(entry["messages"], sort_keys=True).encode()).digest()
            try:
                features = encode(entry, tokenizer, thinks(entry, config, key))
            except TemplateError as error:
                raise ValueError(f"{where}: {error}") from None
            if len(features["tokens"]) > config.sequence_length:
                too_long += 1
                continue
            splits[_share(key[:8]) < config.held_out_fraction].append(features)
    if not splits[False]:
        raise ValueError(
            f"{', '.join(config.paths)} hold no conversation of at most {config.sequence_length}"
            f" tokens to train on: {too_long} are longer, {len(splits[True])} held out"
        )
    logger.info(
        "%d conversations, %d held out; %d were too long",
        len(splits[False]),
        len(splits[True]),
        too_long,
    )
    return Encoded(splits[False], splits[True], digest.hexdigest())


def thinks(entry: Mapping, config: ConversationConfig, key: bytes) -> bool:
    """Whether a conversation keeps its reasoning, or is asked with thinking off: what it says, else
    at random.
    """
    if "thinking" in entry:
        return entry["thinking"]
    return (
        any(m.get("reasoning_content") for m in entry["messages"])
        and _share(key[8:16]) < config.thinking_share
    )


def encode(entry: Mapping, tokenizer: Tokenizer, thinking: bool) -> dict[str, np.ndarray]:
    """Aligned tokens, targets and loss_weights (1 where the target is the assistant's)."""
    messages = entry["messages"]
    if not thinking:
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
    ids, trained = encode_for_training(tokenizer, messages, entry.get("tools"), thinking=thinking)
    sequence = np.asarray(ids, np.int32)
    return {
        "tokens": sequence[:-1],
        "targets": sequence[1:],
        "loss_weights": np.asarray(trained[1:], np.float32),
    }


def _share(digest: bytes) -> float:
    return int.from_bytes(digest, "big") / 256 ** len(digest)


class ConversationBatches(PackedBatches):
    """The rows of training, as PackedBatches gives them."""

    def __init__(self, config: ConversationConfig, data_rank: int, num_data_ranks: int):
        """Raises ValueError for files that cannot be read, or fewer conversations than virtual
        shards.
        """
        tokenizer = Tokenizer.load(config.tokenizer)
        encoded = encode_all(config, tokenizer)
        if len(encoded.train) < config.virtual_shards:
            raise ValueError(
                f"{len(encoded.train)} conversations to train on, fewer than"
                f" data.virtual_shards={config.virtual_shards}"
            )
        stream = (
            grain.MapDataset.source(encoded.train)
            .shuffle(seed=config.seed)
            .repeat(config.epochs or None)
        )
        identity = {
            "conversations": encoded.sha256,
            "thinking_share": config.thinking_share,
            "held_out": config.held_out_fraction,
        }
        super().__init__(config, stream, identity, tokenizer, data_rank, num_data_ranks)


class HeldOutConversations:
    """One pass over the held-out conversations; batches as data.held_out gives them. Iterate again
    for another.
    """

    def __init__(
        self,
        config: ConversationConfig,
        data_rank: int,
        num_data_ranks: int,
        max_batches: int | None,
    ):
        self.tokenizer = Tokenizer.load(config.tokenizer)
        self._config, self._examples = config, encode_all(config, self.tokenizer).held_out
        if not self._examples:
            raise ValueError(
                f"data.held_out_fraction={config.held_out_fraction} holds out none of the"
                " conversations"
            )
        local = config.batch_size // num_data_ranks
        self._local_rows = slice(data_rank * local, (data_rank + 1) * local)
        rows = sum(1 for _ in self._rows())
        self._num_batches = min(-(-rows // config.batch_size), max_batches or rows)

    def __len__(self) -> int:
        """Number of batches of a pass."""
        return self._num_batches

    def _rows(self) -> Iterator[dict[str, np.ndarray]]:
        examples = grain.MapDataset.source(self._examples).to_iter_dataset(READ_OPTIONS)
        return iter(grain_experimental.BestFitPackIterDataset(
            examples, length_struct=dict.fromkeys(self._examples[0], self._config.sequence_length),
            num_packing_bins=self._config.num_packing_bins, seed=0, shuffle_bins=False,
        ))  # fmt: skip

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        rows = itertools.chain(self._rows(), itertools.repeat(None))
        for _ in range(self._num_batches):
            whole = list(itertools.islice(rows, self._config.batch_size))[self._local_rows]
            batch = assemble(whole, self._config.sequence_length, self.tokenizer)
            is_text = batch["loss_weights"] > 0
            yield {
                **batch,
                "target_bytes": (
                    np.where(is_text, self.tokenizer.byte_lengths[batch["targets"]], 0).astype(
                        np.int32
                    )
                ),
            }


SOURCE = Source(ConversationBatches, HeldOutConversations)
