"""Batches against a brute-force reading of the shards: right next tokens, everything once, any
process count, any restart.
"""

import collections
import dataclasses
import json

import numpy as np
import pytest

from data import fim
from data.curation import curate
from data.manifest import load_manifest
from data.pipeline import BatchIterator, DataConfig, merge_states
from data.shards import ShardSource
from data.tokenizer import Tokenizer

PACKINGS = ["concat_then_split", "best_fit"]


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return Tokenizer.load(dataset)


@pytest.fixture(scope="module")
def documents(dataset):
    """All train documents, read without grain's datasets."""
    source = ShardSource(dataset, load_manifest(dataset, True), "train")
    found = [source[i] for i in range(len(source))]
    lengths = [len(document.ids) for document in found]
    assert max(lengths) > 2 * 32 and min(lengths) < 32 / 2  # rows of 32 cut some and join others
    return found


def sequences_of(documents, tokenizer):
    start = [tokenizer.special("[gMASK]"), tokenizer.special("<sop>")]
    return [
        [*start, *document.ids.tolist(), tokenizer.special("<|endoftext|>")]
        for document in documents
    ]


def one_epoch(config, **changes):
    return list(BatchIterator(dataclasses.replace(config, epochs=1, **changes), 0, 1))


def segments_of(batch):
    """(inputs, targets, positions) of each segment of each row, in row order, padding left out."""
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            where = ids == segment
            yield (
                batch["tokens"][row][where],
                batch["targets"][row][where],
                batch["positions"][row][where],
            )


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


@pytest.mark.parametrize("packing", PACKINGS)
def test_batch_has_the_contract_of_the_design_page(data_config, tokenizer, packing):
    batch = next(BatchIterator(dataclasses.replace(data_config, packing=packing), 0, 1))
    assert set(batch) == {"tokens", "targets", "segment_ids", "positions", "loss_weights"}
    for name, x in batch.items():
        assert x.shape == (8, 32) and x.dtype == (
            np.float32 if name == "loss_weights" else np.int32
        ), name


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_whole_segments_then_padding(data_config, tokenizer, packing):
    num_padded = 0
    for batch in one_epoch(data_config, packing=packing):
        for row in range(8):
            ids = batch["segment_ids"][row]
            length = int((ids > 0).sum())
            num_padded += 32 - length
            # Ascending without gaps from 1, then zeros; positions count from 0 inside each.
            assert (
                not ids[length:].any()
                and (length == 0 or ids[0] == 1)
                and set(np.diff(ids[:length])) <= {0, 1}
            )
            for name in ("tokens", "targets", "positions", "loss_weights"):
                assert not batch[name][row][length:].any(), name
        for _, _, positions in segments_of(batch):
            np.testing.assert_array_equal(positions, np.arange(len(positions)))
        is_sop = batch["targets"] == tokenizer.special("<sop>")
        np.testing.assert_array_equal(
            batch["loss_weights"], ((batch["segment_ids"] > 0) & ~is_sop).astype(np.float32)
        )
    assert num_padded > 0


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("sequence_length", [32, 7])
def test_every_token_is_input_once_and_target_once_an_epoch(
    data_config, documents, tokenizer, packing, sequence_length
):
    """Exactly once, by counting the segments that a brute-force cut of each document must give."""
    sequences = sequences_of(documents, tokenizer)
    batches = one_epoch(data_config, packing=packing, sequence_length=sequence_length, fim_rate=0.0)
    found = [
        (tokens.tolist(), targets.tolist())
        for batch in batches
        for tokens, targets, _ in segments_of(batch)
    ]
    if packing == "best_fit":
        pieces = collections.Counter()
        for sequence in sequences:
            for start in range(0, len(sequence) - 1, sequence_length):
                end = min(start + sequence_length, len(sequence) - 1)
                pieces[tuple(sequence[start:end]), tuple(sequence[start + 1 : end + 1])] += 1
        assert collections.Counter((tuple(a), tuple(b)) for a, b in found) == pieces
    else:
        # Rows of one shard in order, glued together, are whole documents one after another.
        glued = []
        for shard in range(4):
            stream = [
                s
                for batch in batches
                for s in segments_of({k: v[shard::4] for k, v in batch.items()})
            ]
            sequence = []
            for tokens, targets, _ in stream:
                assert not sequence or sequence[-1] == tokens[0], (
                    "a continued document goes on where it was cut"
                )
                sequence += tokens.tolist() if not sequence else tokens.tolist()[1:]
                sequence.append(int(targets[-1]))
                np.testing.assert_array_equal(sequence[-len(targets) :], targets)
                if sequence[-1] == tokenizer.eos_id:
                    glued.append(tuple(sequence))
                    sequence = []
            assert not sequence
        assert sorted(glued) == sorted(map(tuple, sequences))


