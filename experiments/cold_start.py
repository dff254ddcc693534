"""Writes conversations that a model is fine-tuned on before reinforcement learning: puzzles asked
in chat, answered in GLM-4.5's format.

Some show their work and are right; the others guess at once, with the answer of another puzzle. The
fine-tuned model does both, and reinforcement learning has to find out which pays. `calculator` is
the environment of glm_jax/envs/calculator.py: to show one's work is to call its tool, as its expert
does, and its tasks are written beside the conversations.

python -m experiments.cold_start --output=W/cold_start.jsonl --generators=aiw,chain_sum --count=1500
python -m experiments.cold_start --output=W/cold_start.jsonl --generators=calculator \
    --tasks=W --count=4000 --worked_share=0.3
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

import numpy as np
from absl import flags

from experiments import calculator_start, entry
from glm_jax.files import write_json_lines
from glm_jax.rewards import puzzles
from glm_jax.sft.conversations import write_conversations

OUTPUT = flags.DEFINE_string("output", None, "The JSONL file of conversations to write.")
GENERATORS = flags.DEFINE_list(
    "generators",
    ["aiw"],
    "What makes the puzzles: reasoning-gym's aiw and chain_sum, or calculator.",
)
TASKS = flags.DEFINE_string(
    "tasks",
    None,
    "The folder of train.jsonl and held_out.jsonl, to which the calculator's tasks are written.",
)
COUNT = flags.DEFINE_integer(
    "count", 1500, "The maximum number of conversations of each generator.", lower_bound=1
)
WORKED_SHARE = flags.DEFINE_float(
    "worked_share", 0.5, "Share that shows its work; the others guess.", 0.0, 1.0
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seeds the choice of conversations that show their work, and the guesses.",
    lower_bound=0,
)
FIRST = flags.DEFINE_integer(
    "first",
    1_000_000,
    "The seed of the first puzzle; it must be far from those that RL trains on.",
    lower_bound=0,
)


def partial_sums(question: str) -> str:
    """Left to right: '15 - 43 - 75' becomes '15 - 43 = -28\\n-28 - 75 = -103'."""
    first, *terms = re.findall(r"(?:[+-] )?\d+", question.rpartition(":")[2])
    lines, total = [], int(first)
    for term in terms:
        before, total = total, total + int(term.replace(" ", ""))
        lines.append(f"{before} {term} = {total}")
    return "\n".join(lines)


def and_herself(question: str) -> str:
    """She is the sister, or friend, whom her own count leaves out: '4 sisters' becomes '4 sisters
    and herself: 4 + 1 = 5'.
    """
    found = re.search(r"(\d+) (sisters|female friends)", question)
    if found is None:
        raise ValueError(f"{question!r} counts neither sisters nor female friends")
    count, who = found.groups()
    return f"{count} {who} and herself: {count} + 1 = {int(count) + 1}"


WORKED = {"chain_sum": partial_sums, "aiw": and_herself}  # generator -> its work
CALCULATOR = "calculator"


def conversation(puzzle: puzzles.Puzzle, guess: str | None) -> dict:
    """Answered with its work and the right answer, or, where there is a guess, with the guess
    alone.
    """
    if guess is None:
        answer = {
            "content": f"\\boxed{{{puzzle.answer}}}",
            "reasoning_content": WORKED[puzzle.generator](puzzle.question),
        }
    else:
        answer = {"content": f"\\boxed{{{guess}}}"}
    messages = [
        {"role": "user", "content": puzzles.chat_request(puzzle)},
        {"role": "assistant"} | answer,
    ]
    return {"messages": messages, "thinking": True}


def conversations(
    generator: str, count: int, worked_share: float, first: int, lots: np.random.Generator
) -> list[dict]:
    """Of `count` different training puzzles, the share `worked_share` shows its work; the others
    get another puzzle's answer.

    Raises ValueError for a generator whose work is not known here.
    """
    if generator not in WORKED:
        raise ValueError(
            f"generators: {generator!r} is not one of {', '.join(WORKED)}, {CALCULATOR}, whose work"
            " this file can show"
        )
    chosen = puzzles.distinct(generator, "train", count, first)
    guesses = lots.permutation([puzzle.answer for puzzle in chosen])
    works = lots.random(len(chosen)) < worked_share
    return [
        conversation(p, None if work else str(guess))
        for p, guess, work in zip(chosen, guesses, works, strict=True)
    ]


def made_by(generator: str, lots: np.random.Generator) -> list[dict]:
    if generator == CALCULATOR:
        return calculator_start.conversations(COUNT.value, WORKED_SHARE.value, lots)
    return conversations(generator, COUNT.value, WORKED_SHARE.value, FIRST.value, lots)


def main():
    folder = TASKS.value
    if (folder is not None) != (CALCULATOR in GENERATORS.value):
        raise ValueError(f"--tasks={folder}: goes with --generators={CALCULATOR}")
    lots = np.random.default_rng(SEED.value)
    found = [c for generator in GENERATORS.value for c in made_by(generator, lots)]
    write_conversations(pathlib.Path(entry.given(OUTPUT)), found)
    print(f"{len(found)} conversations in {OUTPUT.value}")
    if folder is not None:
        for split in ("train", "held_out"):
            tasks = calculator_start.tasks(split)
            file = pathlib.Path(folder) / f"{split}.jsonl"
            write_json_lines(file, [dataclasses.asdict(task) for task in tasks])
            print(f"{len(tasks)} tasks in {file}")


if __name__ == "__main__":
    flags.mark_flag_as_required("output")
    entry.run(main)
