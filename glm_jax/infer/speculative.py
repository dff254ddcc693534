"""Speculative decoding: the MTP block guesses tokens, one pass of the trunk verifies them (arXiv 2211.17192).

A draft d drawn from q is kept with probability min(1, p(d) / q(d)), p being what the trunk would have drawn from; where it is
not, the token is drawn from max(p - q, 0). What comes out is distributed as p, whatever q is; at temperature 0 it is p's best token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glm_jax.infer.sampling import RowParams, best_token, draw, drawing_logits, keys

ACCEPT, REPLACE, DRAFT = 1, 2, 3  # streams of randomness of one token


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Drafts:
    """Guesses for the tokens behind a row's last: tokens [S, K], the logits they were drawn from [S, K, V], their number [S]."""

    tokens: jax.Array
    logits: jax.Array
    count_S: jax.Array


def no_drafts(size: int, num_drafts: int, vocab_size: int) -> Drafts:
    shape = (size, num_drafts)
    return Drafts(jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, vocab_size), jnp.float32), jnp.zeros(size, jnp.int32))


def _stream(params: RowParams, index_S, number: int):
    """Keys of one stream for the tokens number index_S."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys(params, index_S), number)


def _if_random(params: RowParams, random, certain):
    """random() if any row draws at all, else certain(): where every row takes its best token, the same without random numbers."""
    return jax.lax.cond(jnp.any(params.temperature > 0), random, certain)


def _categorical(params: RowParams, index_S, number: int, logits_SV):
    """A token of each row's distribution, int32 [S], by one stream."""
    random = lambda: jax.vmap(jax.random.categorical)(_stream(params, index_S, number), logits_SV).astype(jnp.int32)  # noqa: E731
    return _if_random(params, random, lambda: best_token(logits_SV))


def verify(logits_SLV: jax.Array, drafts: Drafts, params: RowParams, index_S: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [S, K + 1], the first of them the accepted drafts, then one that the trunk draws; and how many were accepted [S].

    logits_SLV: the trunk's behind the last token and behind each draft. index_S: number of the first of these tokens.
    """
    num_drafts = drafts.tokens.shape[1]
    if num_drafts == 0:
        return draw(logits_SLV[:, 0], params, index_S)[:, None], jnp.zeros_like(index_S)
    target = jax.vmap(lambda logits: drawing_logits(logits, params), in_axes=1, out_axes=1)(logits_SLV)
    p_SLV = jax.nn.softmax(target, axis=-1)
    exists_SK = jnp.arange(num_drafts) < drafts.count_S[:, None]
    q_SKV = jnp.where(exists_SK[..., None], jax.nn.softmax(drafts.logits, axis=-1), 0)
    p_SK, q_SK = (jnp.take_along_axis(x, drafts.tokens[..., None], axis=-1)[..., 0] for x in (p_SLV[:, :-1], q_SKV))
    place = jnp.arange(num_drafts)
    uniform = lambda: jax.vmap(lambda k: jax.vmap(jax.random.uniform)(_stream(params, index_S + k, ACCEPT)), out_axes=1)(place)  # noqa: E731
    u_SK = _if_random(params, uniform, lambda: jnp.zeros(p_SK.shape))
    kept_SK = exists_SK & (u_SK * q_SK < p_SK)
    accepted_S = jnp.sum(jnp.cumprod(kept_SK, axis=1), axis=1)
    # Behind the accepted ones: from what p has over q where a draft was refused, from p where there was none.
    q_SLV = jnp.concatenate([q_SKV, jnp.zeros_like(q_SKV[:, :1])], axis=1)
    rest_SV = jnp.take_along_axis(jnp.maximum(p_SLV - q_SLV, 0), accepted_S[:, None, None], axis=1)[:, 0]
    own_SV = jnp.take_along_axis(p_SLV, accepted_S[:, None, None], axis=1)[:, 0]
    rest_SV = jnp.where(jnp.sum(rest_SV, axis=-1, keepdims=True) > 0, rest_SV, own_SV)  # p = q but for rounding
    last_S = _categorical(params, index_S + accepted_S, REPLACE, jnp.log(rest_SV))
    tokens_SL = jnp.concatenate([drafts.tokens, jnp.zeros_like(last_S)[:, None]], axis=1)
    tokens_SL = jnp.where(jnp.arange(num_drafts + 1) == accepted_S[:, None], last_S[:, None], tokens_SL)
    return tokens_SL.astype(jnp.int32), accepted_S


def draft(block, head, pages, h_SLD, new_SL, stored_S, taken_S, num_drafts: int, params: RowParams, index_S):
    """Guesses behind the tokens just taken, and the pages with the MTP block's keys and values of these positions.

    Args:
      block: (pages, h, next tokens, stored_S, counts_S) -> (states, pages), the MTP block; head: its states [S, D] -> logits.
      h_SLD, new_SL: the trunk's states of this pass and the token behind each; the first taken_S of a row are real.
      stored_S: position of the first. index_S: number of the first token of new_SL.
    """
    x_SLD, pages = block(pages, h_SLD, new_SL, stored_S=stored_S, counts_S=taken_S)
    x_SD = jnp.take_along_axis(x_SLD, jnp.maximum(taken_S - 1, 0)[:, None, None], axis=1)[:, 0]
    tokens, logits = [], []
    for number in range(num_drafts):
        if number:  # the block's own state stands in for the trunk's, which nobody has computed yet
            at_S = stored_S + taken_S + number - 1
            x_S1D, pages = block(pages, x_SD[:, None], tokens[-1][:, None], stored_S=at_S, counts_S=(taken_S > 0).astype(jnp.int32))
            x_SD = x_S1D[:, 0]
        logits.append(drawing_logits(head(x_SD), params))
        tokens.append(_categorical(params, index_S + taken_S + number, DRAFT, logits[-1]))
    count_S = jnp.where(taken_S > 0, num_drafts, 0).astype(jnp.int32)
    return Drafts(jnp.stack(tokens, axis=1), jnp.stack(logits, axis=1), count_S), pages
