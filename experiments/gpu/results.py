"""measurements.jsonl as the tables of gpu.md."""

from __future__ import annotations

import json
import pathlib

TITLES = {
    "device": "Device", "correctness": "Correctness beside the CPU in float32",
    "training": "Training step of configs/gpu_1b.py",
    "training_alternatives": "The same with other implementations",
    "decoding": "Decoding of configs/gpu_1b.py by the engine",
    "attention": "Attention, bfloat16", "grouped": "Grouped product, bfloat16",
}  # fmt: skip
NOTES = {
    "correctness": (
        "Norm of the difference over the norm; `greedy tokens equal`: share, up to the first that"
        " differs."
    ),
    "training": (
        "MFU counts useful FLOPs (glm_jax.train.metrics) over the data sheet's dense bfloat16 peak."
        " Rows are packed with documents of 1,024 tokens. `program_gib`: what the compiler planned;"
        " `ready_s`: making the weights and compiling."
    ),
    "decoding": (
        "While all rows decode; greedy, random weights and prompts, no drafts."
        " `prefill_and_compile_s` is mostly compiling."
    ),
    "attention": (
        "96 query heads, 8 key-value heads of 128, one row; work as for the causal half of a row,"
        " packed or not."
    ),
    "grouped": (
        "Differences are from one product a group, which knows the sizes when it is compiled."
    ),
}


def read(output: pathlib.Path) -> list[dict]:
    """All records; a line that was cut short is dropped."""
    records, path = [], output / "measurements.jsonl"
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def write(output: pathlib.Path, command: str, sections):
    """gpu.md: one table a section, columns as they first occur, and what became of each section."""
    records = read(output)
    lines = ["# On a GPU", "", f"    {command}", ""]
    for name in sections:
        mine = [
            {key: value for key, value in r.items() if key != "section"}
            for r in records
            if r["section"] == name
        ]
        ends, rows = [r for r in mine if "status" in r], [r for r in mine if "status" not in r]
        lines += [f"## {TITLES[name]}", ""]
        lines += [NOTES[name], ""] if name in NOTES else []
        lines += table(rows)
        lines += [
            f"Section: {', '.join(str(value) for value in end.values())}." for end in ends
        ] + [""]
    (output / "gpu.md").write_text("\n".join(lines), "utf-8")


def table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if "error" in columns:  # last
        columns.append(columns.pop(columns.index("error")))
    if not rows:
        return []
    body = ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body, ""]


def cell(value) -> str:
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, int | float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
