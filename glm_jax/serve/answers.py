"""The server's answers, whole and as the chunks of a stream, in the form of OpenAI's API with GLM's
`reasoning_content`.

Log-probabilities are those of the model at temperature 1, whatever changed the distribution that
was sampled from.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from data.chat_output import OutputReader
from data.tokenizer import Tokenizer
from glm_jax.serve.service import Piece
from glm_jax.serve.text_stream import TextStream, Token

# the most likely tokens at a position and their log-probabilities, best first
Top = list[tuple[int, float]]


class Answer:
    """What a request's samples have become, and its form in the API. Subclasses say what a choice
    looks like.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, prompt_tokens: Sequence[int], num_samples: int):
        """prompt_tokens: the length of each prompt."""
        self.num_prompt_tokens, self.num_sampled = sum(prompt_tokens), 0
        self._finish_reasons: list[str | None] = [None] * num_samples
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def take(self, piece: Piece) -> dict | None:
        """Adds a piece; returns the chunk of a stream that it makes, if any."""
        self.num_sampled += piece.num_sampled
        choice, says_something = self._take(piece)
        if choice["finish_reason"] == "abort":  # a constraint that could not go on
            choice["finish_reason"] = "length"
        self._finish_reasons[piece.index] = choice["finish_reason"]
        return self.chunk([choice]) if says_something or piece.finish_reason else None

    def chunk(self, choices: list[dict], **more) -> dict:
        return self._head | {"object": self.chunk_object, "choices": choices} | more

    def opening(self) -> list[dict]:
        """The chunks that a stream begins with."""
        return []

    def usage_chunk(self) -> dict:
        return self.chunk([], usage=self.usage)

    def whole(self) -> dict:
        """The answer in one, once the last piece is in."""
        choices = [
            self._choice(i) | {"index": i, "finish_reason": r}
            for i, r in enumerate(self._finish_reasons)
        ]
        return self._head | {"object": self.whole_object, "choices": choices, "usage": self.usage}

    @property
    def usage(self) -> dict:
        total = self.num_prompt_tokens + self.num_sampled
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_sampled,
            "total_tokens": total,
        }

    def _take(self, piece: Piece) -> tuple[dict, bool]:
        """The piece as a choice of a chunk, and whether it says anything."""
        raise NotImplementedError

    def _choice(self, index: int) -> dict:
        """A sample as a choice of the whole answer."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, prompt_tokens: Sequence[int], num_samples: int, *, logprobs: bool,
        decode: Callable[[Sequence[int]], str],
        echo: Sequence[Sequence[int]] | None = None, prompts_only: bool = False,
    ):  # fmt: skip
        """echo: per sample the prompt's tokens to begin with. prompts_only: nothing else is
        shown.
        """
        super().__init__(model, prompt_tokens, num_samples)
        self._logprobs = logprobs
        self._decode = decode
        self._echo = echo
        self._prompts_only = prompts_only
        self._tokens: list[list[Token]] = [[] for _ in range(num_samples)]
        self._tops: list[list[Top | None]] = [[] for _ in range(num_samples)]
        self._lengths = [0] * num_samples  # characters so far
        self._is_new = [True] * num_samples

    def _take(self, piece: Piece) -> tuple[dict, bool]:
        index, start = piece.index, self._lengths[piece.index]
        tokens: list[Token] = [] if self._prompts_only else list(piece.tokens)
        tops: list[Top | None] = [] if self._prompts_only else list(piece.top_logprobs)
        if (
            self._echo is not None
            and self._logprobs
            and piece.finish_reason == "stop"
            and piece.num_sampled == len(piece.tokens) + 1
        ):
            # Whoever scores prompts drops one entry for the one sampled token: it has to be there
            # where it is the stop token, too.
            tokens, tops = [*tokens, Token(-1, None, "")], [*tops, *[None] * bool(tops)]
        if self._echo is not None and self._is_new[index]:
            ids = self._echo[index]
            tokens = self._prompt(ids, piece) + tokens
            tops = self._prompt_tops(len(ids), piece) + tops
        self._is_new[index] = False
        self._tokens[index] += tokens
        self._tops[index] += tops
        choice = self._written(tokens, tops, start) | {
            "index": index,
            "finish_reason": piece.finish_reason,
        }
        self._lengths[index] += len(choice["text"])
        return choice, bool(choice["text"] or (tokens and self._logprobs))

    def _prompt(self, ids: Sequence[int], piece: Piece) -> list[Token]:
        """The prompt's tokens with their text; a first one has no log-probability."""
        text = TextStream(self._decode)
        logprobs = piece.prompt.logprobs[-len(ids) :] if piece.prompt and ids else [None] * len(ids)
        tokens = [token for pair in zip(ids, logprobs, strict=True) for token in text.push(*pair)]
        return tokens + text.finish()

    def _prompt_tops(self, count: int, piece: Piece) -> list[Top | None]:
        return piece.prompt.top_logprobs[-count:] if piece.prompt and count else []

    def _choice(self, index: int) -> dict:
        return self._written(self._tokens[index], self._tops[index], 0)

    def _written(self, tokens: list[Token], tops: list[Top | None], start: int) -> dict:
        offsets = itertools.accumulate((len(t.text) for t in tokens), initial=start)
        shown = [top and self._alternatives(top) for top in tops]
        logprobs = {
            "tokens": [t.text for t in tokens], "token_logprobs": [t.logprob for t in tokens],
            "text_offset": list(offsets)[:-1], "top_logprobs": shown if any(shown) else None,
        }  # fmt: skip
        return {
            "text": "".join(t.text for t in tokens),
            "logprobs": logprobs if self._logprobs else None,
        }

    def _alternatives(self, top: Top) -> dict[str, float]:
        """By their texts; where two have one text, as parts of characters have, the more likely one
        stands for both.
        """
        found = {}
        for token, logprob in top:
            found.setdefault(self._decode([token]), logprob)
        return found


