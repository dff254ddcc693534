"""What the engine runs on the device: a chunk of prompt, and a loop of decode steps, plain or speculative."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.infer import speculative
from glm_jax.infer.sampling import RowParams, model_logprobs, sample
from glm_jax.model.cache import Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """Where each row stands: tokens stored; tokens to compute (prefill) or to draw at most (decode); tokens drawn before."""

    stored_S: jax.Array
    counts_S: jax.Array
    drawn_S: jax.Array
    params: RowParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Drawn:
    """What a decode call drew: tokens and log-probabilities [S, steps], their number, and how many passes and accepted drafts."""

    tokens: jax.Array
    logprobs: jax.Array
    count_S: jax.Array
    passes_S: jax.Array
    accepted_S: jax.Array


def trunk(model, pages, tokens_SL, tables_SP, stored_S, counts_S):
    """States [S, L, D] of new tokens and the pages with the first counts_S of them written."""
    out = model.trunk(tokens_SL, *_placed(pages, tokens_SL, tables_SP, stored_S, counts_S))
    return out.h, out.cache.pages


def mtp(model, pages, h_SLD, next_tokens_SL, tables_SP, stored_S, counts_S):
    """The same for the MTP block: states before its head."""
    x_SLD, _, cache = model.mtp_hidden(h_SLD, next_tokens_SL, *_placed(pages, next_tokens_SL, tables_SP, stored_S, counts_S))
    return x_SLD, cache.pages


def _placed(pages, tokens_SL, tables_SP, stored_S, counts_S):
    """Segment ids (1 for real tokens, 0 for padding) and positions, both [S, L], and the cache that they go to."""
    step = jnp.arange(tokens_SL.shape[1])
    cache = Cache(*pages, tables_SP=tables_SP, starts_S=stored_S, counts_S=counts_S)
    return (step < counts_S[:, None]).astype(jnp.int32), stored_S[:, None] + step, cache


def at(x_SLD, index_S):
    """x[s, index_s]: [S, D]."""
    return jnp.take_along_axis(x_SLD, index_S[:, None, None], axis=1)[:, 0]


@jax.jit
def experts_of(expert_pages, pages_P) -> jax.Array:
    """The experts of some pages' positions in order, int16 [positions, layers, K]."""
    blocks = expert_pages[:, pages_P]
    return blocks.reshape(len(blocks), -1, blocks.shape[-1]).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def prefill(graphdef, state, pages, rows: Rows, tokens_SL, next_tokens_SL, tables_SP, drafting: bool):
    """Stores counts_S tokens of each row; returns the token drawn behind them, its log-probability [S], and the pages.

    next_tokens_SL: the token behind each; -1 behind the row's last, where the drawn one takes its place. Read if `drafting`:
    then the MTP block's keys and values are stored, too.
    """
    model = nnx.merge(graphdef, state)
    h_SLD, pages = trunk(model, pages, tokens_SL, tables_SP, rows.stored_S, rows.counts_S)
    logits_SV = model.logits(at(h_SLD, jnp.maximum(rows.counts_S - 1, 0))[:, None])[:, 0]
    token_S, logprob_S = sample(logits_SV, rows.params, rows.drawn_S)
    if drafting:
        next_tokens_SL = jnp.where(next_tokens_SL < 0, token_S[:, None], next_tokens_SL)
        _, pages = mtp(model, pages, h_SLD, next_tokens_SL, tables_SP, rows.stored_S, rows.counts_S)
    return token_S, logprob_S, pages


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=2)
def decode(graphdef, state, pages, rows: Rows, token_S, tables_SP, steps: int, num_drafts: int) -> tuple[Drawn, tuple]:
    """Draws up to counts_S tokens a row, at most `steps`, until its stop token; num_drafts of them are guessed by the MTP block
    and verified in one pass (0: none). token_S: each row's last token, not stored yet. Returns what was drawn, and the pages.
    """
    model = nnx.merge(graphdef, state)
    size, params = len(token_S), rows.params
    row = jnp.arange(size)[:, None]

    def unfinished(carry):
        return jnp.any(carry["live"])

    def body(carry):
        drawn, live, pages = carry["drawn"], carry["live"], carry["pages"]
        stored_S, index_S = rows.stored_S + drawn.count_S, rows.drawn_S + drawn.count_S
        drafts = carry["drafts"]
        tokens_SL = jnp.concatenate([carry["token"][:, None], drafts.tokens], axis=1)
        h_SLD, pages = trunk(model, pages, tokens_SL, tables_SP, stored_S, jnp.where(live, 1 + drafts.count_S, 0))
        logits_SLV = model.logits(h_SLD)
        new_SL, accepted_S = speculative.verify(logits_SLV, drafts, params, index_S)
        # Of the accepted drafts and the token behind them, a row takes those up to its stop token or its limit.
        is_stop = jnp.any(new_SL[..., None] == params.stop_tokens[:, None], axis=-1)
        place = jnp.arange(new_SL.shape[1])
        last_S = jnp.minimum(accepted_S, rows.counts_S - drawn.count_S - 1)
        stop_S = jnp.min(jnp.where(is_stop & (place <= last_S[:, None]), place, new_SL.shape[1]), axis=1)
        last_S = jnp.where(live, jnp.minimum(last_S, stop_S), -1)
        taken_S = last_S + 1
        to = jnp.where(place < taken_S[:, None], drawn.count_S[:, None] + place, steps)
        logprobs_SL = jax.vmap(model_logprobs, in_axes=(1, 1, None), out_axes=1)(logits_SLV, new_SL, params.logprob_temperature)
        drawn = Drawn(
            tokens=drawn.tokens.at[row, to].set(new_SL, mode="drop"),
            logprobs=drawn.logprobs.at[row, to].set(logprobs_SL, mode="drop"),
            count_S=drawn.count_S + taken_S,
            passes_S=drawn.passes_S + live,
            accepted_S=drawn.accepted_S + jnp.where(live, jnp.minimum(accepted_S, taken_S), 0),
        )
        token_S = jnp.take_along_axis(new_SL, jnp.maximum(last_S, 0)[:, None], axis=1)[:, 0]
        live = live & (stop_S > last_S) & (drawn.count_S < rows.counts_S)
        if num_drafts:
            block = functools.partial(mtp, model, tables_SP=tables_SP)
            head = lambda x_SD: model.logits(x_SD[:, None], model.mtp_head)[:, 0]  # noqa: E731
            drafts, pages = speculative.draft(block, head, pages, h_SLD, new_SL, stored_S, taken_S, num_drafts, params, index_S)
        return {"drawn": drawn, "live": live, "token": token_S, "drafts": drafts, "pages": pages}

    zeros = jnp.zeros(size, jnp.int32)
    drawn = Drawn(jnp.zeros((size, steps), jnp.int32), jnp.zeros((size, steps), jnp.float32), zeros, zeros, zeros)
    drafts = speculative.no_drafts(size, num_drafts, model.config.vocab_size)
    start = {"drawn": drawn, "live": rows.counts_S > 0, "token": token_S, "drafts": drafts, "pages": pages}
    end = jax.lax.while_loop(unfinished, body, start)
    return end["drawn"], end["pages"]
