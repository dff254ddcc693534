"""The decode GEMM, a grouped matmul of small batches, for TPU: few tokens a group, so that reading
the matrices is all that costs. No gradient.

All rows stay in VMEM. Only matrices of groups that have rows are read, each once, as blocks of
whole columns, where they lie in a stack of all layers' matrices. FP8 and int8 values become
bfloat16 as they are, which is exact. The scale of each 128 x 128 block (FP8) multiplies its float32
product, where it costs R / 128 as much; that of a column (int8) the sum of its products.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import fp8_bits, interpret, tuning
from pallas_kernels.cost import cost
from pallas_kernels.once import once

BLOCK = 128  # rows and columns of a matrix that share a scale
ALIGNMENT = {"bfloat16": 16, "float32": 8}  # rows of a register
FP8, INT8 = jnp.float8_e4m3fn, jnp.int8


@dataclasses.dataclass(frozen=True)
class Blocks:
    """columns: of a step's block of a matrix. For FP8, depth: rows of one product, 128 or 256 as
    the MXU is wide; bits: where rows are bfloat16, unpack values by fp8_bits, for chips
    without a conversion of their own.
    """

    columns: int
    depth: int
    bits: bool


@once("alignment", "blocks", "dtype")
def few_rows_matmul(
    x_RK, w_EKN, steps_4G, *, scale=None, first=0, alignment: int, blocks: Blocks, dtype=None
) -> jax.Array:
    """y_r = x_r w_(first + g) for the group g that row r belongs to.

    Args:
      x_RK: rows, bfloat16 or float32, as steps_of says.
      w_EKN: matrices, K and N multiples of 128, one a group and maybe others: of x's type, or
        float8_e4m3fn or int8 with a scale.
      steps_4G: as steps_of gives them; all groups' tiles are at most R rows.
      scale: float32 [matrices, K / 128, N / 128], factor on each 128 x 128 block of w (FP8), or
        [matrices, 1, N], on each column (int8).
      first: int32, index of the first group's matrix.
      alignment: rows of a tile, a multiple of 16 (bfloat16) or 8 (float32) that divides R, or R
        itself.
      blocks: see few_rows_shapes.blocks_for. dtype: of the result, None: x's type.

    Returns:
      [R, N]. Rows between groups get what x holds there times a group's matrix; past the last group
      zeros.

    Raises:
      ValueError: for shapes, types or blocks that do not fit, and where there is neither a TPU nor
        interpret.on.
    """
    return _call(
        "few_rows_matmul", _whole, x_RK, [w_EKN], [scale], steps_4G, first, alignment, blocks, dtype
    )


@once("alignment", "blocks")
def few_rows_swiglu(
    x_RD,
    gate_EDF,
    up_EDF,
    steps_4G,
    *,
    gate_scale=None,
    up_scale=None,
    first=0,
    alignment: int,
    blocks: Blocks,
) -> jax.Array:
    """silu(x_r gate_g) * (x_r up_g), [R, F], else as few_rows_matmul. The activation is computed in
    float32.
    """
    return _call(
        "few_rows_swiglu",
        _swiglu,
        x_RD,
        [gate_EDF, up_EDF],
        [gate_scale, up_scale],
        steps_4G,
        first,
        alignment,
        blocks,
    )


def one_matmul(x_RK, w_EKN, index, *, scale=None, blocks: Blocks, dtype=None) -> jax.Array:
    """x w_index, [R, N] for any number of rows; else as few_rows_matmul."""
    steps = steps_of(jnp.full(1, len(x_RK), jnp.int32), len(x_RK))
    return few_rows_matmul(
        x_RK,
        w_EKN,
        steps,
        scale=scale,
        first=index,
        alignment=len(x_RK),
        blocks=blocks,
        dtype=dtype,
    )


def steps_of(group_sizes_G, alignment: int) -> jax.Array:
    """What the kernels walk over, int32 [4, G]: the groups, those that have rows first; of each the
    first tile of `alignment` rows, and how many; and at the front of the last row how many groups
    have rows. A group's rows start at the sum of the earlier sizes, each rounded up to alignment.
    """
    tiles_G = -(-group_sizes_G // alignment)
    order_G = jnp.argsort(tiles_G == 0, stable=True)
    first_G, used = jnp.cumsum(tiles_G) - tiles_G, jnp.sum(tiles_G > 0)
    return jnp.stack(
        [order_G, first_G[order_G], tiles_G[order_G], jnp.broadcast_to(used, tiles_G.shape)]
    ).astype(jnp.int32)


def operands(w, dtype) -> tuple[jax.Array, jax.Array | None, jax.Array | int]:
    """What the kernels take of a matrix or a stack of them: values, scale, and the index of the
    first.

    w: an array; quantised (`values`, `scale`, `block`); or what lies at `layer` of a `stack` of
    either. Other blocks of scales than those of few_rows_matmul are multiplied out.
    """
    stack, layer = (w.stack, w.layer) if hasattr(w, "stack") else (w, None)
    if not hasattr(stack, "scale"):
        values, scale = (stack, None) if stack.dtype == dtype else (w.astype(dtype), None)
    elif stack.block == ((BLOCK, BLOCK) if stack.values.dtype == FP8 else (stack.shape[-2], 1)):
        values, scale = stack.values, stack.scale
    else:
        values, scale = w.astype(dtype), None
    if values is not stack and scale is None:
        layer = None  # it is one layer's now
    groups = 1 if len(w.shape) == 2 else w.shape[0]
    flat = [None if x is None else x.reshape(-1, *x.shape[-2:]) for x in (values, scale)]
    return *flat, 0 if layer is None else layer * groups


def _whole(y):
    return y


def _swiglu(gate, up):
    return gate * jax.nn.sigmoid(gate) * up


def _check(x, matrices, scales, steps, alignment, blocks):
    first = matrices[0]
    fit = x.ndim == steps.ndim == 2 and first.ndim == 3 and x.shape[1] == first.shape[1]
    if not fit or len(steps) != 4 or steps.shape[1] > len(first):
        raise ValueError(f"shapes of x {x.shape}, w {first.shape}, steps {steps.shape} do not fit")
    if x.dtype.name not in ALIGNMENT:
        raise ValueError(
            f"few_rows: rows of type {x.dtype}: takes {' and '.join(ALIGNMENT)}; grouped_matmul"
            " takes other types"
        )
    num_matrices, depth, width = first.shape
    if depth % BLOCK or width % BLOCK:
        raise ValueError(
            f"few_rows: matrices of {depth} x {width}: takes multiples of {BLOCK};"
            " grouped_matmul='ragged_dot' takes others"
        )
    for w, scale in zip(matrices, scales, strict=True):
        if (
            w.shape != first.shape
            or w.dtype != first.dtype
            or (scale is None) != (scales[0] is None)
        ):
            raise ValueError(
                f"few_rows: matrices {first.dtype}{first.shape} and {w.dtype}{w.shape} differ, or"
                " only one has a scale"
            )
        if w.dtype not in ((x.dtype,) if scale is None else (FP8, INT8)):
            has = f"matrices of type {w.dtype}" + (" with a scale" if scale is not None else "")
            raise ValueError(
                f"few_rows: {has}: takes {x.dtype} like the rows, or {FP8.__name__} or"
                f" {INT8.__name__} with a scale"
            )
        expected = (
            (num_matrices, 1, width)
            if w.dtype == INT8
            else (num_matrices, depth // BLOCK, width // BLOCK)
        )
        if scale is not None and (scale.shape != expected or scale.dtype != jnp.float32):
            raise ValueError(
                f"few_rows: scale {scale.dtype}{scale.shape} of {w.dtype}: takes float32{expected}"
            )
    step = ALIGNMENT[x.dtype.name]
    if alignment != x.shape[0] and (alignment < step or alignment % step or x.shape[0] % alignment):
        raise ValueError(
            f"few_rows: alignment={alignment} of {x.shape[0]} rows: takes multiples of {step} that"
            " divide the rows, and all"
        )
    if blocks.columns < BLOCK or blocks.columns % BLOCK or width % blocks.columns:
        raise ValueError(
            f"few_rows: columns={blocks.columns}: takes multiples of {BLOCK} that divide {width}"
        )
    if blocks.depth not in (BLOCK, 2 * BLOCK):
        raise ValueError(f"few_rows: depth={blocks.depth}: takes {BLOCK} or {2 * BLOCK}")
    if not interpret.available():
        raise ValueError(
            "few_rows: no TPU, and pallas_kernels.interpret is not on; grouped_matmul='batched'"
            " takes it"
        )


def _call(
    name, join, x_RK, matrices, scales, steps_4G, first, alignment: int, blocks: Blocks, dtype=None
):
    _check(x_RK, matrices, scales, steps_4G, alignment, blocks)
    blocks = dataclasses.replace(
        blocks, bits=blocks.bits and matrices[0].dtype == FP8 and x_RK.dtype == jnp.bfloat16
    )
    columns = blocks.columns
    (rows, depth), width = x_RK.shape, matrices[0].shape[2]
    whole = pl.BlockSpec((rows, depth), lambda j, e, *_: (0, 0), pipeline_mode=pl.Buffered(1))
    matrix_of = lambda e, steps, first: first[0] + steps[0, e]
    matrix = pl.BlockSpec(
        (None, depth, columns), lambda j, e, *scalars: (matrix_of(e, *scalars), 0, j)
    )
    scale_shape = (None, depth // BLOCK, width // BLOCK)
    scale = pl.BlockSpec(
        scale_shape, lambda j, e, *scalars: (matrix_of(e, *scalars), 0, 0), memory_space=pltpu.SMEM
    )
    if matrices[0].dtype == INT8:
        scale = pl.BlockSpec(
            (None, 1, columns), lambda j, e, *scalars: (matrix_of(e, *scalars), 0, j)
        )
    scales = [s for s in scales if s is not None]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        # where no group has rows, a step of no tiles writes the zeros
        grid=(width // columns, jnp.maximum(steps_4G[3, 0], 1)),
        in_specs=[whole, *[matrix] * len(matrices), *[scale] * len(scales)],
        out_specs=pl.BlockSpec((rows, columns), lambda j, e, *_: (0, j)),
    )
    call = pl.pallas_call(
        functools.partial(_kernel, join, len(matrices), alignment, blocks),
        out_shape=jax.ShapeDtypeStruct((rows, width), dtype or x_RK.dtype),
        cost_estimate=cost(
            x_RK,
            *(jax.ShapeDtypeStruct((steps_4G.shape[1], *w.shape[1:]), w.dtype) for w in matrices),
        ),
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tuning.vmem_limit()
        ),
        interpret=interpret.params(),
        name=name,
    )
    return call(steps_4G, jnp.asarray(first, jnp.int32).reshape(1), x_RK, *matrices, *scales)


def _kernel(join, count, alignment, blocks, steps, first_matrix, x_ref, *refs):
    """One group's rows times a block of columns."""
    del first_matrix
    w_refs, scale_refs, out_ref = refs[:count], refs[count:-1], refs[-1]
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    def tile(number, _):
        whole = alignment == x_ref.shape[0]
        rows = (
            slice(None)
            if whole
            else pl.ds(pl.multiple_of((steps[1, step] + number) * alignment, alignment), alignment)
        )
        products = [
            _product(blocks, x_ref.at[rows, :], w_ref, *scale_refs[i : i + 1])
            for i, w_ref in enumerate(w_refs)
        ]
        out_ref[rows, :] = join(*products).astype(out_ref.dtype)
        return 0

    lax.fori_loop(0, steps[2, step], tile, 0)


