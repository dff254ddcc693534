"""Thousands of generated conversations to tokens and back.

    PYTHONPATH=. python tests/data/round_trips.py --count=10000

Prints how many differ; exit code 1 where any does. Minutes on one core.
"""

from __future__ import annotations

import collections
import sys
import time

import tqdm
from absl import app, flags
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.data.conversations import conversations, losses, small_tokenizer

COUNT = flags.DEFINE_integer("count", 10_000, "Conversations.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the conversations.")


def main(argv: list[str]):
    del argv
    tokenizer, start = small_tokenizer(), time.monotonic()
    counts, found = collections.Counter(), []
    bar = tqdm.tqdm(total=COUNT.value, unit=" conversations")

    @seed(SEED.value)
    @settings(
        max_examples=COUNT.value, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(conversations())
    def there_and_back(conversation):
        messages, tools, thinking = conversation
        found.extend(losses(tokenizer, messages, tools, thinking))
        counts["conversations"] += 1
        counts["messages"] += len(messages)
        counts["tool calls"] += sum(len(m.get("tool_calls", ())) for m in messages)
        counts["different"] = len(found)
        bar.update()

    there_and_back()
    bar.close()
    for name, count in counts.items():
        print(f"| {name:<16} | {count:>8,} |")
    print(f"| {'seconds':<16} | {time.monotonic() - start:>8.0f} |")
    sys.exit("\n".join(found[:3]) or 0)


if __name__ == "__main__":
    app.run(main)
