"""The results of an evaluation: a file, and a table."""

from __future__ import annotations

import json
import os
import pathlib

from glm_jax.evaluation.subject import Subject
from glm_jax.files import write_text
from glm_jax.rewards import puzzles
from glm_jax.run.checkpoints import newest_step, read_config


def find_output(
    path: pathlib.Path, step: int | None, output: str | None
) -> tuple[pathlib.Path, dict[str, dict]]:
    """The results file and what stays in it: by default W/evaluation/<step>.json with its tasks of
    before, else a new file.

    Raises ValueError where it cannot be written, or is damaged.
    """
    if output is None and "model" not in read_config(path):
        raise ValueError(f"{path} is a Hugging Face folder: give --output=FILE for the results")
    file = (
        pathlib.Path(output)
        if output
        else path / "evaluation" / f"{newest_step(path) if step is None else step}.json"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"output={str(file)!r} cannot be written")
    if output or not file.is_file():
        return file, {}
    try:
        return file, json.loads(file.read_text())["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of an evaluation: {error!r}") from error


def write_results(output: pathlib.Path, subject: Subject, results: dict[str, dict]):
    """The file appears, or changes, as a whole."""
    entries = {"model": subject.identity, "results": results}
    write_text(output, json.dumps(entries, indent=2) + "\n")


def table(results: dict[str, dict]) -> str:
    """A line a metric; of the parts of a group only their score."""
    lines = [("task", "metric", "value", "stderr", "of")]
    for name, entry in results.items():
        is_part = "/" in name and name.split("/")[0] in puzzles.GROUPS
        for metric, pair in entry["metrics"].items():
            if metric == "score" or not is_part:
                error = "" if pair["stderr"] is None else f"{pair['stderr']:.4f}"
                lines.append(
                    (
                        name,
                        metric,
                        f"{pair['value']:.4f}",
                        error,
                        f"{entry['count']} {entry['unit']}",
                    )
                )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = ("<", "<", ">", ">", ">")
    rows = [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])
