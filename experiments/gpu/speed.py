"""Training and decoding speed of configs/gpu_1b.py on one device."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import gpu_1b
from experiments.gpu.correctness import TOY
from experiments.gpu.measuring import GIB, Section, peak_gib
from glm_jax.config import ModelConfig, from_mapping
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.infer.sampling import SamplingParams
from glm_jax.optim.optimizer import OptimizerConfig
from glm_jax.sharding import MeshConfig, make_mesh
from glm_jax.train.metrics import flops_per_token, peak_flops
from glm_jax.train.state import TrainSpec, build_model, initial_weights
from glm_jax.train.step import StepScalars, compile_step

DOCUMENT = 1024  # tokens of each of a packed row's documents


def model_config(section: Section, **changes) -> ModelConfig:
    fields = gpu_1b.get_config().to_dict()["model"] | changes
    if section.rehearse:
        fields |= TOY | {"compute_dtype": "float32", "attention": "xla", "num_mtp_layers": 0}
    return from_mapping(ModelConfig, fields, "model")


def training(section: Section):
    """Tokens/s and MFU of the training step as configured."""
    _train(section, {})


def training_alternatives(section: Section):
    """The same with JAX's Mosaic GPU kernels for the grouped product."""
    _train(section, {"grouped_matmul": "ragged_dot" if section.rehearse else "mosaic_gpu"})


def _train(section: Section, changes: dict[str, str]):
    config = model_config(section, **changes)
    given = gpu_1b.get_config().to_dict()
    rows, length = given["data"]["batch_size"], given["data"]["sequence_length"]
    if section.rehearse:
        rows, length = 2, 64
    spec = TrainSpec.create(config, from_mapping(OptimizerConfig, given["optimizer"], "optimizer"))
    mesh = make_mesh(MeshConfig(1, 1, 1, 1, 1), jax.devices()[:1])
    start = time.perf_counter()
    state = spec.create_state(mesh, 0)
    tokens = (
        np.random.default_rng(0)
        .integers(0, config.vocab_size, (1, rows, length + 1))
        .astype(np.int32)
    )
    place = np.broadcast_to(np.arange(length, dtype=np.int32), (1, rows, length))
    document = min(DOCUMENT, length // 2)
    batch = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "positions": place % document,
        "segment_ids": place // document + 1,
    }
    batch = jax.device_put(
        batch | {"loss_weights": np.ones(place.shape, np.float32)}, jax.devices()[0]
    )
    scalars = StepScalars(jnp.int32(1), jnp.float32(1e-4), jnp.float32(0.3), jnp.float32(1e-3))
    fields = {
        "attention": config.attention,
        "grouped_matmul": config.grouped_matmul,
        "rows": rows,
        "length": length,
    }
    with jax.set_mesh(mesh):
        program = compile_step(spec, 1e-4, mesh).lower(state, batch, scalars).compile()
        fields["ready_s"] = round(time.perf_counter() - start, 1)
        memory = program.memory_analysis()
        times, losses = [], []
        for _ in range(4 if section.rehearse else 12):
            start = time.perf_counter()
            state, metrics = program(state, batch, scalars)
            losses.append(float(metrics["cross_entropy"]))
            times.append(time.perf_counter() - start)
    speed = rows * length / statistics.median(times[2:])
    useful, peak = flops_per_token(config, length), peak_flops(jax.devices()[0])
    section.record(
        **fields, ms_per_step=round(rows * length / speed * 1e3, 1), tokens_per_s=round(speed),
        tflops=round(useful * speed / 1e12, 1),
        mfu=None if peak is None else round(useful * speed / peak, 4), peak_gib=peak_gib(),
        program_gib=memory
        and round((memory.temp_size_in_bytes + memory.argument_size_in_bytes) / GIB, 2),
        loss=f"{losses[0]:.3f} to {losses[-1]:.3f}",
    )  # fmt: skip


def decoding(section: Section):
    """Tokens/s of the engine while all its rows decode, for one request and for a full batch;
    weights in bfloat16 and in FP8.
    """
    sizes = (
        {"prompt": 16, "context": 64, "rows": 4, "steps": 4}
        if section.rehearse
        else {"prompt": 1024, "context": 1280, "rows": 256}
    )
    steps = sizes.get("steps", 32)
    config = model_config(section, attention="xla", num_mtp_layers=0, max_length=sizes["context"])
    params, router = jax.jit(lambda key: initial_weights(config, key))(jax.random.key(0))
    model = build_model(config, params, router)
    del params, router
    page_size, chunk = (16, 16) if section.rehearse else (256, 128)
    for weights in ("compute", "fp8"):
        engine = Engine(model, EngineConfig(
            context=sizes["context"], num_rows=sizes["rows"], min_rows=1, page_size=page_size,
            num_pages=sizes["rows"] * sizes["context"] // page_size, prefill_chunk=chunk,
            min_chunk=chunk, decode_steps=steps,
            draft_tokens=0, weights=weights, cache_dtype="compute", keep_experts=False,
        ))  # fmt: skip
        for rows in (sizes["rows"],) if section.rehearse else (1, sizes["rows"]):
            fields = {
                "weights": config.compute_dtype if weights == "compute" else weights,
                "batch": rows,
                "prompt": sizes["prompt"],
            }
            section.attempt(
                lambda engine=engine, rows=rows: _decode(engine, rows, sizes["prompt"], steps),
                **fields,
            )
        del engine


def _decode(engine: Engine, rows: int, prompt: int, steps: int, timed: int = 4) -> dict:
    """Submits `rows` prompts, waits until all have their first tokens, and times the calls of the
    engine after that.
    """
    rng, vocab = np.random.default_rng(rows), engine.model_config.vocab_size
    params = SamplingParams(max_new_tokens=1 + steps * (timed + 2), temperature=0)
    requests = [engine.submit(rng.integers(0, vocab, prompt).tolist(), params) for _ in range(rows)]
    start = time.perf_counter()
    while any(len(r.tokens) <= 1 for r in requests):
        engine.step()
    ready = time.perf_counter() - start
    times = []
    for _ in range(timed):
        before = sum(len(r.tokens) for r in requests)
        start = time.perf_counter()
        engine.step()
        times.append(
            (time.perf_counter() - start) / (sum(len(r.tokens) for r in requests) - before)
        )
    for request in requests:
        engine.abort(request)
    for pool in engine.pools:
        pool.forget_all()
    speed = 1 / statistics.median(times)
    return {
        "tokens_per_s": round(speed, 1), "ms_per_token": round(1e3 * rows / speed, 2),
        "prefill_and_compile_s": round(ready, 1),
        "peak_gib": peak_gib(),
    }  # fmt: skip