def _product(blocks, x_ref, w_ref, scale_ref=None):
    """[rows, columns] in float32."""
    dtype = x_ref.dtype
    dot = functools.partial(
        jnp.dot,
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    if scale_ref is None:
        return dot(x_ref[...], w_ref[...])
    if w_ref.dtype == INT8:
        return dot(x_ref[...], w_ref[...].astype(dtype)) * scale_ref[...]
    (rows, depth), columns, x = x_ref.shape, w_ref.shape[1], x_ref[...]
    if blocks.bits:
        x = fp8_bits.in_order_lifted(x)
    unpack = fp8_bits.to_bfloat16 if blocks.bits else lambda values: values.astype(dtype)
    out = []
    for n in range(columns // BLOCK):
        place = pl.program_id(0) * (columns // BLOCK) + n
        across = slice(n * BLOCK, (n + 1) * BLOCK)
        total = jnp.zeros((rows, BLOCK), jnp.float32)
        for start in range(0, depth, blocks.depth):
            stop = min(start + blocks.depth, depth)
            # One product of several blocks of depth, each with rows of its own: [x0 0; 0 x1] [w0;
            # w1].
            parts = range(0, stop - start, BLOCK)
            zeros = jnp.zeros((rows, BLOCK), dtype)
            lhs = [
                jnp.concatenate(
                    [x[:, start + k : start + k + BLOCK] if k == own else zeros for k in parts],
                    axis=1,
                )
                for own in parts
            ]
            product = dot(jnp.concatenate(lhs, axis=0), unpack(w_ref[start:stop, across]))
            for i, part in enumerate(parts):
                total += (
                    product[i * rows : (i + 1) * rows] * scale_ref[(start + part) // BLOCK, place]
                )
        out.append(total * (1 / fp8_bits.LIFT / fp8_bits.SCALE) if blocks.bits else total)
    return jnp.concatenate(out, axis=1)