def test_fim_rearranges_code_only_and_differently_in_every_epoch(data_config, documents, tokenizer):
    config = dataclasses.replace(
        data_config, epochs=2, fim_rate=1.0, sequence_length=4096, batch_size=1, virtual_shards=1
    )
    config = dataclasses.replace(config, packing="best_fit", num_packing_bins=1)
    texts = {tuple(document.ids.tolist()): document for document in documents}
    by_path = collections.defaultdict(list)
    for batch in BatchIterator(config, 0, 1):
        for _, targets, _ in segments_of(batch):
            ids = targets[1:-1].tolist()  # without <sop> and <|endoftext|>
            if tuple(ids) in texts:
                by_path[texts[tuple(ids)].path].append(ids)
                assert not texts[tuple(ids)].is_code
            else:
                assert ids[0] == tokenizer.fim_ids[0]
                text = "".join(
                    sorted(tokenizer.decode(i for i in ids if i not in tokenizer.fim_ids))
                )
                path = next(
                    d.path for d in documents if "".join(sorted(tokenizer.decode(d.ids))) == text
                )
                by_path[path].append(ids)
    assert len(by_path) == len(documents) and all(len(found) == 2 for found in by_path.values())
    code = {document.path for document in documents if document.is_code}
    same = [path for path in code if by_path[path][0] == by_path[path][1]]
    assert len(same) < len(code) / 10
    assert all(
        by_path[d.path][0] == by_path[d.path][1] == d.ids.tolist()
        for d in documents
        if not d.is_code
    )


def test_epochs_have_different_orders_and_the_seed_decides_them(data_config, documents):
    config = dataclasses.replace(
        data_config, fim_rate=0.0, epochs=2, batch_size=1, virtual_shards=1
    )
    config = dataclasses.replace(
        config, packing="best_fit", sequence_length=4096, num_packing_bins=1
    )

    def order(config):
        return [
            tuple(targets)
            for batch in BatchIterator(config, 0, 1)
            for _, targets, _ in segments_of(batch)
        ]

    both = order(config)
    first, second = both[: len(documents)], both[len(documents) :]
    assert sorted(first) == sorted(second) and first != second
    assert order(config) == both != order(dataclasses.replace(config, seed=4))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("process_count", [2, 4])
def test_global_rows_are_the_same_on_any_number_of_processes(data_config, packing, process_count):
    config = dataclasses.replace(data_config, packing=packing)
    whole = BatchIterator(config, 0, 1)
    parts = [BatchIterator(config, index, process_count) for index in range(process_count)]
    np.testing.assert_array_equal(
        np.sort(np.concatenate([part.row_indices for part in parts])), np.arange(8)
    )
    for _ in range(12):
        expected = next(whole)
        for part in parts:
            assert_same(next(part), {name: x[part.row_indices] for name, x in expected.items()})


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("epochs", [0, 1])
def test_resume_at_any_step_continues_bit_for_bit(data_config, packing, epochs):
    config = dataclasses.replace(data_config, packing=packing, epochs=epochs)
    iterator = BatchIterator(config, 0, 1)
    states, batches = [iterator.get_state()], []
    for _ in range(40):
        batch = next(iterator, None)
        if batch is None:
            break
        batches.append(batch)
        states.append(iterator.get_state())
    assert len(batches) > 15
    for step, state in enumerate(states):
        resumed = BatchIterator(config, 0, 1)
        resumed.set_state(json.loads(json.dumps(state)))
        assert resumed.get_state() == state
        for expected in batches[step : step + 6]:
            assert_same(next(resumed), expected)
        if epochs and step + 6 >= len(batches):
            assert next(resumed, None) is None


@pytest.mark.parametrize("packing", PACKINGS)
def test_set_state_rewinds_an_iterator_in_use(data_config, packing):
    iterator = BatchIterator(dataclasses.replace(data_config, packing=packing, epochs=1), 0, 1)
    next(iterator)
    state = iterator.get_state()
    rest = list(iterator)
    iterator.set_state(state)
    for batch, expected in zip(iterator, rest, strict=True):
        assert_same(batch, expected)
    end = iterator.get_state()
    iterator.set_state(state)
    next(iterator)
    iterator.set_state(end)
    assert next(iterator, None) is None


@pytest.mark.parametrize("packing", PACKINGS)
def test_restart_on_another_number_of_processes_continues_the_same_rows(data_config, packing):
    config = dataclasses.replace(data_config, packing=packing)
    whole = BatchIterator(config, 0, 1)
    counts = [1, 4, 2, 1]
    states = None
    for count in counts:
        parts = [BatchIterator(config, index, count) for index in range(count)]
        for part in parts:
            if states:
                part.set_state(merge_states(states))
        for _ in range(7):
            expected = next(whole)
            for part in parts:
                assert_same(next(part), {name: x[part.row_indices] for name, x in expected.items()})
        states = [part.get_state() for part in parts]


def test_state_stays_small(data_config):
    iterator = BatchIterator(data_config, 0, 1)
    sizes = []
    for _ in range(30):
        next(iterator)
        sizes.append(len(json.dumps(iterator.get_state()["shards"])))
    assert max(sizes) < 4 * 300


