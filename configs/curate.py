"""The demo's dataset: the Python standard library of the interpreter in use.

    python -m experiments.curate --config=configs/curate.py --output=DIR

Expected with CPython 3.11: 8,348 training documents, cut from 1,671 files of 30.1 MB in 8.77
million tokens (3.43 bytes a token), 87 held-out ones of 1.41 MB; 14 seconds on two idle cores (3 of
them train the tokenizer), 11 MB on disk. Any key can be overridden: --config.vocab_size=8192
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Settings of data.curation.CurateConfig."""
    config = ml_collections.ConfigDict()
    # 'stdlib': this interpreter's standard library; 'files': a folder of text files.
    config.source = "stdlib"
    # Folder and glob of source='files'; unread by 'stdlib'.
    config.files_root = ""
    config.files_glob = "**/*.py"
    # Files of source='files' whose names end so are code, which fill-in-the-middle may rearrange.
    config.code_suffixes = (
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".go",
        ".rs",
        ".java",
        ".js",
        ".ts",
    )
    # Share of the files, chosen by a hash of seed and path, that training never sees.
    config.held_out_fraction = 0.05
    # Seed of that hash, which is also the order of documents on disk.
    config.seed = 0
    # A tokenizer.json (or a folder with one) to use; '' trains one on the train split.
    config.tokenizer_path = ""
    # Size of the trained vocabulary: 256 bytes, merges, and the 36 special tokens.
    config.vocab_size = 4096
    # The tokenizer is trained on about so many bytes of the train split.
    config.tokenizer_train_bytes = 10_000_000
    # Longer files of the train split become several documents, cut at line ends; 0: whole files.
    config.max_document_bytes = 4096
    # Number of files of each split.
    config.train_shards = 4
    config.held_out_shards = 1
    return config
