"""Writes conversations that open reinforcement learning: puzzles asked in chat and answered in GLM-4.5's format, with worked steps.

python -m experiments.cold_start --output=W/cold_start.jsonl --generators=chain_sum --count=500
"""

from __future__ import annotations

import itertools
import pathlib
import re

from absl import flags

from experiments import entry
from glm_jax.rewards import puzzles
from glm_jax.sft.conversations import write_conversations

OUTPUT = flags.DEFINE_string("output", None, "JSONL file of conversations to write.")
GENERATORS = flags.DEFINE_list("generators", ["chain_sum"], "Generators of reasoning-gym, see glm_jax/rewards/puzzles.py.")
COUNT = flags.DEFINE_integer("count", 500, "Conversations of each generator.", lower_bound=1)
FIRST = flags.DEFINE_integer("first", 1_000_000, "Seed of the first, away from those that RL draws.", lower_bound=0)


def partial_sums(question: str) -> str:
    """Left to right: '15 - 43 - 75' becomes '15 - 43 = -28\\n-28 - 75 = -103'."""
    first, *terms = re.findall(r"(?:[+-] )?\d+", question.rpartition(":")[2])
    lines, total = [], int(first)
    for term in terms:
        before, total = total, total + int(term.replace(" ", ""))
        lines.append(f"{before} {term} = {total}")
    return "\n".join(lines)


WORKED = {"chain_sum": partial_sums}  # generator -> reasoning; the others answer without


def conversation(puzzle: puzzles.Puzzle) -> dict:
    work = WORKED.get(puzzle.generator)
    answer = {"role": "assistant", "content": f"\\boxed{{{puzzle.answer}}}"}
    if work is not None:
        answer["reasoning_content"] = work(puzzle.question)
    return {"messages": [{"role": "user", "content": puzzles.chat_request(puzzle)}, answer], "thinking": True}


def main(argv: list[str]):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; flags start with --")
    found = []
    for generator in GENERATORS.value:
        found += map(conversation, itertools.islice(puzzles.puzzles(generator, "train", FIRST.value), COUNT.value))
    write_conversations(pathlib.Path(OUTPUT.value), found)
    print(f"{len(found)} conversations in {OUTPUT.value}")


if __name__ == "__main__":
    flags.mark_flag_as_required("output")
    entry.run(main)
