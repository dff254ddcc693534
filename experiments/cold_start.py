"""Writes conversations that open reinforcement learning: puzzles asked in chat and answered in GLM-4.5's format.

Some show their work and some answer at once; which of both pays is what reinforcement learning has to find out.

python -m experiments.cold_start --output=W/cold_start.jsonl --generators=aiw,chain_sum --count=600
"""

from __future__ import annotations

import pathlib
import re

import numpy as np
from absl import flags

from experiments import entry
from glm_jax.rewards import puzzles
from glm_jax.sft.conversations import write_conversations

OUTPUT = flags.DEFINE_string("output", None, "JSONL file of conversations to write.")
GENERATORS = flags.DEFINE_list("generators", ["aiw"], "Generators of reasoning-gym, see glm_jax/rewards/puzzles.py.")
COUNT = flags.DEFINE_integer("count", 600, "Conversations of each generator, at most.", lower_bound=1)
WORKED_SHARE = flags.DEFINE_float("worked_share", 0.5, "Share that shows its work; the others answer at once.", 0.0, 1.0)
SEED = flags.DEFINE_integer("seed", 0, "Of who does.", lower_bound=0)
FIRST = flags.DEFINE_integer("first", 1_000_000, "Seed of the first, away from those that RL draws.", lower_bound=0)


def partial_sums(question: str) -> str:
    """Left to right: '15 - 43 - 75' becomes '15 - 43 = -28\\n-28 - 75 = -103'."""
    first, *terms = re.findall(r"(?:[+-] )?\d+", question.rpartition(":")[2])
    lines, total = [], int(first)
    for term in terms:
        before, total = total, total + int(term.replace(" ", ""))
        lines.append(f"{before} {term} = {total}")
    return "\n".join(lines)


def and_herself(question: str) -> str:
    """She is the sister, or friend, whom her own count leaves out: of '4 sisters' becomes '4 + 1 = 5'."""
    others = int(re.search(r"(\d+) (?:sisters|female friends)", question)[1])
    return f"{others} + 1 = {others + 1}"


WORKED = {"chain_sum": partial_sums, "aiw": and_herself}  # generator -> its work; the others have none


def conversation(puzzle: puzzles.Puzzle, worked: bool) -> dict:
    """worked: the answer shows its work, where we know how."""
    answer = {"role": "assistant", "content": f"\\boxed{{{puzzle.answer}}}"}
    if worked and puzzle.generator in WORKED:
        answer["reasoning_content"] = WORKED[puzzle.generator](puzzle.question)
    return {"messages": [{"role": "user", "content": puzzles.chat_request(puzzle)}, answer], "thinking": True}


def main(argv: list[str]):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; flags start with --")
    found, lots = [], np.random.default_rng(SEED.value)
    for generator in GENERATORS.value:
        chosen = puzzles.distinct(generator, "train", COUNT.value, FIRST.value)
        found += [conversation(puzzle, lot < WORKED_SHARE.value) for puzzle, lot in zip(chosen, lots.random(len(chosen)), strict=True)]
    write_conversations(pathlib.Path(OUTPUT.value), found)
    print(f"{len(found)} conversations in {OUTPUT.value}")


if __name__ == "__main__":
    flags.mark_flag_as_required("output")
    entry.run(main)
