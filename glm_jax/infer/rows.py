"""The requests of a batch as the arrays that the device takes, one row each; the other rows have
count 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm_jax.infer.request import Request
from glm_jax.infer.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, LogitChanges, RowParams
from glm_jax.infer.steps import Rows


class Batch:
    """`size` rows, the requests at `places`."""

    def __init__(self, requests: Sequence[Request], size: int, places: Sequence[int]):
        self.requests, self.size, self.places = requests, size, list(places)
        self.params = [r.params for r in requests]

    def rows(self, counts: Sequence[int], vocab_size: int, context: int) -> Rows:
        """counts: tokens to compute or to sample; context: most tokens of a request."""
        return Rows(
            stored_S=self._column([r.stored for r in self.requests], np.int32),
            counts_S=self._column(counts, np.int32),
            sampled_S=self._column([len(r.tokens) for r in self.requests], np.int32),
            params=RowParams(
                temperature=self._of_params("temperature", np.float32),
                top_k=self._of_params("top_k", np.int32),
                top_p=self._of_params("top_p", np.float32, 1),
                min_p=self._of_params("min_p", np.float32),
                key_words=self._of_params("key_words", np.uint32),
                stop_tokens=self._lists(
                    [p.stop_tokens for p in self.params], MAX_STOP_TOKENS, np.int32, -1
                ),
                logprob_temperature=self._of_params("logprob_temperature", np.float32, 1),
            ),
            changes=self._changes(vocab_size, context)
            if any(p.changes_logits for p in self.params)
            else None,
        )

    def _changes(self, vocab_size: int, context: int) -> LogitChanges:
        words = -(-vocab_size // 32)
        allowed = np.full((self.size, words), 0xFFFFFFFF, np.uint32)
        for place, request in zip(self.places, self.requests, strict=True):
            if request.allowed is not None:
                # a tokenizer may know fewer tokens than the model has
                own = request.allowed[:words]
                allowed[place] = np.pad(own, (0, words - len(own)))
        biases = [p.logit_bias for p in self.params]
        return LogitChanges(
            prompts_SC=self._lists(
                [r.prompt for r in self.requests], context, np.int32, vocab_size
            ),
            outputs_SC=self._lists(
                [r.tokens for r in self.requests], context, np.int32, vocab_size
            ),
            presence_S=self._of_params("presence_penalty", np.float32),
            frequency_S=self._of_params("frequency_penalty", np.float32),
            repetition_S=self._of_params("repetition_penalty", np.float32, 1),
            bias_tokens_SB=self._lists(
                [[token for token, _ in b] for b in biases], MAX_LOGIT_BIAS, np.int32, vocab_size
            ),
            bias_SB=self._lists(
                [[bias for _, bias in b] for b in biases], MAX_LOGIT_BIAS, np.float32, 0
            ),
            allowed_SW=allowed,
        )

    def tables(self, pages: Sequence[Sequence[int]], width: int) -> np.ndarray:
        """Page tables [size, width]."""
        return self._lists(pages, width, np.int32, 0)

    def _of_params(self, name: str, dtype, fill=0) -> np.ndarray:
        return self._column([getattr(p, name) for p in self.params], dtype, fill)

    def _column(self, values, dtype, fill=0) -> np.ndarray:
        out = np.full((self.size, *np.shape(values)[1:]), fill, dtype)
        out[self.places] = values
        return out

    def _lists(self, lists: Sequence[Sequence], width: int, dtype, fill) -> np.ndarray:
        """Lists of different lengths as rows [size, width], padded with `fill`."""
        out = np.full((self.size, width), fill, dtype)
        for place, own in zip(self.places, lists, strict=True):
            out[place, : len(own)] = own
        return out
