"""What the engine runs on the device: a chunk of prompt, and a loop of decode steps, plain or
speculative.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.infer import speculative
from glm_jax.infer.sampling import (
    MAX_TOP_LOGPROBS,
    LogitChanges,
    RowParams,
    choose,
    count_tokens,
    model_logprobs,
    top_logprobs,
)
from glm_jax.model.cache import Cache
from glm_jax.sharding import Array

SCORED_AT_A_TIME = 16  # positions of a prompt whose logits exist at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """Where each row stands: tokens stored; tokens to compute (prefill) or to sample at most
    (decode); tokens sampled before.

    changes: None where no row of the batch changes its logits.
    """

    stored_S: Array
    counts_S: Array
    sampled_S: Array
    params: RowParams
    changes: LogitChanges | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sampled:
    """What a decode call drew: tokens and log-probabilities [S, steps], their number, and how many
    passes and accepted drafts.

    top: where requested, the most likely tokens at each place and their log-probabilities, both [S,
    steps, T].
    """

    tokens: jax.Array
    logprobs: jax.Array
    count_S: jax.Array
    passes_S: jax.Array
    accepted_S: jax.Array
    top: tuple[jax.Array, jax.Array] | None = None


def trunk(model, pages, tokens_SL, tables_SP, stored_S, counts_S):
    """States [S, L, D] of new tokens and the pages with the first counts_S of them written."""
    out = model.trunk(
        tokens_SL, *_placed(model.config, pages, tokens_SL, tables_SP, stored_S, counts_S)
    )
    return out.h, out.cache.pages


def mtp(model, pages, h_SLD, next_tokens_SL, tables_SP, stored_S, counts_S):
    """The same for the MTP block: states before its head."""
    x_SLD, _, cache = model.mtp_hidden(
        h_SLD,
        next_tokens_SL,
        *_placed(model.config, pages, next_tokens_SL, tables_SP, stored_S, counts_S),
    )
    return x_SLD, cache.pages


def _placed(config, pages, tokens_SL, tables_SP, stored_S, counts_S):
    """Segment ids (1 for real tokens, 0 for padding) and positions, both [S, L], and the cache that
    they go to.
    """
    step = jnp.arange(tokens_SL.shape[1])
    cache = Cache.placed(config, pages, tokens_SL.shape[1], tables_SP, stored_S, counts_S)
    return (step < counts_S[:, None]).astype(jnp.int32), stored_S[:, None] + step, cache


def at(x_SLD, index_S):
    """x[s, index_s]: [S, D]."""
    return jnp.take_along_axis(x_SLD, index_S[:, None, None], axis=1)[:, 0]


@jax.jit
def experts_of(expert_pages, pages_P) -> jax.Array:
    """The experts of some pages' positions in order, int16 [positions, layers, K]."""
    blocks = expert_pages[:, pages_P]
    return blocks.reshape(len(blocks), -1, blocks.shape[-1]).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(0, 7, 8, 9), donate_argnums=2)
def prefill(
    graphdef,
    state,
    pages,
    rows: Rows,
    tokens_SL,
    next_tokens_SL,
    tables_SP,
    drafting: bool,
    with_top: bool,
    scoring: bool,
) -> tuple[Sampled, tuple | None, tuple]:
    """Stores counts_S tokens of each row; returns the token sampled after them, the scores of the
    next tokens, and the pages.

    next_tokens_SL: the token after each; -1 after the row's last, where the sampled one takes its
    place. Read if `drafting`: then the MTP block's keys and values are stored, too; and if
    `scoring`: then the scores are their log-probabilities [S, L] and the most likely tokens with
    theirs [S, L, T], else None.
    """
    model, params = nnx.merge(graphdef, state), rows.params
    h_SLD, pages = trunk(model, pages, tokens_SL, tables_SP, rows.stored_S, rows.counts_S)
    logits_SV = model.logits(at(h_SLD, jnp.maximum(rows.counts_S - 1, 0))[:, None], sampling=True)[
        :, 0
    ]
    changed_SV = logits_SV
    if rows.changes is not None:
        counts_SV = rows.changes.counts(model.config.vocab_size)
        changed_SV = rows.changes.apply(logits_SV[:, None], counts_SV[:, None])[:, 0]
    token_S = choose(changed_SV, params, rows.sampled_S)
    scores = _scores(model, h_SLD, next_tokens_SL, params.logprob_temperature) if scoring else None
    if drafting:
        next_tokens_SL = jnp.where(next_tokens_SL < 0, token_S[:, None], next_tokens_SL)
        _, pages = mtp(model, pages, h_SLD, next_tokens_SL, tables_SP, rows.stored_S, rows.counts_S)
    logprob_S = model_logprobs(logits_SV, token_S, params.logprob_temperature)
    top = top_logprobs(logits_SV, params.logprob_temperature) if with_top else None
    ones = jnp.ones_like(token_S)
    sampled = Sampled(
        token_S[:, None],
        logprob_S[:, None],
        ones,
        ones,
        0 * ones,
        jax.tree.map(lambda x: x[:, None], top),
    )
    return sampled, scores, pages


