"""Attention for TPU, backward: the five products of a tile in one pass, over the same tiles as the
forward kernel.

A query block keeps the gradient of its queries while it walks over key blocks; the gradients of
keys and values are summed in HBM in float32: a block is fetched, all heads that share it add to it,
it goes back. Fetching the next one waits until the one before is back. Where they stand transposed,
head size x keys, their products fill a MXU of 256, of which head size x queries fill a
half.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.attention.tiles import Tiles
from pallas_kernels.attention.walk import (
    LN2,
    Blocks,
    Keys,
    KeyStream,
    QueryBlock,
    causal_macs,
    head,
    interleaved,
    product,
    query_specs,
)
from pallas_kernels.cost import cost
from pallas_kernels.once import once

# The kernel's state: key blocks seen, the buffer of the sums, whether the next sums are on their
# way in, and for each buffer whether it is on its way out.
SEEN, SLOT, COMING, LEAVING = range(4)


class BackwardQueries(NamedTuple):
    """q and ids as of kernel.Queries. do: gradient of the output, like q. lse: log-sum-exp in units
    of log2, and delta: sum over a head of output x its gradient, less the gradient of the natural
    log-sum-exp, both float32 [B, G, heads, L].
    """

    q: jax.Array
    do: jax.Array
    lse: jax.Array
    delta: jax.Array
    ids: jax.Array


class Sums(NamedTuple):
    """Gradients of keys and of values, float32 [B, M, G x H] or, transposed, [B, G x H, M]; inside
    of the kernel refs, of these in HBM or of two buffers of a block.
    """

    dk: jax.Array
    dv: jax.Array


class _Scratch(NamedTuple):
    """dq: [heads, H, queries]. bias: of a tile, [keys, queries]."""

    keys: Keys
    sums: Sums
    dq: jax.Ref
    bias: jax.Ref
    state: jax.Ref
    key_semaphores: jax.Ref
    sum_semaphores: jax.Ref


@dataclasses.dataclass(frozen=True)
class SumStream:
    """A key block's sums, between HBM and one of two buffers."""

    at: QueryBlock
    hbm: Sums
    buffers: Sums
    state: jax.Ref
    semaphores: jax.Ref  # [2, 2]

    def place(self, ref, j):
        blocks, b = self.at.blocks, self.at.b
        size = self.buffers.dk.shape[1 if blocks.transposed else 2]
        rows, columns = pl.ds(j * blocks.kv, blocks.kv), pl.ds(self.at.g * size, size)
        return ref.at[b, columns, rows] if blocks.transposed else ref.at[b, rows, columns]

    def copies(self, j, slot, *, out: bool):
        for n, (hbm, buffers) in enumerate(zip(self.hbm, self.buffers, strict=True)):
            there, here = self.place(hbm, j), buffers.at[slot]
            source, target = (here, there) if out else (there, here)
            yield pltpu.make_async_copy(source, target, self.semaphores.at[slot, n])

    def start_load(self, j, slot):
        for copy in self.copies(j, slot, out=False):
            copy.start()

    def wait_load(self, j, slot):
        for copy in self.copies(j, slot, out=False):
            copy.wait()

    def start_store(self, j, slot):
        for copy in self.copies(j, slot, out=True):
            copy.start()
        self.state[LEAVING + slot] = 1

    def wait_store(self, slot):
        """Waits until the sums that last left a buffer are in HBM."""

        @pl.when(self.state[LEAVING + slot] == 1)
        def _():
            for copy in self.copies(0, slot, out=True):  # waiting looks at the size alone
                copy.wait()
            self.state[LEAVING + slot] = 0


