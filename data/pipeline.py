"""Training batches: shuffled, rearranged for fill-in-the-middle, packed, resumable, the same for
any number of processes.

What a row holds. A document of tokens t1..tn is the sequence [gMASK] <sop> t1 .. tn <|endoftext|>;
its inputs are all but the last of these and its targets all but the first. Inputs and targets are
packed as two aligned features, so every position has its true next token as target even where a row
ends inside the document, and no token is lost at a row's edge. loss_weights is 1 at every target
but <sop>, which always follows [gMASK] and would teach nothing; so each t and each <|endoftext|> is
predicted exactly once an epoch, and sampling starts from [gMASK] <sop>.
"""

import dataclasses
import json
from collections.abc import Sequence

import grain
import numpy as np
from grain import experimental as grain_experimental

from data import fim
from data.manifest import Manifest, load_manifest
from data.shards import ShardSource, TokenizedDocument
from data.tokenizer import Tokenizer

PACKINGS = ("concat_then_split", "best_fit")
# Threads of grain would be per iterator, and there is one iterator a virtual shard; the caller's
# thread reads.
READ_OPTIONS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_STATE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which rows training sees, in which order. Nothing here depends on the machines.

    paths: dataset folders; all must have been made with the same tokenizer.
    weights: share of the tokens from each path, any positive scale (documents are sampled by weight
    over mean document length).
    batch_size: rows of one global microbatch; a multiple of virtual_shards.
    sequence_length: tokens a row, L.
    packing: 'concat_then_split' (documents cut at row edges, no padding) or 'best_fit' (padding,
    only longer documents are cut).
    num_packing_bins: rows that best_fit fills at a time, in each shard; more means less padding.
    Unread by concat_then_split.
    virtual_shards: V; row r of every batch comes from shard r modulo V. Fixed for a run; processes
    must divide it.
    seed: of the order of documents and of fill-in-the-middle, both different in every epoch.
    fim_rate: share of the code documents that are rearranged, 0 to 1.
    fim_psm_fraction: share of those as prefix-suffix-middle; the others are suffix-prefix-middle.
    fim_level: 'character' or 'token', where the cuts may fall.
    epochs: passes over the data, 0 for endless. A finite pass ends with padding and is for one
    process and one path.
    verify_checksums: read every shard once at start-up and compare its SHA-256; sizes are always
    compared.
    """

    paths: tuple[str, ...]
    weights: tuple[float, ...]
    batch_size: int
    sequence_length: int
    packing: str
    num_packing_bins: int
    virtual_shards: int
    seed: int
    fim_rate: float
    fim_psm_fraction: float
    fim_level: str
    epochs: int
    verify_checksums: bool

    def __post_init__(self):
        object.__setattr__(self, "paths", tuple(self.paths))
        object.__setattr__(self, "weights", tuple(self.weights))
        if (
            not self.paths
            or len(self.paths) != len(self.weights)
            or any(weight <= 0 for weight in self.weights)
        ):
            raise ValueError(
                f"weights={self.weights} for paths={self.paths}; valid: one positive weight a path"
            )
        if self.packing not in PACKINGS:
            raise ValueError(f"packing={self.packing!r}; valid: {list(PACKINGS)}")
        if self.fim_level not in fim.LEVELS:
            raise ValueError(f"fim_level={self.fim_level!r}; valid: {list(fim.LEVELS)}")
        for name in ("fim_rate", "fim_psm_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; valid: 0 to 1")
        for name in ("batch_size", "sequence_length", "num_packing_bins", "virtual_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; valid: 1 or more")
        if self.batch_size % self.virtual_shards:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of"
                f" virtual_shards={self.virtual_shards}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}; valid: 0 to 2**32 - 1")
        if self.epochs < 0 or (self.epochs and len(self.paths) > 1):
            raise ValueError(
                f"epochs={self.epochs} with {len(self.paths)} paths; valid: 0 (endless), or 1 and"
                " more of one path"
            )


class PackedBatches:
    """Iterator of this process's rows of every global batch, from a stream of documents that are
    dealt to virtual shards and packed.

    Each batch is a dict of [rows, L] numpy arrays, int32 unless said: tokens, targets, segment_ids
    (0 = padding, documents from 1 within the row), positions (from 0 at every document, and at the
    row's start where it continues one: a row sees nothing of the row before), loss_weights
    (float32). Local row i is row `row_indices[i]` of the global batch; with virtual_shards equal to
    batch_size these are one block, which is what jax.make_array_from_process_local_data expects.
    """

    def __init__(
        self,
        config,
        stream: grain.MapDataset,
        identity: dict,
        tokenizer: Tokenizer,
        data_rank: int,
        num_data_ranks: int,
    ):
        """config: batch_size, sequence_length, packing, num_packing_bins, virtual_shards, seed,
        epochs as in DataConfig.

        stream: documents as dicts of aligned [n] arrays, `tokens`, `targets` and what `assemble`
        takes of the others. identity: plain JSON, all that decides the stream besides these.
        data_rank, num_data_ranks: which part of the rows, of how many; processes whose devices
        hold the same rows have the same part. Raises ValueError for shards that do not divide.
        """
        check_data_ranks(config, data_rank, num_data_ranks)
        self._config, self._identity = config, identity
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        owned = config.virtual_shards // num_data_ranks
        self.shard_indices = tuple(range(data_rank * owned, (data_rank + 1) * owned))
        rounds = config.batch_size // config.virtual_shards
        self.row_indices = np.asarray(
            [i * config.virtual_shards + s for i in range(rounds) for s in self.shard_indices]
        )
        self._iterators = {
            shard: iter(_packed(stream, config, shard)) for shard in self.shard_indices
        }
        self._step = 0

    def __iter__(self) -> "PackedBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rows = [
            next(self._iterators[int(r) % self._config.virtual_shards], None)
            for r in self.row_indices
        ]
        if all(row is None for row in rows):
            raise StopIteration
        self._step += 1
        return assemble(rows, self._config.sequence_length, self.tokenizer)

    def get_state(self) -> dict:
        """Where the owned shards are, as plain JSON values: some 200 bytes a shard, whatever was
        read so far.
        """
        shards = {str(shard): iterator.get_state() for shard, iterator in self._iterators.items()}
        # Through JSON, so that what is returned is what a checkpoint will give back.
        return json.loads(
            json.dumps({"step": self._step, "stream": self._stream(), "shards": shards})
        )

    def set_state(self, state: dict) -> None:
        """Continues exactly after the batch at which `state` was taken, without replay of what came
        before.

        state: of get_state, or of merge_states over all processes of the earlier run, however many
        they were. Raises ValueError where it is of another stream (naming the setting) or lacks a
        shard that this process owns.
        """
        stream = self._stream()
        differing = [key for key in stream if state["stream"].get(key) != stream[key]]
        if differing:
            changes = ", ".join(
                f"{key}: {state['stream'].get(key)!r} there, {stream[key]!r} now"
                for key in differing
            )
            raise ValueError(f"the saved position is of another data stream ({changes})")
        missing = [shard for shard in self.shard_indices if str(shard) not in state["shards"]]
        if missing:
            raise ValueError(
                f"the saved position lacks the virtual shards {missing}; it has"
                f" {sorted(state['shards'], key=int)}"
            )
        for shard, iterator in self._iterators.items():
            iterator.set_state(_with_tuples(state["shards"][str(shard)]))
        self._step = state["step"]

    def _stream(self) -> dict:
        """All that decides a shard's rows. The batch size is not part of it, nor is where the
        datasets lie.
        """
        names = (
            "sequence_length",
            "packing",
            "num_packing_bins",
            "virtual_shards",
            "seed",
            "epochs",
        )
        stream = {name: getattr(self._config, name) for name in names}
        return json.loads(json.dumps({"version": _STATE_VERSION, **self._identity, **stream}))


def check_data_ranks(config, data_rank: int, num_data_ranks: int) -> None:
    """Raises ValueError where the data ranks do not divide the virtual shards, or cannot all end at
    the same step.
    """
    if config.virtual_shards % num_data_ranks or not 0 <= data_rank < num_data_ranks:
        raise ValueError(
            f"data rank {data_rank} of {num_data_ranks} with"
            f" virtual_shards={config.virtual_shards}; valid: a number of data ranks that divides"
            " the shards, and an index below it"
        )
    if config.epochs and num_data_ranks > 1:
        # Shards run dry at different steps: one process would stop while the others wait for it in
        # a collective.
        raise ValueError(
            f"epochs={config.epochs} on {num_data_ranks} data ranks; valid: 0 (endless), and a"
            " number of steps"
        )


class BatchIterator(PackedBatches):
    """The rows of pre-training: documents of token shards. manifests: those of config.paths."""

    def __init__(self, config: DataConfig, data_rank: int, num_data_ranks: int):
        """Opens the datasets. Raises ValueError: a dataset missing or damaged, too small, or shards
        that do not divide.
        """
        check_data_ranks(config, data_rank, num_data_ranks)
        self.manifests = tuple(
            load_manifest(path, config.verify_checksums) for path in config.paths
        )
        tokenizer = one_tokenizer(config.paths, self.manifests)
        _check_enough(config, self.manifests)
        digests = [
            [m.tokenizer.sha256, *(shard.file.sha256 for shard in m.train.shards)]
            for m in self.manifests
        ]
        names = ("fim_rate", "fim_psm_fraction", "fim_level", "weights")
        identity = {"datasets": digests, **{name: getattr(config, name) for name in names}}
        stream = _document_stream(config, self.manifests, tokenizer)
        super().__init__(config, stream, identity, tokenizer, data_rank, num_data_ranks)


def merge_states(states: Sequence[dict]) -> dict:
    """One state of all processes' states, for a restart on another number of processes.

    Processes that read the same rows give the same state. Raises ValueError where states were taken
    at different steps, of different streams, or have a shard at different positions.
    """
    steps = {state["step"] for state in states}
    if len(steps) != 1:
        raise ValueError(
            f"states of different steps {sorted(steps)}; all processes must save at the same step"
        )
    if any(state["stream"] != states[0]["stream"] for state in states):
        raise ValueError("states of different data streams")
    shards = {}
    for state in states:
        differing = [s for s, at in state["shards"].items() if shards.setdefault(s, at) != at]
        if differing:
            raise ValueError(
                f"virtual shards {differing} are in more than one state, at different positions"
            )
    return {**states[0], "shards": shards}


def one_tokenizer(paths: Sequence[str], manifests: Sequence[Manifest]) -> Tokenizer:
    """The tokenizer that all datasets share, or ValueError naming one that differs from the
    first.
    """
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise ValueError(
                f"{path!r} was made with another tokenizer than {paths[0]!r}; curate it with"
                f" tokenizer_path={paths[0]!r}"
            )
    return Tokenizer.load(paths[0])


def features(ids: np.ndarray, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Aligned inputs and next-token targets of one document, [n + 2] each for `ids` of [n]; the
    module's docstring says why.
    """
    sequence = np.concatenate([tokenizer.start_ids, ids, [tokenizer.eos_id]]).astype(np.int32)
    return {"tokens": sequence[:-1], "targets": sequence[1:]}


def assemble(
    rows: Sequence[dict | None], length: int, tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    """A batch from grain's packed rows; None is a row of padding. Documents without loss_weights:
    every target but <sop> counts.
    """
    sources = {
        "tokens": "tokens",
        "targets": "targets",
        "segment_ids": "tokens_segment_ids",
        "positions": "tokens_positions",
    }
    padding = np.zeros(length, np.int32)
    batch = {
        name: np.stack([padding if row is None else row[source] for row in rows]).astype(np.int32)
        for name, source in sources.items()
    }
    if any("loss_weights" in row for row in rows if row is not None):
        weights = [padding if row is None else row["loss_weights"] for row in rows]
        return {**batch, "loss_weights": np.stack(weights).astype(np.float32)}
    is_counted = (batch["segment_ids"] > 0) & (batch["targets"] != tokenizer.start_ids[1])
    return {**batch, "loss_weights": is_counted.astype(np.float32)}


def _check_enough(config: DataConfig, manifests: Sequence[Manifest]) -> None:
    num_documents = sum(manifest.train.num_documents for manifest in manifests)
    # Two inputs more a document than it has tokens: [gMASK] and <sop>.
    num_tokens = sum(manifest.train.num_tokens for manifest in manifests) + 2 * num_documents
    needed = config.batch_size * config.sequence_length
    if num_tokens < needed:
        raise ValueError(
            f"{list(config.paths)} hold {num_tokens} training tokens in {num_documents} documents,"
            f" fewer than one batch of {config.batch_size} x {config.sequence_length} = {needed}"
        )
    if num_documents < config.virtual_shards:
        raise ValueError(
            f"{list(config.paths)} hold {num_documents} documents, fewer than"
            f" virtual_shards={config.virtual_shards}"
        )


def _document_stream(
    config: DataConfig, manifests: Sequence[Manifest], tokenizer: Tokenizer
) -> grain.MapDataset:
    """All epochs' documents in training order, before they are dealt to the virtual shards."""
    shuffle_seed, fim_seed = (int(s) for s in np.random.SeedSequence(config.seed).generate_state(2))
    parts = []
    for number, (path, manifest) in enumerate(zip(config.paths, manifests, strict=True)):
        source = ShardSource(path, manifest, "train")
        rearrange = _rearrange_in_epoch(config, tokenizer, len(source), fim_seed + number)
        part = grain.MapDataset.source(source).map_with_index(rearrange)
        parts.append(
            part.shuffle(seed=(shuffle_seed + number) % 2**32).repeat(config.epochs or None)
        )
    if len(parts) == 1:
        return parts[0]
    # Mixed as maps, so that each corpus has one reader whatever the number of shards and corpora.
    means = [manifest.train.num_tokens / manifest.train.num_documents for manifest in manifests]
    return grain.MapDataset.mix(
        parts, [weight / mean for weight, mean in zip(config.weights, means, strict=True)]
    )


def _rearrange_in_epoch(config: DataConfig, tokenizer: Tokenizer, num_documents: int, seed: int):
    def rearrange(index: int, document: TokenizedDocument) -> dict[str, np.ndarray]:
        # Past the first epoch grain counts on: index = epoch * num_documents + document.
        epoch, number = divmod(index, num_documents)
        ids = document.ids
        if document.is_code and config.fim_rate > 0:
            rng = fim.document_rng(seed, epoch, number)
            ids = fim.rearrange(
                ids, tokenizer, rng, config.fim_rate, config.fim_psm_fraction, config.fim_level
            )
        return features(ids, tokenizer)

    return rearrange


def _packed(stream: grain.MapDataset, config, shard: int) -> grain.IterDataset:
    """The rows of one virtual shard: every V-th document of the stream, packed."""
    documents = stream[shard :: config.virtual_shards].to_iter_dataset(READ_OPTIONS)
    first = stream[0]
    assert first is not None, "no document is filtered out"
    length: int = config.sequence_length
    lengths = dict.fromkeys(first, length)
    if config.packing == "concat_then_split":
        return grain_experimental.ConcatThenSplitIterDataset(documents, length_struct=lengths)
    pieces = grain_experimental.FlatMapIterDataset(documents, _CutToLength(config.sequence_length))
    return grain_experimental.BestFitPackIterDataset(
        pieces,
        length_struct=lengths,
        num_packing_bins=config.num_packing_bins,
        seed=int(np.random.SeedSequence([config.seed, shard]).generate_state(1)[0]),
        shuffle_bins=True,
    )


class _CutToLength(grain_experimental.FlatMapTransform):
    """Cuts a document into pieces of at most `length` positions, inputs and targets alike."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        starts = range(0, len(element["tokens"]), self._length)
        return [
            {name: x[start : start + self._length] for name, x in element.items()}
            for start in starts
        ]


def _with_tuples(state):
    """Grain compares slices in its state with tuples, which JSON made lists."""
    if isinstance(state, dict):
        return {key: _with_tuples(value) for key, value in state.items()}
    return tuple(state) if isinstance(state, list) else state