def _scores(model, h_SLD, next_tokens_SL, temperature_S):
    """Log-probabilities [S, L] of the next tokens, and the most likely tokens with theirs [S, L,
    T]; logits of a few positions exist at a time.
    """

    def score(position):
        h_SD, token_S = position
        logits_SV = model.logits(h_SD[:, None], sampling=True)[:, 0]
        return model_logprobs(logits_SV, jnp.maximum(token_S, 0), temperature_S), top_logprobs(
            logits_SV, temperature_S
        )

    scores = jax.lax.map(
        score,
        (h_SLD.swapaxes(0, 1), next_tokens_SL.T),
        batch_size=min(SCORED_AT_A_TIME, h_SLD.shape[1]),
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1), scores)


def _last_taken(rows: Rows, sampled: Sampled, new_SL, accepted_S) -> tuple[jax.Array, jax.Array]:
    """Of the accepted drafts and the token after them, the place of the last one within the row's
    limit, and the place of the first stop token up to there; L: there is none.
    """
    is_stop = jnp.any(new_SL[..., None] == rows.params.stop_tokens[:, None], axis=-1)
    place = jnp.arange(new_SL.shape[1])
    last_S = jnp.minimum(accepted_S, rows.counts_S - sampled.count_S - 1)
    within = is_stop & (place <= last_S[:, None])
    return last_S, jnp.min(jnp.where(within, place, new_SL.shape[1]), axis=1)


def _appended(
    sampled: Sampled, new_SL, logits_SLV, temperature_S, taken_S, *, passes_S, accepted_S
) -> Sampled:
    """With the first taken_S of each row's new tokens and their log-probabilities."""
    row, place = jnp.arange(len(new_SL))[:, None], jnp.arange(new_SL.shape[1])
    to = jnp.where(
        place < taken_S[:, None], sampled.count_S[:, None] + place, sampled.tokens.shape[1]
    )
    logprobs_SL = jax.vmap(model_logprobs, in_axes=(1, 1, None), out_axes=1)(
        logits_SLV, new_SL, temperature_S
    )
    top = None
    if sampled.top is not None:
        new_top = jax.vmap(top_logprobs, in_axes=(1, None), out_axes=1)(logits_SLV, temperature_S)
        top = jax.tree.map(
            lambda all_, new: all_.at[row, to].set(new, mode="drop"), sampled.top, new_top
        )
    return Sampled(
        tokens=sampled.tokens.at[row, to].set(new_SL, mode="drop"),
        logprobs=sampled.logprobs.at[row, to].set(logprobs_SL, mode="drop"),
        count_S=sampled.count_S + taken_S,
        passes_S=sampled.passes_S + passes_S,
        accepted_S=sampled.accepted_S + accepted_S,
        top=top,
    )


def _counts_before(counts_SV, drafts_SK) -> jax.Array:
    """How often each token came before the first draft, and before each place after a draft: [S, K
    + 1, V].
    """
    of_drafts = jax.nn.one_hot(drafts_SK, counts_SV.shape[1], dtype=jnp.int32)
    before = jnp.cumsum(of_drafts, axis=1)
    return counts_SV[:, None] + jnp.concatenate(
        [jnp.zeros_like(counts_SV)[:, None], before], axis=1
    )


