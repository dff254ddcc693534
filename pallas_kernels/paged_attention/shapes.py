"""GLM's shapes of attention over a paged cache; blocks for them, tuned or by rule; and what the
report and the tuner put before the compiler. What counts is bytes: a step's schedule only has to be
shorter than the time that HBM takes for its pages.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compiler, fp8_bits, tuning
from pallas_kernels.compiler import Chip, Probe
from pallas_kernels.paged_attention.work import Blocks, read
from pallas_kernels.target import TWO_CORES, WIDE_UNITS, heads_of_core, target_kind, target_platform

FOLDER = pathlib.Path(__file__).parent
PASSES = ("forward",)
HEADS, SIZE, PAGE = 12, 128, 128  # query heads a key-value head, head size, tokens of a page
STEP_BYTES = 2**22  # of a step's pages
# pages of a step times heads of a turn, all written out: more take the compiler minutes and gain
# nothing
TURN_PAGES = 64
TURN_ROWS = 192  # query rows of a turn, unless one head has more
PROMPT_TOKENS = 32  # queries of a block where there are more than FEW_TOKENS
FEW_TOKENS = 8
PROMPT_PAGES = 4  # of a step, for them: more take the compiler minutes


@dataclasses.dataclass(frozen=True)
class Shape:
    """One device's decode call: `length` new tokens of each of `batch` rows, which hold `context`
    tokens at most, `groups` key-value heads. dtype: of the cache.
    """

    batch: int
    context: int
    length: int
    groups: int
    dtype: str

    @property
    def key(self) -> str:
        return _key(self.length, self.groups, HEADS, SIZE, PAGE, self.dtype)

    @property
    def ends(self) -> np.ndarray:
        """Tokens of each row with its new ones: ragged, from an eighth of the context on."""
        return np.random.default_rng(0).integers(
            self.context // 8, self.context, self.batch, endpoint=True
        )


# 96 query and 8 key-value heads of size 128 in both models; their share under tensor parallelism
# over 8 devices, and whole.
SHAPES = {
    "4K": Shape(64, 4096, 1, 8, "bfloat16"),
    "32K": Shape(32, 32_768, 1, 8, "bfloat16"),
    "32K fp8": Shape(32, 32_768, 1, 8, "float8_e4m3fn"),
    "32K, 4 tokens": Shape(32, 32_768, 4, 8, "bfloat16"),
    "32K fp8, 4 tokens": Shape(32, 32_768, 4, 8, "float8_e4m3fn"),
    "32K, one head": Shape(64, 32_768, 1, 1, "bfloat16"),
    "32K fp8, one head": Shape(64, 32_768, 1, 1, "float8_e4m3fn"),
    "128K": Shape(8, 131_072, 1, 8, "bfloat16"),
    "128K fp8": Shape(8, 131_072, 1, 8, "float8_e4m3fn"),
}


def _key(length: int, groups: int, per_group: int, size: int, page_size: int, dtype: str) -> str:
    return f"{length} tokens {groups}x{per_group}x{size} {dtype} page {page_size}"


def num_cores() -> int:
    """Cores of the chip that the current trace is for, which share a kernel's work."""
    return pltpu.get_tpu_info().num_cores if target_platform() == "tpu" else 1


