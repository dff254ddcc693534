import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.api import attention
from pallas_kernels.paged_attention import blocked
from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, paged_attention

LAYERS, PAGES, PAGE, HEADS, GROUPS, SIZE = 3, 11, 4, 4, 2, 8
STARTS, NEW = np.array([0, 5, 16, 3]), 3  # tokens stored before, and new ones, of four rows


@pytest.fixture(scope="module")
def rows():
    """Contiguous rows [S, M, ...], and the same keys and values scattered over pages of layer 1;
    every other page is NaN.
    """
    rng = np.random.default_rng(0)
    length = max(STARTS) + NEW
    q, k, v = (
        rng.normal(size=(len(STARTS), length, n, SIZE)).astype(np.float32)
        for n in (HEADS, GROUPS, GROUPS)
    )
    tables = np.zeros((len(STARTS), -(-length // PAGE)), np.int32)
    k_pages, v_pages = np.full((2, LAYERS, PAGES, PAGE, GROUPS, SIZE), np.nan, np.float32)
    free = iter(rng.permutation(PAGES))
    for row, start in enumerate(STARTS):
        for block in range(-(-(start + NEW) // PAGE)):
            tables[row, block] = page = next(free)
            here = slice(block * PAGE, block * PAGE + PAGE)
            for pages, x in ((k_pages, k), (v_pages, v)):
                pages[1, page] = 0  # what a page holds past its row's end is old, never NaN
                pages[1, page, : len(x[row, here])] = x[row, here]
        tables[row, block + 1 :] = page
    return q, k, v, k_pages.transpose(0, 1, 3, 4, 2), v_pages.swapaxes(2, 3), tables


@pytest.mark.parametrize("chunk", [PAGE, 3 * PAGE, 2048])
@pytest.mark.parametrize("counts", [[NEW] * 4, [1, NEW, 0, 2]])
# paged_attention_kernel_test.py
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "pallas"])
def test_new_tokens_see_what_they_would_see_in_a_contiguous_row(
    rows, implementation, counts, chunk, monkeypatch
):
    monkeypatch.setattr(blocked, "CHUNK", chunk)
    q, k, v, k_pages, v_pages, tables = rows
    whole = attention(
        q, k, v, jnp.ones(q.shape[:2], jnp.int32), scale=0.3, implementation="reference"
    )
    for few in (0, NEW + 1):  # pages put in order, and page by page
        monkeypatch.setattr(blocked, "FEW_TOKENS", few)
        new = np.stack([q[row, start : start + NEW] for row, start in enumerate(STARTS)])
        out = paged_attention(
            jnp.asarray(new), jnp.asarray(k_pages), jnp.asarray(v_pages), 1, jnp.asarray(tables),
            jnp.asarray(STARTS), jnp.asarray(counts),
            scale=0.3, implementation=implementation,
        )  # fmt: skip
        for row, (start, count) in enumerate(zip(STARTS, counts, strict=True)):
            np.testing.assert_allclose(
                out[row, :count], whole[row, start : start + count], atol=1e-5
            )


def test_unknown_implementation_and_wrong_shapes_are_named(rows):
    q, _, _, k_pages, v_pages, tables = rows
    with pytest.raises(ValueError, match="'flash' is not one of auto, reference, xla, pallas"):
        paged_attention(
            q, k_pages, v_pages, 1, tables, STARTS, STARTS, scale=1.0, implementation="flash"
        )
    with pytest.raises(
        ValueError,
        match="'cudnn' is for rows and takes no pages: auto, reference, xla, pallas take them",
    ):
        paged_attention(
            q, k_pages, v_pages, 1, tables, STARTS, STARTS, scale=1.0, implementation="cudnn"
        )
    with pytest.raises(
        ValueError, match=r"starts \(2,\) and counts \(4,\) are not those of 4 rows"
    ):
        paged_attention(
            q, k_pages, v_pages, 1, tables, STARTS[:2], STARTS, scale=1.0, implementation="xla"
        )
