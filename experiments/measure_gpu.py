"""Correctness, kernels, training and decoding on one GPU, in at most 8 minutes; --rehearse runs it
all on a CPU at toy size.

    python -m experiments.measure_gpu --output=DIR

Each section runs in a process of its own, in order of worth, so one that fails or hangs ends none
of the others. DIR gets every measurement at once (measurements.jsonl), the tables (gpu.md) and each
section's log. Exit code 1 where a section is not done.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags

from experiments.gpu import sections

OUTPUT = flags.DEFINE_string("output", None, "The folder for the results.")
SECONDS = flags.DEFINE_float(
    "seconds",
    480,
    "The time limit of the whole check; sections that do not fit are recorded as such.",
    lower_bound=0,
)
REHEARSE = flags.DEFINE_bool("rehearse", False, "Runs the same check at toy size on the CPU.")
ONLY = flags.DEFINE_list("sections", list(sections.SECTIONS), "The sections to run.")
SECTION = flags.DEFINE_enum(
    "section",
    None,
    [*sections.SECTIONS, "reference"],
    "Runs one section in this process; the command itself uses this.",
)


def main(argv: list[str]):
    del argv
    assert OUTPUT.value is not None, "a required flag"
    output = pathlib.Path(OUTPUT.value)
    if SECTION.value:
        sections.run_here(SECTION.value, output, REHEARSE.value)
        return
    unknown = set(ONLY.value) - set(sections.SECTIONS)
    if unknown:
        sys.exit(
            f"error: --sections: {', '.join(sorted(unknown))}: valid are"
            f" {', '.join(sections.SECTIONS)}"
        )
    chosen = [name for name in sections.SECTIONS if name in ONLY.value]
    statuses = sections.run_all(chosen, output, SECONDS.value, REHEARSE.value)
    if set(statuses.values()) - {"done"}:
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["output"])
    app.run(main)
