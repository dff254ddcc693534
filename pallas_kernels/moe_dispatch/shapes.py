"""Blocks of the combine kernel, by rule, and what one MoE layer moves through HBM. Nothing is
multiplied here, so there is nothing to tune by the schedule of a product: SHAPES is empty.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import costs
from pallas_kernels.grouped_matmul.rows import row_shape
from pallas_kernels.grouped_matmul.shapes import blocks_for as product_blocks

SHAPES, PASSES = {}, ()
BUFFER_BYTES = 8 << 20  # of the rows in flight, twice
LAYERS = {"355B": (5120, 1536), "Air": (4096, 1408)}  # model and feed-forward width
MEGABLOX_VMEM = 15 << 20  # that megablox leaves to its blocks
ROOMY_VMEM = 48 << 20  # that it would take if it requested more


@dataclasses.dataclass(frozen=True)
class Blocks:
    """tokens: of a step, a multiple of 8; all their rows are in flight while the step before is
    summed.
    """

    tokens: int
    vmem_bytes: int


def blocks_for(per_token: int, width: int, dtype) -> Blocks:
    """16 tokens, or 8 where their rows are long: enough copies in flight to cover HBM's latency
    many times over.
    """
    row_bytes = 4 * row_shape(1, width, dtype).shape[2]
    tokens = 16 if 2 * 16 * per_token * row_bytes <= BUFFER_BYTES else 8
    used = 2 * tokens * per_token * row_bytes + 8 * tokens * 4 * width
    return Blocks(tokens, used + (4 << 20))


def layer_bytes(sizes_E: np.ndarray, width: int, ffn: int, per_token: int) -> dict[str, int]:
    """Bytes that the routed experts move forward and backward in bfloat16, by step, with the blocks
    of the current target.
    """
    experts, pairs = len(sizes_E), int(np.sum(sizes_E))
    rows = costs.rows_computed(sizes_E)
    token = pairs // per_token * width * 2
    combine = pairs * width * 2 + token  # rows fetched, and their sums

    def product(kernel, depth, columns):
        blocks = product_blocks(kernel, depth, columns, jnp.bfloat16)
        return costs.moved(kernel, blocks, depth, columns, rows, experts, jnp.bfloat16)

    return {
        "tokens packed": 3 * 2 * token,  # x forward and backward, and dout
        "swiglu": product("swiglu", width, ffn), "down": product("matmul", ffn, width),
        "combine": combine,
        "swiglu backward": product("swiglu_backward", width, ffn),
        "dx": product("two_matmul", ffn, width), "combine of dx": combine,
        "weight gradients": 2 * product("gathered_x_gradient", width,
                                        ffn) + product("gathered_dy_gradient", ffn, width),
    }  # fmt: skip


def unfused_bytes(
    sizes_E: np.ndarray, width: int, ffn: int, per_token: int, vmem_bytes: int
) -> dict[str, int]:
    """The same as gather, product, SwiGLU, product, scatter: megablox at those tiles in vmem_bytes
    that move least, y and gathered rows kept for the backward pass, each elementwise step one pass.
    """
    pairs = int(np.sum(sizes_E))
    row, inner, token = pairs * width * 2, pairs * ffn * 2, pairs // per_token * width * 2

    def product(depth, columns, gradient=False):
        cuts = [n for n in range(128, columns + 1, 128) if columns % n == 0]
        depths = [n for n in range(128, depth + 1, 128) if depth % n == 0] if gradient else [depth]
        tiles = [
            (rows, k, n) for rows in (128, 256, 512) for k in depths for n in cuts
            if 4 * (rows * (k + n) + k * n) + 4 * (k if gradient else rows) * n <= vmem_bytes
        ]  # fmt: skip
        return min(
            costs.moved_by_megablox(sizes_E, tile, depth, columns, jnp.bfloat16, gradient=gradient)
            for tile in tiles
        )

    scattered = 3 * row + token  # a token's rows side by side, then their sum
    return {
        "gather": 2 * row, "gate and up": product(width, 2 * ffn), "SwiGLU": 3 * inner,
        "down": product(ffn, width), "scatter": scattered,
        "dout of rows": 2 * row, "dweights and dy": 3 * row, "dh": product(width, ffn),
        "SwiGLU backward": 5 * inner,
        "dx": product(2 * ffn, width), "scatter of dx": scattered,
        "weight gradients": product(width, 2 * ffn, gradient=True) + product(ffn, width,
                                                                             gradient=True),
    }  # fmt: skip


def work_table() -> list[dict]:
    """Bytes of one layer, for the chip that the current trace is for, beside the unfused path's
    with its tiles in the VMEM that megablox asks for, and in more.
    """
    out = []
    for model, (width, ffn) in LAYERS.items():
        for rows in (1024, 300):
            sizes_E = costs.routing("uniform", costs.EXPERTS, rows)
            arguments = sizes_E, width, ffn, costs.PER_TOKEN
            ours = sum(layer_bytes(*arguments).values())
            unfused, roomy = (
                sum(unfused_bytes(*arguments, vmem).values())
                for vmem in (MEGABLOX_VMEM, ROOMY_VMEM)
            )
            out.append({
                "layer": model, "rows an expert": rows, "GB": ours / 1e9,
                "unfused GB": unfused / 1e9, "share": ours / unfused,
                "of unfused with larger tiles": ours / roomy,
            })  # fmt: skip
    return out