def blocks_for(q_shape, k_pages) -> Blocks:
    """The tuned blocks for queries of a shape [S, L, N, H] and a cache, else some that fit any
    chip.
    """
    _, length, heads, size = q_shape
    groups, page_size = k_pages.shape[2], k_pages.shape[4]
    dtype, kind = k_pages.dtype.name, target_kind()
    found = tuning.lookup(
        FOLDER, kind, f"forward {_key(length, groups, heads // groups, size, page_size, dtype)}"
    )
    return (
        _by_rule(length, groups, heads // groups, size, page_size, dtype, kind)
        if found is None
        else Blocks(**found)
    )


def _by_rule(
    length: int,
    groups: int,
    per_group: int,
    size: int,
    page_size: int,
    dtype: str,
    kind: str | None,
) -> Blocks:
    heads = heads_of_core(groups, _cores_of(kind))
    page_bytes = 2 * heads * page_size * size * jnp.dtype(dtype).itemsize
    join = 2 if kind in WIDE_UNITS else 1
    tokens = length if length <= FEW_TOKENS else PROMPT_TOKENS
    bits = dtype == "float8_e4m3fn" and kind in fp8_bits.CHIPS
    turn = max(
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (n == 1 or n * tokens * per_group <= TURN_ROWS)
    )
    most = TURN_PAGES // turn if length <= FEW_TOKENS else PROMPT_PAGES
    fit = max(join, min(most, STEP_BYTES // page_bytes))
    return Blocks(fit - fit % join, join, tokens, bits, turn)


def _cores_of(kind: str | None) -> int:
    return 2 if kind in TWO_CORES else 1


def chosen_blocks(shape: Shape, pass_: str) -> Blocks:
    del pass_
    return blocks_for((shape.batch, shape.length, shape.groups * HEADS, SIZE), _cache(shape)[0])


def candidates(shape: Shape, pass_: str, chip: Chip) -> list[Blocks]:
    """What the tuner compiles."""
    del pass_
    rule = _by_rule(shape.length, shape.groups, HEADS, SIZE, PAGE, shape.dtype, chip.kind)
    turns = [
        turn
        for turn in (1, 2, 4, 8)
        if heads_of_core(shape.groups, _cores_of(chip.kind)) % turn == 0
    ]
    return [
        dataclasses.replace(rule, pages=pages, turn=turn) for pages in (4, 8, 16) for turn in turns
    ]


def _cache(shape: Shape):
    """The pages that the rows need, of one layer."""
    pages = int(np.sum(-(-shape.ends // PAGE)))
    dims = (1, pages, shape.groups)
    return jax.ShapeDtypeStruct((*dims, SIZE, PAGE), shape.dtype), jax.ShapeDtypeStruct(
        (*dims, PAGE, SIZE), shape.dtype
    )


def probe(shape: Shape, blocks: Blocks, pass_: str) -> Probe:
    """macs: of a turn by the list's mean, so that what its last blocks compute in vain counts as
    time.
    """
    del pass_
    from pallas_kernels.paged_attention import kernel

    ints = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    q = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.groups * HEADS, SIZE), jnp.bfloat16)
    args = (
        q,
        *_cache(shape),
        ints(),
        ints(shape.batch, shape.context // PAGE),
        ints(shape.batch),
        ints(shape.batch),
    )

    def function(*args):
        k_pages, starts_S, counts_S = args[1], *args[-2:]
        works = read(shape.length, k_pages, starts_S, counts_S, blocks, num_cores())
        return kernel.paged_attention(*args, works, SIZE**-0.5, blocks)

    pages, steps = int(np.sum(-(-shape.ends // PAGE))), _steps(shape, blocks.pages)
    rows = -(-shape.length * HEADS // 16) * 16
    total = _macs(shape)
    moved = _page_bytes(shape) * pages + _q_bytes(shape) * rows // (shape.length * HEADS)
    return Probe(
        function,
        args,
        {"paged_attention": total * blocks.turn // (steps * shape.groups)},
        moved,
        _needed(shape),
        total_macs=total,
    )


def _macs(shape: Shape) -> int:
    return int(2 * shape.groups * HEADS * SIZE * shape.length * np.sum(shape.ends))


def _page_bytes(shape: Shape) -> int:
    return 2 * shape.groups * PAGE * SIZE * jnp.dtype(shape.dtype).itemsize


def _q_bytes(shape: Shape) -> int:
    """Queries and results, bfloat16."""
    return 2 * 2 * shape.batch * shape.length * shape.groups * HEADS * SIZE


def _needed(shape: Shape) -> int:
    """Keys and values of each row's own tokens, queries and results."""
    return _page_bytes(shape) * int(np.sum(shape.ends)) // PAGE + _q_bytes(shape)


def public_probes(shape: Shape, pass_: str) -> dict[str, Probe]:
    """JAX's paged and ragged-paged attention with blocks of 16 pages. The first takes one new token
    a row; both read whole blocks.
    """
    del pass_
    out = {f"ragged-paged, {queries} queries": _ragged(shape, queries) for queries in (8, 32)}
    if shape.length == 1:
        out["paged"] = _paged(shape)
    return out


def _steps(shape: Shape, pages: int) -> int:
    return int(np.sum(-(-shape.ends // (PAGE * pages))))


def _visited(shape: Shape, pages: int) -> int:
    """Bytes of keys and values that whole blocks of pages hold."""
    return _page_bytes(shape) * pages * _steps(shape, pages)


def _paged(shape: Shape, pages: int = 16) -> Probe:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    array = jax.ShapeDtypeStruct
    kv = array((shape.groups, _cache(shape)[0].shape[1], PAGE, SIZE), shape.dtype)
    args = (
        array((shape.batch, shape.groups * HEADS, SIZE), jnp.bfloat16), kv, kv,
        array((shape.batch,), jnp.int32),
        array((shape.batch, shape.context // PAGE), jnp.int32),
    )  # fmt: skip
    run = functools.partial(paged_attention, pages_per_compute_block=pages)
    steps = shape.groups * _steps(shape, pages)
    # Queries and results pass as float32, their rows a sublane each.
    moved = _visited(shape, pages) + 2 * _q_bytes(shape)
    return Probe(
        run,
        args,
        {"paged_attention": _macs(shape) // steps},
        moved,
        _needed(shape),
        total_macs=_macs(shape),
    )


def _ragged(shape: Shape, queries: int, pages: int = 16) -> Probe:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    array, ints = jax.ShapeDtypeStruct, lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    args = (
        array((shape.batch * shape.length, shape.groups * HEADS, SIZE), jnp.bfloat16),
        array((_cache(shape)[0].shape[1], PAGE, 2 * shape.groups, SIZE), shape.dtype),
        ints(shape.batch), ints(shape.batch, shape.context // PAGE), ints(shape.batch + 1), ints(1),
    )  # fmt: skip
    scales = {"k_scale": 1.0, "v_scale": 1.0} if shape.dtype == "float8_e4m3fn" else {}
    run = functools.partial(
        ragged_paged_attention, sm_scale=SIZE**-0.5, num_kv_pages_per_block=pages,
        num_queries_per_block=queries,
        vmem_limit_bytes=2**26, **scales,
    )  # fmt: skip
    steps = _steps(shape, pages)
    moved = _visited(shape, pages) + _q_bytes(shape)
    macs = {"ragged_paged_attention_kernel": _macs(shape) // steps}
    return Probe(run, args, macs, moved, _needed(shape), total_macs=_macs(shape))


def work_table() -> list[dict]:
    """Bytes moved over needed, beside JAX's kernels with blocks of 16 pages."""
    out = []
    for name, shape in SHAPES.items():
        ours = probe(shape, Blocks(8, 1, shape.length, False, 1), "forward")
        whole = _visited(shape, 16) + _q_bytes(shape)
        out.append({
            "shape": name, "bytes moved / needed": ours.hbm_bytes / ours.hbm_bytes_needed,
            "of whole blocks of 16 pages": whole / ours.hbm_bytes_needed,
        })  # fmt: skip
    return out


def step_cycles(
    shape: Shape, blocks: Blocks, topology: str, folder: pathlib.Path
) -> tuple[float, float]:
    """*Compiled*: cycles of one step with all its heads on one core, and those that HBM takes for
    the step's pages.
    """
    judged = probe(shape, blocks, "forward")
    cycles = compiler.judge(judged, topology, folder).schedules["paged_attention"].cycles
    chip = compiler.chip(topology)
    steps = _steps(shape, blocks.pages)
    regions = _macs(shape) / judged.macs["paged_attention"] / steps
    return regions * cycles, blocks.pages * _page_bytes(shape) / chip.hbm_bytes_per_cycle
