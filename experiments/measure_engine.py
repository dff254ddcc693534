"""What the engine's formats cost in agreement and its drafts win in speed, on a trained model and
its held-out text.

    python -m experiments.measure_engine --workdir=runs/demo/run

Prints two tables: log-probabilities of sampled tokens, engine beside the training forward in the
model's own precision, for each format of weights and cache; and tokens a pass, accepted drafts and
tokens/s for each number of drafts.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

import numpy as np
from absl import flags
from flax import nnx

from data.held_out import HeldOutBatches
from data.pipeline import DataConfig
from experiments import entry
from glm_jax import load
from glm_jax.config import from_mapping
from glm_jax.infer.agreement import agreement
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.infer.sampling import SamplingParams
from glm_jax.model.transformer import GLM
from glm_jax.run.checkpoints import read_config

WORKDIR = flags.DEFINE_string("workdir", None, "The work directory of a finished run.")
PROMPTS = flags.DEFINE_integer(
    "prompts",
    16,
    "The number of prompts, each the beginning of a held-out document.",
    lower_bound=1,
)
PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 32, "The number of tokens of a prompt.", lower_bound=1
)
NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 128, "The number of tokens sampled after each prompt.", lower_bound=1
)
DRAFTS = flags.DEFINE_integer(
    "drafts", 3, "The maximum number of draft tokens to try.", lower_bound=0
)
# (compute type, weights, cache)
FORMATS = [
    ("float32", "compute", "compute"), ("bfloat16", "compute", "compute"),
    ("float32", "fp8", "compute"), ("bfloat16", "fp8", "compute"),
    ("bfloat16", "fp8", "float8_e4m3fn"), ("float32", "int8", "compute"),
]  # fmt: skip


def held_out_prompts(workdir: pathlib.Path) -> list[list[int]]:
    """The first tokens of held-out documents that have so many."""
    config = from_mapping(DataConfig, read_config(workdir)["data"], "data")
    prompts, length = [], PROMPT_TOKENS.value
    for batch in HeldOutBatches(config, 0, 1, None):
        for tokens, positions, segments in zip(
            batch["tokens"], batch["positions"], batch["segment_ids"], strict=True
        ):
            for start in np.flatnonzero((positions == 0) & (segments > 0)):
                if positions[start : start + length].tolist() == list(range(length)):
                    prompts.append(tokens[start : start + length].tolist())
        if len(prompts) >= PROMPTS.value:
            return prompts[: PROMPTS.value]
    raise ValueError(
        f"{workdir}: only {len(prompts)} held-out documents of {length} tokens,"
        f" --prompts={PROMPTS.value}"
    )


def engine(model: GLM, rows: int, **settings) -> Engine:
    context, page_size = PROMPT_TOKENS.value + NEW_TOKENS.value + 1, 16
    plain = EngineConfig(
        context=context, num_rows=rows, page_size=page_size,
        num_pages=rows * -(-(context + 8) // page_size),
        prefill_chunk=64, min_rows=1, min_chunk=1, decode_steps=16,
        draft_tokens=0, weights="compute", cache_dtype="compute", keep_experts=False,
    )  # fmt: skip
    return Engine(model, dataclasses.replace(plain, **settings))


def sampling(temperature: float) -> list[SamplingParams]:
    length = NEW_TOKENS.value
    return [
        SamplingParams(max_new_tokens=length, temperature=temperature, seed=i)
        for i in range(PROMPTS.value)
    ]


def formats(model: GLM, prompts: list[list[int]]):
    print(f"{'compute':10}{'weights':10}{'cache':16}{'mean':>10}{'max':>10}{'experts differ':>16}")
    for compute, weights, cache in FORMATS:
        other = GLM(dataclasses.replace(model.config, compute_dtype=compute), rngs=nnx.Rngs(0))
        nnx.update(other, nnx.state(model))
        requests = engine(
            other, len(prompts), weights=weights, cache_dtype=cache, keep_experts=True
        ).generate(prompts, sampling(1.0))
        found = agreement(model, requests, replay=False)
        mean, largest = found["logprob_difference_mean"], found["logprob_difference_max"]
        print(
            f"{compute:10}{weights:10}{cache:16}{mean:10.1e}{largest:10.1e}"
            f"{found['experts_differ']:16.2%}",
            flush=True,
        )


def drafts(model: GLM, prompts: list[list[int]]):
    print(
        f"\n{'rows':>5}{'temperature':>13}{'drafts':>8}{'tokens/pass':>13}{'accepted':>10}"
        f"{'tokens/s':>10}{'speed-up':>10}"
    )
    for rows in sorted({1, len(prompts)}):
        for temperature in (0.0, 1.0):
            plain = None
            for count in range(DRAFTS.value + 1 if model.mtp is not None else 1):
                per_pass, accepted, speed = timed(model, prompts, rows, temperature, count)
                plain = plain or speed
                print(
                    f"{rows:5}{temperature:13}{count:8}{per_pass:13.2f}{accepted:10.1%}"
                    f"{speed:10,.0f}{speed / plain:10.2f}",
                    flush=True,
                )


def timed(
    model: GLM, prompts: list[list[int]], rows: int, temperature: float, count: int
) -> tuple[float, float, float]:
    """With `count` drafts: tokens a pass, share of the drafts that is accepted, tokens a second."""
    ours, chosen = engine(model, rows, draft_tokens=count), slice(0, max(rows, 4))
    times, requests = [], []
    for _ in range(4):  # the first compiles
        for pool in ours.pools:
            pool.forget_all()
        start = time.perf_counter()
        requests = ours.generate(prompts[chosen], sampling(temperature)[chosen])
        times.append(time.perf_counter() - start)
    tokens, passes = sum(len(r.tokens) - 1 for r in requests), sum(r.passes for r in requests)
    accepted = sum(r.accepted for r in requests) / max(passes * count, 1)
    return tokens / passes, accepted, tokens / min(times)


def main():
    workdir = pathlib.Path(entry.given(WORKDIR))
    prompts = held_out_prompts(workdir)
    model, _ = load(workdir)
    formats(model, prompts)
    drafts(model, prompts)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    entry.run(main)