def test_state_of_another_stream_or_incomplete_is_refused(data_config):
    iterator = BatchIterator(data_config, 0, 1)
    state = iterator.get_state()
    for name, value in (
        ("seed", 9),
        ("sequence_length", 16),
        ("packing", "best_fit"),
        ("fim_rate", 0.1),
    ):
        other = BatchIterator(dataclasses.replace(data_config, **{name: value}), 0, 1)
        with pytest.raises(ValueError, match=name):
            other.set_state(state)
    with pytest.raises(ValueError, match=r"lacks the virtual shards \[2, 3\]"):
        iterator.set_state(BatchIterator(data_config, 0, 2).get_state())
    halves = [BatchIterator(data_config, index, 2) for index in range(2)]
    next(halves[0])
    with pytest.raises(ValueError, match="different steps"):
        merge_states([half.get_state() for half in halves])
    next(halves[1])
    states = [half.get_state() for half in halves]
    assert merge_states([*states, *states]) == merge_states(states)  # two processes a part
    elsewhere = {**states[0], "shards": {"0": states[0]["shards"]["1"]}}
    with pytest.raises(ValueError, match=r"virtual shards \['0'\] .* at different positions"):
        merge_states([*states, elsewhere])


def test_mixture_draws_tokens_by_weight_and_resumes(
    data_config, curate_config, dataset, make_corpus, tmp_path
):
    make_corpus(tmp_path / "other", seed=1, most_lines=100)  # documents four times as long
    changes = {
        "tokenizer_path": str(dataset),
        "held_out_fraction": 0.5,
        "files_root": str(tmp_path / "other"),
    }
    curate(dataclasses.replace(curate_config, **changes), tmp_path / "second", progress=False)
    source = ShardSource(tmp_path / "second", load_manifest(tmp_path / "second", True), "train")
    second = {tuple(source[i].ids.tolist()) for i in range(len(source))}
    config = dataclasses.replace(
        data_config,
        paths=(*data_config.paths, str(tmp_path / "second")),
        weights=(3.0, 1.0),
        fim_rate=0.0,
        packing="best_fit",
    )
    config = dataclasses.replace(config, sequence_length=2048, batch_size=4)
    iterator = BatchIterator(config, 0, 1)
    counts = collections.Counter()
    for _ in range(30):
        for _, targets, _ in segments_of(next(iterator)):
            counts[tuple(targets[1:-1].tolist()) in second] += len(targets)
    assert abs(counts[True] / counts.total() - 0.25) < 0.03
    resumed = BatchIterator(config, 0, 1)
    resumed.set_state(iterator.get_state())
    assert_same(next(resumed), next(iterator))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "first_fit"}, "'first_fit'.*concat_then_split.*best_fit"),
        ({"fim_level": "word"}, "'word'.*character.*token"),
        ({"fim_rate": 1.5}, "fim_rate=1.5.*0 to 1"),
        ({"batch_size": 6}, "batch_size=6 is no multiple of virtual_shards=4"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"weights": (1.0, 2.0)}, "one positive weight a path"),
        ({"seed": -1}, "seed=-1"),
        ({"epochs": -1}, "epochs=-1"),
    ],
)
def test_config_errors_name_the_value_and_the_valid_ones(data_config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(data_config, **changes)


def test_start_up_errors(data_config, documents):
    with pytest.raises(ValueError, match="fewer than one batch of 8 x 100000 = 800000"):
        BatchIterator(dataclasses.replace(data_config, sequence_length=100_000), 0, 1)
    with pytest.raises(
        ValueError, match=f"{len(documents)} documents, fewer than virtual_shards=1024"
    ):
        BatchIterator(
            dataclasses.replace(
                data_config, virtual_shards=1024, batch_size=1024, sequence_length=1
            ),
            0,
            1,
        )
    for index, count in ((0, 3), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"data rank {index} of {count}.*virtual_shards=4"):
            BatchIterator(data_config, index, count)
    with pytest.raises(ValueError, match="epochs=1 on 2 data ranks"):
        BatchIterator(dataclasses.replace(data_config, epochs=1), 0, 2)


def test_datasets_of_different_tokenizers_do_not_mix(data_config, curate_config, tmp_path):
    curate(dataclasses.replace(curate_config, vocab_size=400), tmp_path / "second", progress=False)
    config = dataclasses.replace(
        data_config, paths=(*data_config.paths, str(tmp_path / "second")), weights=(1.0, 1.0)
    )
    with pytest.raises(ValueError, match="second.*another tokenizer"):
        BatchIterator(config, 0, 1)


def test_config_accepts_lists_from_config_files(data_config):
    fields = {**dataclasses.asdict(data_config), "paths": list(data_config.paths), "weights": [1.0]}
    assert DataConfig(**fields) == data_config
    assert set(fim.LEVELS) == {"character", "token"}
