"""Speculative decoding: the MTP block guesses tokens, one pass of the trunk verifies them.

The trunk's token number i is a function of its logits and of the noise of (seed, i) alone
(`sampling.choose`), and a draft is accepted where it is that token. So drafts change how fast
tokens come and never which: with any number of them a request gets the tokens that it gets without.
The block chooses its guesses with the same noise, which makes the two agree often: two
distributions at total variation distance d agree with probability at least (1 - d) / (1 + d)
(Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding",
arXiv 2408.07978).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glm_jax.infer.sampling import RowParams, choose


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Drafts:
    """Guesses for the tokens after a row's last: tokens [S, K], and how many of them there are
    [S].
    """

    tokens: jax.Array
    count_S: jax.Array


def no_drafts(size: int, num_drafts: int) -> Drafts:
    return Drafts(jnp.zeros((size, num_drafts), jnp.int32), jnp.zeros(size, jnp.int32))


def verify(
    logits_SLV: jax.Array, drafts: Drafts, params: RowParams, index_S: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The trunk's tokens [S, K + 1], and how many drafts were accepted [S]: that many tokens and
    one more are valid.

    logits_SLV: the trunk's after the last token and after each draft. index_S: number of the first
    of these tokens.
    """
    place = jnp.arange(logits_SLV.shape[1])
    tokens_SL = jax.vmap(choose, in_axes=(1, None, 1), out_axes=1)(
        logits_SLV, params, index_S[:, None] + place
    )
    hit_SK = (drafts.tokens == tokens_SL[:, :-1]) & (place[:-1] < drafts.count_S[:, None])
    return tokens_SL, jnp.sum(jnp.cumprod(hit_SK, axis=1), axis=1, dtype=jnp.int32)


def draft(
    block,
    head,
    pages,
    h_SLD,
    new_SL,
    stored_S,
    taken_S,
    num_drafts: int,
    params: RowParams,
    index_S,
):
    """Guesses after the tokens just taken, and the pages with the MTP block's keys and values of
    these positions.

    Args:
      block: (pages, h, next tokens, stored_S, counts_S) -> (states, pages), the MTP block; head:
        its states [S, D] -> logits.
      h_SLD, new_SL: the trunk's states of this pass and the token after each; the first taken_S of
        a row are real.
      stored_S: position of the first. index_S: number of the first token of new_SL.
    """
    x_SLD, pages = block(pages, h_SLD, new_SL, stored_S=stored_S, counts_S=taken_S)
    x_SD = jnp.take_along_axis(x_SLD, jnp.maximum(taken_S - 1, 0)[:, None, None], axis=1)[:, 0]
    tokens = []
    for number in range(num_drafts):
        if number:  # the block's own state stands in for the trunk's, which nobody has computed yet
            at_S = stored_S + taken_S + number - 1
            x_S1D, pages = block(
                pages,
                x_SD[:, None],
                tokens[-1][:, None],
                stored_S=at_S,
                counts_S=(taken_S > 0).astype(jnp.int32),
            )
            x_SD = x_S1D[:, 0]
        tokens.append(choose(head(x_SD), params, index_S + taken_S + number))
    return Drafts(
        jnp.stack(tokens, axis=1), jnp.where(taken_S > 0, num_drafts, 0).astype(jnp.int32)
    ), pages