@dataclasses.dataclass(frozen=True)
class _Backward:
    """The turn of a query block. force: as of the forward kernel."""

    at: QueryBlock
    queries: BackwardQueries
    keys: KeyStream
    sums: SumStream
    dq: jax.Ref
    scratch: _Scratch
    blocks: Blocks
    force: str | None

    @property
    def heads(self) -> int:
        return self.queries.lse.shape[0]

    def run(self):
        at, dq = self.at, self.scratch.dq
        pl.when(at.starts_row())(self.start_row)
        dq[...] = jnp.zeros_like(dq)

        @pl.when(at.first < at.stop)
        def _():
            lax.fori_loop(at.first, at.stop, self.visit, 0)

        def write(h, _):
            head(self.dq, h, dq.shape[1])[...] = (dq[h] * LN2).T.astype(self.dq.dtype)
            return 0

        lax.fori_loop(0, self.heads, write, 0)

    def start_row(self):
        state = self.scratch.state
        for n in range(LEAVING + 2):
            state[n] = 0
        j = self.at.first_of_row()
        self.keys.start(j, 0)
        self.sums.start_load(j, 0)
        state[COMING] = 1

    def visit(self, j, _):
        """Waits for a key block and its sums, starts the copies of the next ones, adds the tile,
        and sends the sums back, unless the next query block begins with the same key block.
        """
        at, state, sums = self.at, self.scratch.state, self.sums
        slot, sum_slot = state[SEEN] % 2, state[SLOT]
        more, next_j = at.following(j)
        moves = more & (next_j != j)
        self.keys.wait(j, slot)
        pl.when(more)(lambda: self.keys.start(next_j, 1 - slot))

        @pl.when(state[COMING] == 1)
        def _():
            sums.wait_load(j, sum_slot)
            state[COMING] = 0

        pl.when(~moves)(lambda: sums.wait_store(1 - sum_slot))

        def fetch_next():
            @pl.when(moves)
            def _():
                sums.wait_store(1 - sum_slot)
                sums.start_load(next_j, 1 - sum_slot)

        self.add_tile(j, slot, sum_slot, fetch_next)
        pl.when(moves | ~more)(lambda: sums.start_store(j, sum_slot))

        @pl.when(moves)
        def _():
            state[COMING] = 1
            state[SLOT] = 1 - sum_slot

        pl.when(~more)(lambda: sums.wait_store(sum_slot))
        state[SEEN] += 1
        return 0

    def add_tile(self, j, slot, sum_slot, between):
        """The tile's share of all three gradients; `between` runs once, after the first group of
        heads.
        """
        add = functools.partial(self.add_groups, slot, sum_slot, between)
        full, visited = self.at.is_full(j), self.at.is_visited(j)
        if self.force is not None:
            add(masked=self.force == "masked")
            return

        @pl.when(full)
        def _():
            add(masked=False)

        @pl.when(visited & ~full)
        def _():
            ids = self.scratch.keys.ids.at[slot]
            self.at.write_bias(self.scratch.bias, self.queries.ids, ids, j)
            add(masked=True)

        pl.when(~visited)(between)

    def add_groups(self, slot, sum_slot, between, *, masked: bool):
        k, v = self.scratch.keys.k[slot], self.scratch.keys.v[slot]
        dk, dv = (ref.at[sum_slot] for ref in self.scratch.sums)

        def group(number, _):
            self.add_heads(k, v, dk, dv, number, masked=masked)
            pl.when(number == 0)(between)
            return 0

        lax.fori_loop(0, self.heads // self.blocks.unroll, group, 0)

    def add_heads(self, k, v, dk, dv, group, *, masked: bool):
        """A tile's work of blocks.unroll heads."""
        queries, bias, size = self.queries, self.scratch.bias, k.shape[-1]

        def scores(h, part, some):
            return (
                product(k[some], head(queries.q, h, size)[part, :], 1, 1),
                product(v[some], head(queries.do, h, size)[part, :], 1, 1),
            )

        def weigh(h, part, some, found):
            s, dprobs = found
            shift = queries.lse[pl.ds(h, 1), part]
            # The bias joins the row first: as a part of the scores it delays the MXU (v6e: half the
            # rate).
            probs = jnp.exp2(s - (shift - bias[some, part] if masked else shift))
            dscores = probs * (dprobs - queries.delta[pl.ds(h, 1), part])
            return probs.astype(v.dtype), dscores.astype(k.dtype)

        def add(h, part, some, probs, dscores):
            q, do = head(queries.q, h, size)[part, :], head(queries.do, h, size)[part, :]
            if self.blocks.transposed:
                dv[:, some] += product(do, probs, 0, 1)
                dk[:, some] += product(q, dscores, 0, 1)
            else:
                dv[some] += product(probs, do, 1, 0)
                dk[some] += product(dscores, q, 1, 0)
            self.scratch.dq[h, :, part] += product(k[some], dscores, 0, 0)

        interleaved(self.blocks.pieces(group), self.blocks.ahead, scores, weigh, add)


def _kernel(tiles, queries, keys, _, dq, sums, scratch: _Scratch, *, blocks, force):
    at = QueryBlock.of_step(tiles, blocks)
    key_stream = KeyStream(at, keys, scratch.keys, scratch.key_semaphores)
    sum_stream = SumStream(at, sums, scratch.sums, scratch.state, scratch.sum_semaphores)
    _Backward(at, queries, key_stream, sum_stream, dq, scratch, blocks, force).run()


@once("blocks", "vmem_bytes", "force")
def backward(
    queries: BackwardQueries,
    keys: Keys,
    tiles: Tiles,
    blocks: Blocks,
    vmem_bytes: int,
    force: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of kernel.forward's q, k and v: [B, L, G x heads x H] in the type of q, and twice
    float32 [B, M, G x H]. Arguments as there.
    """
    batch, length, _ = queries.q.shape
    groups, heads = queries.lse.shape[1:3]
    size = keys.k.shape[-1] // groups
    q_spec, row_spec, ids_spec = query_specs(blocks.q, heads, size)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    vmem = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    sums, axes = (
        ((size, blocks.kv), (0, 2, 1)) if blocks.transposed else ((blocks.kv, size), (0, 1, 2))
    )
    zeros = jnp.zeros([keys.k.shape[axis] for axis in axes], jnp.float32)
    scratch = _Scratch(
        keys=keys.buffers(2, blocks.kv, size),
        sums=Sums(vmem(2, *sums), vmem(2, *sums)),
        dq=vmem(heads, size, blocks.q),
        bias=vmem(blocks.kv, blocks.q),
        state=pltpu.SMEM((LEAVING + 2,), jnp.int32),
        key_semaphores=pltpu.SemaphoreType.DMA((2, 3)),
        sum_semaphores=pltpu.SemaphoreType.DMA((2, 2)),
    )
    dq, (dk, dv) = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, force=force),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups, length // blocks.q),
            in_specs=[
                BackwardQueries(q_spec, q_spec, row_spec, row_spec, ids_spec),
                Keys(*[anywhere] * 3),
                Sums(*[anywhere] * 2),
            ],
            out_specs=[q_spec, Sums(*[anywhere] * 2)],
            scratch_shapes=[scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.q.shape, queries.q.dtype),
            Sums(*[jax.ShapeDtypeStruct(zeros.shape, zeros.dtype)] * 2),
        ],
        input_output_aliases={11: 1, 12: 2},  # the sums
        cost_estimate=cost(
            *[queries.q] * 3, keys.k, keys.v, zeros, zeros, macs=5 * causal_macs(queries.q, keys.k)
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpret.params(),
        name="attention_backward",
    )(tiles, queries, keys, Sums(zeros, zeros))
    return dq, dk.transpose(axes) * LN2, dv.transpose(axes)
