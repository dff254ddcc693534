"""Thousands of requests of all kinds and manners on one server with a tiny model, weights swapped
in between.

    PYTHONPATH=tests:. python tests/serve/soak.py --num_requests=2000 --num_swaps=3

Prints what became of them, pages lost, requests answered twice, and the memory of the process,
server and clients together. Exit code 1 where a page is lost, a request is answered twice or not at
all. Takes minutes on two cores.
"""

from __future__ import annotations

import logging
import sys

from absl import app, flags

from glm_jax.devices import choose_platforms
from tests.serve.serving import serving, tiny_engine
from tests.serve.soaking import Report, soak

NUM_REQUESTS = flags.DEFINE_integer("num_requests", 2000, "Requests.", lower_bound=1)
NUM_SWAPS = flags.DEFINE_integer("num_swaps", 3, "Swaps of weights, spread evenly.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Of the requests.")
NUM_NUISANCES = flags.DEFINE_integer(
    "num_nuisances", 200, "Silent, dripping and half-closed connections beside them.", lower_bound=0
)
DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", 0, "Guessed by the MTP block.", lower_bound=0)


def failures(report: Report) -> list[str]:
    bad = [
        outcome
        for outcome in report.outcomes
        if "no answer" in outcome or "not to the end" in outcome or " 500" in outcome
    ]
    bad += [
        f"half-closed: {answer}" for answer in report.half_closed if answer not in ("200", "429")
    ]
    bad += ["/health took over a second"] * (report.health_seconds > 1 or not report.health_answers)
    bad += ["no half-closed client was answered"] * (
        NUM_NUISANCES.value > 2 and not report.half_closed["200"]
    )
    return (
        bad
        + ["a page is lost"] * bool(report.pages_lost)
        + ["answered twice"] * bool(report.answered_twice)
    )


def main(argv: list[str]):
    del argv
    choose_platforms()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    engine = tiny_engine(draft_tokens=DRAFT_TOKENS.value)
    with serving(engine, queue_limit=16) as running:
        # compiles what there is to compile: memory is compared behind it
        soak(running, 50, 0, seed=SEED.value + 1)
        report = soak(running, NUM_REQUESTS.value, NUM_SWAPS.value, SEED.value, NUM_NUISANCES.value)
        status = running.service.status
    for outcome, count in sorted(report.outcomes.items()):
        print(f"| {outcome:<32} | {count:>8,} |")
    rows = {
        "requests": NUM_REQUESTS.value, "seconds": round(report.seconds),
        "swaps of weights": report.swaps,
        "tokens sampled": status.sampled_tokens,
        "half-closed clients answered": sum(report.half_closed.values()),
        "longest answer of /health, ms": round(1000 * report.health_seconds),
        "pages lost": report.pages_lost, "answered twice": report.answered_twice,
    } | {f"memory at the {when}, MiB": size >> 20 for when,
    size in zip(("start", "middle", "end"), report.rss, strict=True)}  # fmt: skip
    for name, value in rows.items():
        print(f"| {name:<32} | {value:>8,} |")
    sys.exit("; ".join(failures(report)) or 0)


if __name__ == "__main__":
    app.run(main)
