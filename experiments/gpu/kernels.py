"""The device's own peaks, attention and the grouped product at GLM-4.5's shapes, each
implementation beside the others.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu.measuring import GIB, Section, compiled, first_line, needs_gpu, seconds
from pallas_kernels.attention.api import attention as named_attention
from pallas_kernels.grouped_matmul.api import grouped_matmul

DOCUMENT = 1024  # tokens of each of a packed row's documents


def device(section: Section):
    """What runs this, bfloat16 products and copies at their fastest."""
    found = jax.devices()[0]
    versions = {
        name: importlib.import_module(name).__version__
        for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    }
    memory = (found.memory_stats() or {}).get("bytes_limit", 0) / GIB
    section.record(
        what="device",
        kind=found.device_kind,
        platform_version=found.client.platform_version.replace("\n", " "),
        **versions,
    )
    section.record(what="memory that JAX may use", gib=round(memory, 1))
    if found.platform == "gpu":
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        section.record(
            what="nvidia-smi",
            found=first_line(
                subprocess.run(query, check=False, capture_output=True, text=True).stdout
            ),
        )
    for n in (256,) if section.rehearse else (4096, 8192, 16384):
        section.attempt(functools.partial(_product, n), what=f"bfloat16 product, {n} cubed")
    section.attempt(
        functools.partial(_copy, 2**20 if section.rehearse else 2**32), what="read and write memory"
    )


def _product(n: int) -> dict:
    # random: constants use less power and run faster
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    program, _ = compiled(jnp.matmul, x, x)
    return {"tflops": round(2 * n**3 / seconds(program, x, x, calls=4) / 1e12, 1)}


def _copy(size: int) -> dict:
    x = jnp.ones(size // 4, jnp.float32)
    program, _ = compiled(lambda x: x + 1, x)
    return {"gb_per_s": round(2 * size / seconds(program, x, calls=4) / 1e9)}


def attention(section: Section):
    """TFLOP/s of causal work, 4 N H L (L + 1) / 2 forward and three times that with the gradient,
    for packed rows and whole ones.
    """
    heads, kv_heads, size = (4, 2, 64) if section.rehearse else (96, 8, 128)
    lengths = (256,) if section.rehearse else (4096, 16384, 32768)
    for length in lengths:  # cuDNN first: XLA's programs take long to compile
        for packed in (False, True):
            _attention(section, "cudnn", length, packed, (heads, kv_heads, size))
    for length in lengths:
        _attention(section, "xla", length, True, (heads, kv_heads, size))


def _attention(section: Section, name: str, length: int, packed: bool, sizes: tuple[int, int, int]):
    heads, kv_heads, size = sizes
    fields = {"implementation": name, "length": length, "rows": "packed" if packed else "whole"}
    if name == "cudnn" and not needs_gpu(section, f"attention by cuDNN, {fields['rows']} rows"):
        return
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, (1, length, n, size), jnp.bfloat16)
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    segments = jnp.arange(length)[None] // min(DOCUMENT, length // 2) + 1 if packed else None
    work = 4 * heads * size * length * (length + 1) / 2

    def forward(q, k, v, segments, implementation=name):
        return named_attention(q, k, v, segments, scale=size**-0.5, implementation=implementation)

    def both(q, k, v, dout, segments):
        out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, segments), q, k, v)
        return out, *pull(dout)

    def timed(function, work, *args):
        program, facts = compiled(function, *args)
        found = seconds(program, *args)
        return {"ms": round(found * 1e3, 2), "tflops": round(work / found / 1e12, 1), **facts}

    fits = section.attempt(
        lambda: timed(forward, work, q, k, v, segments), **fields, what="forward"
    )
    if fits and not section.attempt(
        lambda: timed(both, 3 * work, q, k, v, dout, segments),
        **fields,
        what="forward and backward",
    ):
        return
    if name == "cudnn" and length <= 4096:

        def beside_reference():
            # float32 scores of all heads would not fit
            few = q[:, :, : 2 * heads // kv_heads], k[:, :, :2], v[:, :, :2]
            ids = jnp.ones((1, length), jnp.int32) if segments is None else segments
            mine = jax.jit(forward)(*few, segments)
            theirs = jax.jit(functools.partial(forward, implementation="reference"))(
                *(x.astype(jnp.float32) for x in few), ids
            )
            return {"largest_difference": relative(mine, theirs)}

        section.attempt(beside_reference, **fields, what="beside the plain one in float32")


def relative(mine, theirs) -> float:
    """Largest difference over the largest value."""
    mine, theirs = (np.asarray(x, np.float64) for x in (mine, theirs))
    return float(f"{np.max(np.abs(mine - theirs)) / np.max(np.abs(theirs)):.2g}")


def grouped(section: Section):
    """TFLOP/s of useful work, 2 R D F, bfloat16, uneven groups; values and gradients beside one
    product a group.
    """
    rows, groups = (256, 4) if section.rehearse else (65536, 16)
    # GLM-4.5-Air's gate and down, GLM-4.5's gate
    widths = [(64, 96)] if section.rehearse else [(4096, 1408), (1408, 4096), (5120, 1536)]
    shares = np.random.default_rng(0).dirichlet(np.full(groups, 8.0))
    sizes = np.floor(shares * rows).astype(np.int32)
    sizes[-1] += rows - sizes.sum()
    for depth, width in widths:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (rows, depth), jnp.bfloat16)
        w = jax.random.normal(keys[1], (groups, depth, width), jnp.bfloat16) * depth**-0.5
        dy = jax.random.normal(keys[2], (rows, width), jnp.bfloat16)
        fields = {"rows": rows, "groups": groups, "d": depth, "f": width}
        _grouped(section, fields, sizes, x, w, dy)


def _grouped(section: Section, fields: dict, sizes: np.ndarray, x, w, dy):
    ends = np.cumsum(sizes)
    work = 2 * fields["rows"] * fields["d"] * fields["f"]

    def a_product_each(x, w, sizes_E):
        # known when compiled, which a router's choice never is: the most that a grouped product
        # could reach
        del sizes_E
        return jnp.concatenate(
            [
                x[end - size : end] @ w[i]
                for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
            ]
        )

    implementations: dict[str, Callable] = {"one product a group, sizes known": a_product_each}
    for name in ("mosaic_gpu", "batched", "ragged_dot"):
        if name != "mosaic_gpu" or needs_gpu(section, "grouped product by Mosaic GPU"):
            implementations[name] = functools.partial(grouped_matmul, implementation=name)
    expected = None
    for name, product in implementations.items():

        def both(x, w, dy, sizes_E, product=product):
            y, pull = jax.vjp(lambda x, w: product(x, w, sizes_E), x, w)
            return y, *pull(dy)

        def measure(function, work, *args):
            nonlocal expected
            program, facts = compiled(function, *args)
            found = seconds(program, *args)
            out = program(*args)
            result = {"ms": round(found * 1e3, 2), "tflops": round(work / found / 1e12, 1), **facts}
            if isinstance(out, tuple):
                expected = out if expected is None else expected
                result["largest_difference"] = max(
                    relative(*pair) for pair in zip(out, expected, strict=True)
                )
            return result

        given = jnp.asarray(sizes)
        if section.attempt(
            functools.partial(measure, product, work, x, w, given),
            implementation=name,
            what="forward",
            **fields,
        ):
            run = functools.partial(measure, both, 3 * work, x, w, dy, given)
            section.attempt(run, implementation=name, what="forward and backward", **fields)
