"""The held-out pass predicts every byte of every held-out document exactly once."""

import dataclasses

import numpy as np
import pytest

from data.held_out import held_out_batches
from data.manifest import load_manifest
from data.pipeline import BatchIterator
from data.shards import ShardSource


@pytest.fixture(scope="module")
def texts(dataset):
    manifest = load_manifest(dataset, True)
    source = ShardSource(dataset, manifest, "held_out")
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("packing", ["concat_then_split", "best_fit"])
def test_pass_is_every_document_in_order_once_with_its_end(data_config, texts, packing):
    batches = held_out_batches(
        dataclasses.replace(data_config, packing=packing, fim_rate=1.0), 0, 1, None
    )
    counted = np.concatenate([b["targets"][b["loss_weights"] > 0] for b in batches])
    eos = batches.tokenizer.eos_id
    np.testing.assert_array_equal(
        counted, np.concatenate([[*document.ids, eos] for document in texts])
    )
    assert len(list(batches)) == len(batches)


def test_bytes_are_those_of_the_files_on_disk(data_config, corpus, texts):
    batches = held_out_batches(data_config, 0, 1, None)
    expected = sum((corpus / document.path).stat().st_size for document in texts)
    assert (
        sum(int(batch["target_bytes"].sum()) for batch in batches) == batches.num_bytes == expected
    )
    for batch in batches:
        assert not batch["target_bytes"][batch["loss_weights"] == 0].any()


def test_partial_pass_counts_the_bytes_of_its_own_text(data_config, corpus, texts):
    batches = held_out_batches(data_config, 0, 1, 2)
    assert len(batches) == 2
    targets = [b["targets"][b["loss_weights"] > 0] for b in batches]
    text = batches.tokenizer.decode(
        [i for i in np.concatenate(targets) if i != batches.tokenizer.eos_id]
    )
    num_bytes = sum(int(batch["target_bytes"].sum()) for batch in batches)
    whole = b"".join((corpus / document.path).read_bytes() for document in texts)
    # The last character may be cut in half: compare up to there.
    assert whole.startswith(text.encode().rstrip("\ufffd".encode()))
    assert whole[:num_bytes].decode(errors="replace") == text


def test_processes_split_the_same_batches_and_all_have_as_many(data_config):
    whole = list(held_out_batches(data_config, 0, 1, None))
    parts = [list(held_out_batches(data_config, index, 4, None)) for index in range(4)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        for name, x in batch.items():
            np.testing.assert_array_equal(x, np.concatenate([part[step][name] for part in parts]))
            assert x.shape == (8, 32)


def test_no_held_out_file_is_in_training(data_config, dataset, texts):
    source = ShardSource(dataset, load_manifest(dataset, True), "train")
    train = {source[i].path for i in range(len(source))}
    assert texts and not train & {document.path for document in texts}
    assert BatchIterator(data_config, 0, 1).manifests[0].train.num_documents == len(train)


def test_errors(data_config):
    with pytest.raises(ValueError, match="data rank 0 of 3 with batch_size=8"):
        held_out_batches(data_config, 0, 3, None)
    with pytest.raises(ValueError, match="max_batches=0"):
        held_out_batches(data_config, 0, 1, 0)