def _mtp_logits(model, changes: LogitChanges | None, counts_SV, x_SD) -> jax.Array:
    """Logits [S, V] of the MTP block's states, changed as the trunk's."""
    logits_S1V = model.logits(x_SD[:, None], model.mtp_head, sampling=True)
    if changes is not None:
        logits_S1V = changes.apply(logits_S1V, counts_SV[:, None])
    return logits_S1V[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8), donate_argnums=2)
def decode(
    graphdef,
    state,
    pages,
    rows: Rows,
    token_S,
    tables_SP,
    steps: int,
    num_drafts: int,
    with_top: bool = False,
) -> tuple[Sampled, tuple]:
    """Draws up to counts_S tokens a row, at most `steps`, until its stop token; num_drafts of them
    are guessed by the MTP block and verified in one pass (0: none). token_S: each row's last token,
    not stored yet. Returns what was sampled, and the pages.

    A row's first pass is without drafts: one with a constraint, whose mask is for one token, has a
    count of 1.
    """
    model = nnx.merge(graphdef, state)
    size, params, changes, vocab = len(token_S), rows.params, rows.changes, model.config.vocab_size

    def body(carry):
        sampled, live, pages = carry["sampled"], carry["live"], carry["pages"]
        stored_S, index_S = rows.stored_S + sampled.count_S, rows.sampled_S + sampled.count_S
        drafts = carry["drafts"]
        tokens_SL = jnp.concatenate([carry["token"][:, None], drafts.tokens], axis=1)
        h_SLD, pages = trunk(
            model, pages, tokens_SL, tables_SP, stored_S, jnp.where(live, 1 + drafts.count_S, 0)
        )
        logits_SLV = model.logits(h_SLD, sampling=True)
        counts_SV, changed_SLV = carry["counts"], logits_SLV
        if changes is not None:
            changed_SLV = changes.apply(logits_SLV, _counts_before(counts_SV, drafts.tokens))
        new_SL, accepted_S = speculative.verify(changed_SLV, drafts, params, index_S)
        last_S, stop_S = _last_taken(rows, sampled, new_SL, accepted_S)
        last_S = jnp.where(live, jnp.minimum(last_S, stop_S), -1)
        taken_S, place = last_S + 1, jnp.arange(new_SL.shape[1])
        sampled = _appended(
            sampled, new_SL, logits_SLV, params.logprob_temperature, taken_S,
            passes_S=live, accepted_S=jnp.where(live, jnp.minimum(accepted_S, taken_S), 0),
        )  # fmt: skip
        if changes is not None:
            counts_SV = count_tokens(counts_SV, jnp.where(place < taken_S[:, None], new_SL, vocab))
        token_S = jnp.take_along_axis(new_SL, jnp.maximum(last_S, 0)[:, None], axis=1)[:, 0]
        live = live & (stop_S > last_S) & (sampled.count_S < rows.counts_S)
        if num_drafts:
            block = functools.partial(mtp, model, tables_SP=tables_SP)
            head = functools.partial(_mtp_logits, model, changes, counts_SV)
            drafts, pages = speculative.draft(
                block, head, pages, h_SLD, new_SL, stored_S, taken_S, num_drafts, params, index_S
            )
        return {
            "sampled": sampled,
            "live": live,
            "token": token_S,
            "drafts": drafts,
            "counts": counts_SV,
            "pages": pages,
        }

    start = {
        "sampled": _nothing_sampled(
            size, steps, min(MAX_TOP_LOGPROBS, vocab) if with_top else None
        ),
        "live": rows.counts_S > 0, "token": token_S,
        "drafts": speculative.no_drafts(size, num_drafts),
        "counts": None if changes is None else changes.counts(vocab), "pages": pages,
    }  # fmt: skip
    end = jax.lax.while_loop(lambda carry: jnp.any(carry["live"]), body, start)
    return end["sampled"], end["pages"]


def _nothing_sampled(size: int, steps: int, num_top: int | None) -> Sampled:
    zeros = jnp.zeros(size, jnp.int32)
    tokens, logprobs = jnp.zeros((size, steps), jnp.int32), jnp.zeros((size, steps), jnp.float32)
    top = None
    if num_top is not None:
        shape = (size, steps, num_top)
        top = jnp.zeros(shape, tokens.dtype), jnp.zeros(shape, logprobs.dtype)
    return Sampled(tokens, logprobs, zeros, zeros, zeros, top)
