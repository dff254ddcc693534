"""The inference engine: continuous batching over a paged key-value cache.

Requests join and leave between calls of `step`. One step gives every row that lacks computed tokens
a chunk of them (prefill), then samples up to `decode_steps` tokens for every row that lacks none,
in one loop on the device. What a request gets depends on its prompt, parameters and seed alone, but
for the last bits of sums that another batch shape rounds otherwise.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from glm_jax.infer import swap
from glm_jax.infer.config import EngineConfig, num_shards
from glm_jax.infer.pages import NO_KEY, PagePool, page_key
from glm_jax.infer.request import Request, best_of
from glm_jax.infer.rows import Batch
from glm_jax.infer.sampling import SamplingParams
from glm_jax.infer.steps import Rows, Sampled, decode, experts_of, prefill
from glm_jax.model.cache import empty_pages
from glm_jax.model.transformer import GLM, per_layer
from glm_jax.sharding import Rules, ruled, rules_in_use, use

MIN_TABLE = 4  # pages
# Tokens sampled in one call for the other rows, where one has a constraint: that one gets a single
# token a call.
STEPS_BESIDE_CONSTRAINT = 4
DecodeText = Callable[[Sequence[int]], str]  # of token ids
logger = logging.getLogger(__name__)


class Engine:
    """Not thread-safe: one thread submits and steps.

    On a mesh, rows and pages are split over its batch axes: a request lives on one shard of them,
    experts where sharding.py puts them.
    """

    def __init__(
        self,
        model: GLM,
        config: EngineConfig,
        decode_text: DecodeText | None = None,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
    ):
        """decode_text: needed for requests with stop strings. mesh: as sharding.make_mesh makes it;
        None: the default device. rules: how the mesh splits weights, rows and pages; None: those in
        use now.
        """
        self.config = config
        self.model_config = model.config
        self.decode_text = decode_text
        self.mesh = mesh
        self.rules = rules_in_use() if rules is None else rules
        if self.rules["batch"] != self.rules["pages"]:
            raise ValueError(
                f"rules: batch over {self.rules['batch']}, pages over {self.rules['pages']}; a"
                " device must hold the pages of its own rows"
            )
        with ruled(self.rules):
            config.check(model.config, mesh)
            self.shards = num_shards(mesh)
        self.graphdef, state = nnx.split(model)
        self.shapes = jax.tree.map(lambda x: x.shape, state)
        self.version = 0
        num_layers = model.config.num_layers + (config.draft_tokens > 0)
        dtype = (
            model.config.compute_dtype if config.cache_dtype == "compute" else config.cache_dtype
        )
        self.state = self._prepared(state)
        with self._on_mesh():
            self.pages = empty_pages(
                model.config,
                num_layers,
                config.num_pages,
                config.page_size,
                dtype,
                config.keep_experts,
            )
        self.pools = [PagePool(config.num_pages // self.shards) for _ in range(self.shards)]
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []  # the first came first
        self.ids = itertools.count()

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queues a prompt. Raises ValueError for one that is empty, too long or not of the
        vocabulary, and what its constraint raises.
        """
        vocab, context = self.model_config.vocab_size, self.config.context
        if not 1 <= len(prompt) < context:
            raise ValueError(
                f"prompt of {len(prompt)} tokens: must be 1..{context - 1}, the context less one"
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(
                f"prompt holds token {max(prompt) if max(prompt) >= vocab else min(prompt)}, valid"
                f" are 0..{vocab - 1}"
            )
        if params.stop_strings and self.decode_text is None:
            raise ValueError("stop_strings need an engine with decode_text")
        for token, _ in params.logit_bias:
            if not 0 <= token < vocab:
                raise ValueError(f"logit_bias holds token {token}, valid are 0..{vocab - 1}")
        request = Request(next(self.ids), list(map(int, prompt)), params)
        request.start_constraint()
        self.waiting.append(request)
        return request

    def abort(self, request: Request):
        """Ends a request, whatever its status; what it has stays in it."""
        if request.status != "finished":
            self._finish(request, "abort")

    def pause(self, request: Request):
        """Takes a request out of the batch. Its tokens stay, its pages go."""
        if request.status in ("waiting", "running"):
            self._leave(request)
            request.status = "paused"

    def resume(self, request: Request):
        """Queues a paused request again; it goes on with the token that it would have sampled
        next.
        """
        if request.status == "paused":
            request.status = "waiting"
            self.waiting.append(request)

    def set_weights(self, state, *, recompute: bool, version: int | None = None):
        """Swaps in other weights (an nnx state like the model's) between steps, and quantises them
        as configured; tokens sampled from now on carry their version, by default the next. They may
        lie on another mesh of the engine's devices, as the trainer has them.

        recompute: compute the running requests' keys and values anew; else they go on with those of
        the older weights.
        """
        for old, new in zip(
            jax.tree.leaves(self.shapes, is_leaf=lambda x: isinstance(x, tuple)),
            jax.tree.leaves(state),
            strict=True,
        ):
            if old != new.shape:
                raise ValueError(
                    f"new weights hold a tensor of shape {new.shape} where the engine has {old}"
                )
        # before the new ones are made: both need not fit at once
        for array in jax.tree.leaves(self.state):
            array.delete()
        self.state = self._prepared(state)
        self.version = self.version + 1 if version is None else version
        for pool in self.pools:
            pool.forget_all()
        for request in self.running[::-1]:
            if recompute:
                self._requeue(request)
            request.stale = not recompute

    def _prepared(self, state):
        with ruled(self.rules):
            state = swap.prepare(
                state, self.config.weights, self.model_config.compute_dtype, self.mesh
            )
        return state if self.model_config.scan_layers else jax.jit(per_layer)(state)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def step(self) -> list[Request]:
        """Admits what fits, computes, samples. Returns the requests that finished in it."""
        self._admit()
        batch = list(self.running)
        with self._on_mesh():
            self._prefill()
            self._decode()
        return [r for r in batch if r.status == "finished"]

    @property
    def num_free_pages(self) -> int:
        return sum(pool.num_free for pool in self.pools)

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else use(self.mesh, self.rules)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Request]:
        """Submits all prompts and steps until they are finished; in the prompts' order."""
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [self.submit(*pair) for pair in zip(prompts, params, strict=True)]
        while any(r.status != "finished" for r in requests):
            self.step()
        return requests

    def _admit(self):
        """Moves waiting requests into the batch, first come, first served, while rows and pages
        last.

        A request that begins like one whose pages are being computed right now waits for them: the
        samples of one prompt compute it once.
        """
        coming = {
            key
            for r in self.running
            if not r.stale
            for key in r.keys[r.stored // self.config.page_size :]
        }
        later = []
        while self.waiting and len(self.running) < self.config.num_rows:
            request = self.waiting.popleft()
            # All but the sequence's last token: that one is computed in any case, for its logits.
            self._complete_keys(request, (len(request.sequence) - 1) // self.config.page_size)
            request.shard, known = self._choose_shard(request)
            pool = self.pools[request.shard]
            if request.unscored:  # what others computed of its prompt has no log-probabilities
                known = 0
            elif known < len(request.keys) and request.keys[known] in coming:
                later.append(request)
                continue
            shared = pool.share(request.keys[:known])
            more = pool.allocate(self._pages_for(len(request.sequence)) - len(shared))
            if more is None:
                pool.release(shared)
                self.waiting.appendleft(request)
                break
            request.pages = shared + more
            request.stored = len(shared) * self.config.page_size
            request.stale = False
            request.status = "running"
            self.running.append(request)
            coming.update(request.keys[len(shared) :])
        self.waiting.extendleft(reversed(later))

    def _choose_shard(self, request: Request) -> tuple[int, int]:
        """A shard with a free row, and how many of the request's pages it knows: most of them, else
        most free pages.
        """
        taken = collections.Counter(r.shard for r in self.running)
        open_shards = [
            s for s in range(self.shards) if taken[s] < self.config.num_rows // self.shards
        ]
        known = {shard: self.pools[shard].known(request.keys) for shard in open_shards}
        best = max(
            open_shards, key=lambda shard: (known[shard], self.pools[shard].num_free, -shard)
        )
        return best, known[best]

    def _complete_keys(self, request: Request, num_pages: int):
        """Keys of the first num_pages pages. The MTP block's part of a page depends on the token
        after it, too.
        """
        size, keys = self.config.page_size, request.keys
        if len(keys) < num_pages:
            sequence = request.sequence
            for start in range(len(keys) * size, num_pages * size, size):
                end = start + size + (self.config.draft_tokens > 0)
                keys.append(page_key(keys[-1] if keys else NO_KEY, sequence[start:end]))

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def _prefill(self):
        """One chunk for every row that lacks more than its last token, or has not sampled yet."""
        rows = [r for r in self.running if r.missing > 1 or not r.tokens]
        if not rows:
            return
        counts = [min(r.missing, self.config.prefill_chunk) for r in rows]
        batch = self._batch(rows)
        length = min(
            self.config.min_chunk * _bucket(-(-max(counts) // self.config.min_chunk), 4),
            self.config.prefill_chunk,
        )
        tokens = np.zeros((batch.size, length), np.int32)
        next_tokens = np.zeros((batch.size, length), np.int32)
        for place, request, count in zip(batch.places, rows, counts, strict=True):
            chunk = [*request.sequence[request.stored : request.stored + count + 1], -1]
            tokens[place, :count], next_tokens[place, :count] = chunk[:count], chunk[1 : count + 1]
        sampled, scores, self.pages = prefill(
            self.graphdef, self.state, self.pages, self._rows(batch, counts), tokens, next_tokens,
            self._tables(batch, counts),
            self.config.draft_tokens > 0, _with_top(rows), any(r.unscored for r in rows),
        )  # fmt: skip
        sampled, scores = jax.device_get((sampled, scores))
        for place, request, count in zip(batch.places, rows, counts, strict=True):
            if request.unscored:
                logprobs, (top_tokens, top_logprobs) = scores
                request.add_scores(logprobs[place, :count], top_tokens[place], top_logprobs[place])
            if request.missing == count:
                self._extend(request, sampled, place, 1)
            self._store(request, count)

    def _decode(self):
        """Up to decode_steps tokens for every row that lacks only its last."""
        steps = self.config.decode_steps
        ahead, rows = self.config.draft_tokens, []
        for request in list(self.running):
            ready = request.status == "running" and request.tokens and request.missing == 1
            if ready and self._grow(request, min(steps, self._room(request)) + ahead):
                rows.append(request)
        # a later one's growth may have sent them back
        rows = [r for r in rows if r.status == "running"]
        if not rows:
            return
        most = (
            min(steps, STEPS_BESIDE_CONSTRAINT) if any(r.params.constraint for r in rows) else steps
        )
        budgets = [1 if r.params.constraint else min(most, self._room(r)) for r in rows]
        batch = self._batch(rows)
        last = np.zeros(batch.size, np.int32)
        last[batch.places] = [r.tokens[-1] for r in rows]
        tables = self._tables(
            batch, [b + ahead for b in budgets], self._pages_for(self.config.context + ahead)
        )
        sampled, self.pages = decode(
            self.graphdef,
            self.state,
            self.pages,
            self._rows(batch, budgets),
            last,
            tables,
            steps,
            ahead,
            _with_top(rows),
        )
        sampled = jax.device_get(sampled)
        for place, request in zip(batch.places, rows, strict=True):
            count, before = sampled.count_S[place], len(request.tokens)
            request.passes += int(sampled.passes_S[place])
            request.accepted += int(sampled.accepted_S[place])
            self._extend(request, sampled, place, count)
            # Stored are the token from before and those sampled but the last.
            self._store(request, len(request.tokens) - before)

    def _batch(self, requests: list[Request]) -> Batch:
        """The requests in their rows: shard after shard, as many rows each."""
        taken, order = collections.Counter(), []
        for request in requests:
            order.append((request.shard, taken[request.shard]))
            taken[request.shard] += 1
        smallest = -(-self.config.min_rows // self.shards)
        rows = min(_bucket(max(smallest, *taken.values())), self.config.num_rows // self.shards)
        return Batch(requests, rows * self.shards, [shard * rows + place for shard, place in order])

    def _room(self, request: Request) -> int:
        """Tokens that the request may still sample."""
        return min(request.params.max_new_tokens, self.config.context - len(request.prompt)) - len(
            request.tokens
        )

    def _grow(self, request: Request, count: int) -> bool:
        """Pages for `count` more stored tokens; where none are free, the shard's request that came
        last gives way.
        """
        while request.status == "running":
            more = self.pools[request.shard].allocate(
                max(self._pages_for(request.stored + count) - len(request.pages), 0)
            )
            if more is not None:
                request.pages += more
                return True
            self._requeue([r for r in self.running if r.shard == request.shard][-1])
        return False

    def _requeue(self, request: Request):
        self._leave(request)
        request.status = "waiting"
        self.waiting.appendleft(request)

    def _leave(self, request: Request):
        """Out of queue or batch; its pages are free."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
        self.pools[request.shard].release(request.pages)
        request.pages, request.stored = [], 0
        if request.unscored:
            request.prompt_logprobs, request.prompt_top_logprobs = [], []

    def _finish(self, request: Request, reason: str):
        if self.config.keep_experts:
            # At an end of its own the last token sampled, and it alone, is not in the cache.
            stored = request.stored if reason == "abort" else len(request.sequence) - 1
            request.experts = self._experts(request)[:stored]
        self._leave(request)
        request.status, request.finish_reason = "finished", reason

    def _experts(self, request: Request) -> np.ndarray:
        table = np.zeros(_bucket(max(MIN_TABLE, len(request.pages))), np.int32)
        table[: len(request.pages)] = request.pages
        first_page = request.shard * (self.config.num_pages // self.shards)
        with self._on_mesh():
            return np.asarray(experts_of(self.pages[2], table + first_page))[
                :, self.model_config.num_dense_layers :
            ]

    def _store(self, request: Request, count: int):
        """Counts tokens that the cache has now, and makes full pages known."""
        if request.status == "finished":
            return
        size, before = self.config.page_size, request.stored
        request.stored += count
        if request.stale:
            return
        self._complete_keys(request, request.stored // size)
        for index in range(before // size, request.stored // size):
            self.pools[request.shard].publish(request.pages[index], request.keys[index])

    def _extend(self, request: Request, sampled: Sampled, place: int, count: int):
        """Appends the first `count` tokens sampled in the row at `place`, and ends the request
        where it stops.
        """
        for number in range(count):
            token = int(sampled.tokens[place, number])
            request.tokens.append(token)
            request.logprobs.append(float(sampled.logprobs[place, number]))
            request.versions.append(self.version)
            if request.params.top_logprobs and sampled.top is not None:
                tokens, logprobs = (x[place, number] for x in sampled.top)
                request.top_logprobs.append(best_of(request.params.top_logprobs, tokens, logprobs))
            try:
                if (
                    token in request.params.stop_tokens
                    or request.accept(token)
                    or self._text_stops(request)
                ):
                    return self._finish(request, "stop")
            except ValueError as error:  # the grammar grew beyond its library's limits
                logger.warning("request %d ends: %s", request.id, error)
                return self._finish(request, "abort")
        if self._room(request) <= 0:
            self._finish(request, "length")

    def _text_stops(self, request: Request) -> bool:
        if not request.params.stop_strings or self.decode_text is None:
            return False
        longest = max(map(len, request.params.stop_strings))
        # a token is rarely under a quarter of a character
        text = self.decode_text(request.tokens[-4 * longest - 8 :])
        return any(stop in text for stop in request.params.stop_strings)

    def _rows(self, batch: Batch, counts: list[int]) -> Rows:
        return batch.rows(counts, self.model_config.vocab_size, self.config.context)

    def _tables(self, batch: Batch, counts: list[int], width: int | None = None) -> np.ndarray:
        """Page tables up to each row's end after `counts` more tokens, padded to `width` or a power
        of two.
        """
        pages = [
            r.pages[: self._pages_for(r.stored + count)]
            for r, count in zip(batch.requests, counts, strict=True)
        ]
        return batch.tables(pages, width or _bucket(max(MIN_TABLE, *map(len, pages))))


def _with_top(requests: list[Request]) -> bool:
    return any(r.params.top_logprobs for r in requests)


def _bucket(count: int, base: int = 2) -> int:
    """The next power of `base`, which is one of two itself."""
    bits = base.bit_length() - 1
    return 1 << -(-(count - 1).bit_length() // bits) * bits


def generate(model: GLM, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Request]:
    """Continues a few prompts with an engine just large enough for them. Raises ValueError as
    Engine.submit does.
    """
    if not prompts:
        return []
    longest = max(map(len, prompts)) + params.max_new_tokens
    context = min(_bucket(longest), model.config.max_length)
    page_size = 16
    config = EngineConfig(
        context=context, num_rows=len(prompts), page_size=page_size,
        num_pages=len(prompts) * -(-context // page_size),
        prefill_chunk=256, min_rows=1, min_chunk=1,
        decode_steps=16, draft_tokens=0, weights="compute", cache_dtype="compute",
        keep_experts=False,
    )  # fmt: skip
    return Engine(model, config).generate(prompts, params)