class ChatAnswer(Answer):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, prompt_tokens: Sequence[int], num_samples: int, *, logprobs: bool,
        tools: list, control: Mapping[int, str],
        tokenizer: Tokenizer, parallel: bool = True, begun: str = "",
    ):  # fmt: skip
        """tools: those offered. control: spelling of the special tokens by id. parallel: more than
        one call may be shown.
        begun: the field that the prompt has begun, and the answer goes on with.
        """
        super().__init__(model, prompt_tokens, num_samples)
        self._logprobs = logprobs
        self._control = control
        self._tokenizer = tokenizer
        self._parallel = parallel
        self._readers = [OutputReader(tools, strict=False, begun=begun) for _ in range(num_samples)]
        self._messages = [
            {"reasoning_content": "", "content": "", "tool_calls": []} for _ in range(num_samples)
        ]
        self._entries: list[list[dict]] = [[] for _ in range(num_samples)]

    def opening(self) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        return [
            self.chunk([{"index": i, "delta": delta, "finish_reason": None}])
            for i in range(len(self._messages))
        ]

    def _take(self, piece: Piece) -> tuple[dict, bool]:
        reader, message = self._readers[piece.index], self._messages[piece.index]
        # A token cut by a stop string is text, even where it was a special one.
        deltas = [
            d for t in piece.tokens for d in reader.feed(t.text, self._control.get(t.id) == t.text)
        ]
        deltas += reader.finish() if piece.finish_reason else []
        delta = {}
        for new in deltas:
            value = new.value
            if isinstance(value, dict):  # a call
                if message["tool_calls"] and not self._parallel:
                    continue
                call = {"id": f"call_{uuid.uuid4().hex[:24]}"} | value
                value = [call | {"index": len(message["tool_calls"])}]
                message["tool_calls"].append(call)
            else:
                message[new.field] += value
            delta[new.field] = delta[new.field] + value if new.field in delta else value
        tops = piece.top_logprobs or [[]] * len(piece.tokens)
        entries = (
            [self._entry(*pair) for pair in zip(piece.tokens, tops, strict=True)]
            if self._logprobs
            else []
        )
        self._entries[piece.index] += entries
        reason = (
            "tool_calls"
            if piece.finish_reason == "stop" and message["tool_calls"]
            else piece.finish_reason
        )
        logprobs = {"content": entries, "refusal": None} if self._logprobs else None
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }, bool(delta or entries)

    def _choice(self, index: int) -> dict:
        message = self._messages[index]
        filled = {
            field: value or None for field, value in message.items() if value or field == "content"
        }
        if not message["tool_calls"]:
            filled["content"] = message["content"]
        logprobs = {"content": self._entries[index], "refusal": None} if self._logprobs else None
        return {"message": {"role": "assistant", **filled}, "logprobs": logprobs}

    def _entry(self, token: Token, top: Top) -> dict:
        """A token's log-probability. Its bytes are its own, so that those of all tokens make the
        output even where characters are cut between tokens; of a token that a stop string cut they
        are those of the text that is left.
        """
        entry = lambda i, text, logprob: {
            "token": text,
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(i)),
        }
        alternatives = [entry(i, self._tokenizer.decode([i]), logprob) for i, logprob in top]
        found = entry(token.id, token.text, token.logprob) | {"top_logprobs": alternatives}
        return found | ({"bytes": list(token.text.encode())} if token.is_cut else {})
