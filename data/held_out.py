"""One exact pass over the held-out split: summed loss over summed `target_bytes` is the split's
bits per byte.
"""

import itertools
from collections.abc import Iterator

import grain
import numpy as np
from grain import experimental as grain_experimental

from data.manifest import load_manifest
from data.pipeline import READ_OPTIONS, DataConfig, assemble, features, one_tokenizer
from data.shards import ShardSource


class HeldOutBatches:
    """A finite, ordered pass over the held-out documents of config.paths; iterate again for
    another.

    Documents are concatenated and cut into rows whatever config.packing says, never shuffled or
    rearranged. Batches are those of pipeline.BatchIterator plus `target_bytes`, int32 [rows, L]:
    UTF-8 bytes of text that the position's target stands for, 0 for special tokens and padding.
    Every token of every document and its <|endoftext|> is a target with loss_weight 1 exactly once,
    so over a whole pass

        bits per byte = sum(loss * loss_weights) / ln 2 / sum(target_bytes)

    and sum(target_bytes) == num_bytes; over fewer batches the same quotient is exact for the text
    they hold. Rows are padded at the end, so that all batches have the same shape and all processes
    the same number of them.
    """

    def __init__(
        self, config: DataConfig, data_rank: int, num_data_ranks: int, max_batches: int | None
    ):
        """max_batches: stop after so many, or None for all; documents lie in hash order, so a part
        is a fair sample.

        Raises ValueError: a dataset missing or damaged, or a batch_size that the data ranks do not
        divide.
        """
        if config.batch_size % num_data_ranks or not 0 <= data_rank < num_data_ranks:
            raise ValueError(
                f"data rank {data_rank} of {num_data_ranks} with batch_size={config.batch_size}; "
                "valid: a number of data ranks that divides the batch, and an index below it"
            )
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches={max_batches}; valid: 1 or more, or None for all")
        manifests = [load_manifest(path, config.verify_checksums) for path in config.paths]
        self.tokenizer = one_tokenizer(config.paths, manifests)
        self._config = config
        self._sources = [
            ShardSource(path, m, "held_out")
            for path, m in zip(config.paths, manifests, strict=True)
        ]
        local = config.batch_size // num_data_ranks
        self._local_rows = slice(data_rank * local, (data_rank + 1) * local)
        self.num_documents = sum(manifest.held_out.num_documents for manifest in manifests)
        self.num_bytes = sum(manifest.held_out.num_bytes for manifest in manifests)
        # Two inputs more a document than it has tokens: [gMASK] and <sop>.
        positions = (
            sum(manifest.held_out.num_tokens for manifest in manifests) + 2 * self.num_documents
        )
        num_batches = -(-positions // (config.batch_size * config.sequence_length))
        self._num_batches = num_batches if max_batches is None else min(num_batches, max_batches)

    def __len__(self) -> int:
        """Number of batches of a pass."""
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        parts = [grain.MapDataset.source(source) for source in self._sources]
        documents = grain.MapDataset.concatenate(parts).map(
            lambda d: features(d.ids, self.tokenizer)
        )
        length, batch_size = self._config.sequence_length, self._config.batch_size
        packed = grain_experimental.ConcatThenSplitIterDataset(
            documents.to_iter_dataset(READ_OPTIONS),
            length_struct={"tokens": length, "targets": length},
        )
        rows = itertools.chain(packed, itertools.repeat(None))
        for _ in range(self._num_batches):
            batch = assemble(
                list(itertools.islice(rows, batch_size))[self._local_rows], length, self.tokenizer
            )
            is_text = batch["loss_weights"] > 0
            yield {
                **batch,
                "target_bytes": np.where(
                    is_text, self.tokenizer.byte_lengths[batch["targets"]], 0
                ).astype(np.int32),
            }


def held_out_batches(
    config: DataConfig, data_rank: int, num_data_ranks: int, max_batches: int | None
) -> HeldOutBatches:
    """The held-out pass of a training config; see HeldOutBatches."""
    return HeldOutBatches(config, data_rank, num_data_ranks, max_batches)
