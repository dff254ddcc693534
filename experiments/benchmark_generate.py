"""Generation speed on this machine beside transformers' `generate`: same model, prompts, lengths
and precision, in one run.

    python -m experiments.benchmark_generate --config=configs/bench.py \
        --config.model.scan_layers=False

64 requests of mixed length, and one alone; greedy, and every request runs to its length. Each side
warms up, then the sides take turns. Theirs runs in left-padded batches, of all requests or of those
alike in length, whatever is fastest. Ours is also shown without continuous batching (a new batch
begins when the last one has ended) and, where the model has an MTP block, with drafts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from absl import flags
from ml_collections import config_flags

from experiments import entry
from experiments.benchmark_sides import Workload, our_generation, their_generation

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The model to time: a file of configs/, computed in float32."
)
REQUESTS = flags.DEFINE_integer(
    "requests", 64, "The number of requests of mixed length.", lower_bound=2
)
ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "The number of timed rounds of each side.", lower_bound=1
)
PROMPT = flags.DEFINE_list(
    "prompt_tokens", ["16", "128"], "The lengths of the shortest and the longest prompt, in tokens."
)
NEW = flags.DEFINE_list(
    "new_tokens",
    ["16", "256"],
    "The lengths of the shortest and the longest continuation, in tokens.",
)


def workload(vocab_size: int, count: int) -> Workload:
    """Random prompts, lengths uniform between the flags' bounds."""
    rng = np.random.default_rng(0)
    lengths, new = (
        rng.integers(int(low), int(high) + 1, count) for low, high in (PROMPT.value, NEW.value)
    )
    return Workload([rng.integers(0, vocab_size, n).tolist() for n in lengths], new.tolist())


def race(sides: dict[str, Callable[[], None]], tokens: int) -> dict[str, float]:
    """Tokens/s of the median round; prints a line a side."""
    seconds = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(ROUNDS.value):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(
            f"  {name:42} {tokens / statistics.median(values):8,.0f} tokens/s   ({min(values):.2f}"
            f" to {max(values):.2f} s)",
            flush=True,
        )
    return {name: tokens / statistics.median(values) for name, values in seconds.items()}


def main():
    run = entry.run_config(CONFIG.value)
    for count in (REQUESTS.value, 1):
        work = workload(run.model.vocab_size, REQUESTS.value)
        if count == 1:  # of middling length
            work = Workload(work.prompts[:1], [int(np.mean(work.new_tokens))])
        print(
            f"{count} requests, {sum(map(len, work.prompts))} prompt tokens, {sum(work.new_tokens)}"
            " new tokens",
            flush=True,
        )
        sides = {"ours": our_generation(run, work, rows=count)}
        if count > 1:
            rows = max(2, count // 4)
            sides[f"ours, {rows} rows"] = our_generation(run, work, rows=rows)
            sides[f"ours, {rows} rows, batch after batch"] = our_generation(
                run, work, rows=rows, continuous=False
            )
        if run.model.num_mtp_layers:
            sides["ours, 1 draft"] = our_generation(run, work, rows=count, drafts=1)
        for size in sorted({count, max(1, count // 4)}):
            sides[f"transformers, batches of {size}"] = their_generation(run, work, size)
        speed = race(sides, sum(work.new_tokens))
        best = max(value for name, value in speed.items() if name.startswith("transformers"))
        print(f"  ours / theirs: {speed['ours'] / best:.2f}\n", flush=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    entry.run(main)
