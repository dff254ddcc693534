"""Raw documents -> dataset folder: tokenizer, token shards of a train and a held-out split,
manifest.

    python -m experiments.curate --config=configs/curate.py --output=DIR

The folder appears when it is complete; running the same command again does nothing. Keys of the
config file can be overridden, each as --config.KEY=VALUE, for example --config.vocab_size=8192.
"""

import sys
import time

from absl import app, flags
from ml_collections import config_flags

from data.curation import CurateConfig, curate

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config of the dataset, such as configs/curate.py."
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "The dataset folder to make. It must not exist, be empty, or be this very dataset.",
)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with ml_collections' complaint about an unknown key on one line."""
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:
        sys.exit(f"curate: unknown config key {' '.join(str(error).split())}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    output = _OUTPUT.value
    assert output is not None, "a required flag"
    start = time.monotonic()
    try:
        manifest = curate(
            CurateConfig(**_CONFIG.value.to_dict()), output, progress=sys.stderr.isatty()
        )
    except (ValueError, OSError) as error:
        sys.exit(f"curate: {error}")
    print(
        f"{output}: vocabulary {manifest.vocab_size:,}, skipped {manifest.skipped},"
        f" {time.monotonic() - start:.1f} s"
    )
    for name in ("train", "held_out"):
        split = manifest.split(name)
        print(
            f"  {name:8} {split.num_documents:>9,} documents {split.num_bytes:>13,} bytes"
            f" {split.num_tokens:>13,} tokens ({split.num_bytes / split.num_tokens:.2f} bytes a"
            " token)"
        )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "output"])
    app.run(main, flags_parser=_parse_flags)
