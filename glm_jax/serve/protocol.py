"""The requests that the server understands: the part of OpenAI's API that this engine can keep.

A field that nothing here reads is an error, so that nobody relies on what does not happen; HARMLESS
lists the exceptions. Besides OpenAI's own fields there are vLLM's `top_k`, `min_p`,
`repetition_penalty` and `continue_final_message`, and `thinking: {"type": "enabled" | "disabled"}`,
also spelled `chat_template_kwargs: {"enable_thinking": true | false}` and `reasoning_effort:
"none"`. Stop strings end the whole output, reasoning included.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from data.tokenizer import Tokenizer
from glm_jax.infer import grammar
from glm_jax.infer.sampling import MAX_TOP_LOGPROBS, Constraint, SamplingParams

# Bookkeeping of OpenAI's service: taken, and without any effect on the answer.
HARMLESS = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity",
)  # fmt: skip
SMALLEST_NUCLEUS = 1e-6  # top_p of 0: the most likely token
MAX_STOP_STRINGS = 16


class ApiError(Exception):
    """A request that gets an error for an answer. param: the field at fault. retry: it may work
    later.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
    ):
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": "1"} if retry else {}
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _only(*supported):
    """A field that is there for its neutral values alone."""

    def check(value):
        if value not in supported:
            raise ValueError(
                f"{value!r:.100} is not supported; supported: {', '.join(map(repr, supported))}"
            )
        return value

    return AfterValidator(check)


Strings = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
    BeforeValidator(lambda value: ([value] if value else []) if isinstance(value, str) else value),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _prompts(value) -> list:
    """A list of prompts, each text or token ids, from any of the four forms that the API has."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(
            "must be a string, a list of strings, a list of token ids or a list of such lists, and"
            " not empty"
        )
    prompts = [value] if all(type(v) is int for v in value) else value
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and prompt and all(type(v) is int for v in prompt)
        ):
            raise ValueError(f"[{i}] must be a string or a list of token ids, and not empty")
    return prompts


def _messages(messages):
    """Messages as data.chat_template has them, from what clients write: `developer` is the system,
    `reasoning` (vLLM's newer name, OpenRouter's) is `reasoning_content`, and a call without
    arguments has none in any spelling.
    """
    if not isinstance(messages, list):
        return messages
    return [_message(m) if isinstance(m, dict) else m for m in messages]


def _message(message: dict) -> dict:
    new = dict(message)
    if new.get("role") == "developer":
        new["role"] = "system"
    reasoning = new.pop("reasoning", None)
    if reasoning and not new.get("reasoning_content"):
        new["reasoning_content"] = reasoning
    calls = new.get("tool_calls")
    if isinstance(calls, list):
        new["tool_calls"] = [_call(c) if isinstance(c, dict) else c for c in calls]
    return new


def _call(call: dict) -> dict:
    function = call.get("function")
    if isinstance(function, dict) and function.get("arguments") in (None, ""):
        return call | {"function": function | {"arguments": "{}"}}
    return call


class _Object(BaseModel):
    """No unknown fields, no "5" for 5, and null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields):
        return (
            {k: v for k, v in fields.items() if v is not None}
            if isinstance(fields, dict)
            else fields
        )


class StreamOptions(_Object):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against who watches the network: none is sent
    continuous_usage_stats: Annotated[bool, _only(False)] = False


class Thinking(_Object):
    type: Literal["enabled", "disabled"]


class TemplateArguments(_Object):
    enable_thinking: bool = True


class JsonSchema(_Object):
    name: str = ""
    description: str = ""
    json_schema: Annotated[dict, Field(alias="schema")]
    strict: bool = True  # kept in any case


class ResponseFormat(_Object):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: goes with type json_schema, and has to be there then")
        return self


class NamedFunction(_Object):
    name: str


class NamedTool(_Object):
    type: Literal["function"]
    function: NamedFunction


class _Request(_Object):
    """What both endpoints take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0  # -1 as well: no limit
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Strings = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    logit_bias: dict[
        Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
    ] = {}
    # What vLLM's clients send beside OpenAI's: for the values that change nothing.
    ignore_eos: Annotated[bool, _only(False)] = False
    min_tokens: Annotated[int, _only(0)] = 0
    skip_special_tokens: Annotated[bool, _only(True)] = True
    spaces_between_special_tokens: Annotated[bool, _only(True)] = True

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, fields):
        return (
            {k: v for k, v in fields.items() if k not in HARMLESS}
            if isinstance(fields, dict)
            else fields
        )

    @model_validator(mode="after")
    def _options_of_a_stream(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only for stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def length(self, num_prompt_tokens: int, context: int, most: int, prompt: str) -> int:
        """New tokens to sample at most: as asked, else what the context of `context` tokens leaves,
        up to `most`.

        prompt: name of the field that the prompt came from. Raises ApiError.
        """
        room = context - num_prompt_tokens
        if room < 1:
            raise ApiError(
                400,
                f"{prompt}: {num_prompt_tokens} tokens, but the context is {context}, prompt and "
                f"answer together", param=prompt,
                code="context_length_exceeded",
            )  # fmt: skip
        name, asked = self.asked_length()
        if asked is not None and asked > min(room, most):
            limit = (
                f"{num_prompt_tokens} of prompt leave {room} of the context of {context}"
                if room < most
                else f"the limit is {most}"
            )
            raise ApiError(
                400,
                f"{name}: {asked} tokens are too many: {limit}",
                param=name,
                code="context_length_exceeded",
            )
        return min(room, most) if asked is None else asked

    def asked_length(self) -> tuple[str, int | None]:
        """Name and value of the field that limits the length."""
        return "max_tokens", self.max_tokens

    def sampling(
        self, max_new_tokens: int, stop_tokens: tuple[int, ...], seed: int
    ) -> SamplingParams:
        """Raises ApiError where the parameters contradict each other."""
        try:
            return SamplingParams(
                max_new_tokens=max_new_tokens, temperature=self.temperature,
                top_k=max(self.top_k, 0),
                top_p=max(self.top_p, SMALLEST_NUCLEUS), min_p=self.min_p,
                seed=(seed + 2**63) % 2**64 - 2**63,
                stop_tokens=stop_tokens, stop_strings=tuple(self.stop),
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
                top_logprobs=self.num_top_logprobs,
            )  # fmt: skip
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    @property
    def num_top_logprobs(self) -> int:
        """How many of the most likely tokens to return beside each."""
        return 0


class CompletionRequest(_Request):
    """POST /v1/completions. Text prompts get `[gMASK]<sop>` in front, token ids are taken as they
    are; a turn's end ends the text.
    """

    prompt: Annotated[list, BeforeValidator(_prompts)]
    # 0: with echo, only the prompt is looked at
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, _only(1)] = 1
    suffix: Annotated[str, _only("")] = ""

    @model_validator(mode="after")
    def _something_to_do(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 goes with echo alone")
        return self

    @property
    def num_top_logprobs(self) -> int:
        return self.logprobs or 0

    def sampling(
        self, max_new_tokens: int, stop_tokens: tuple[int, ...], seed: int
    ) -> SamplingParams:
        params = super().sampling(1 if self.max_tokens == 0 else max_new_tokens, stop_tokens, seed)
        return dataclasses.replace(params, prompt_logprobs=self.echo and self.logprobs is not None)


class ChatRequest(_Request):
    """POST /v1/chat/completions. Messages and tools are checked by data.chat_template."""

    messages: Annotated[list[Any], BeforeValidator(_messages)]
    tools: list[Any] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    # none: without; else as the model likes
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    continue_final_message: bool = False  # the last message is the beginning of the answer
    add_generation_prompt: bool = True
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    modalities: Annotated[list[str], _only(["text"])] = ["text"]
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateArguments | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _no_contradictions(self):
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError(
                f"max_completion_tokens: {self.max_completion_tokens} contradicts max_tokens:"
                f" {self.max_tokens}"
            )
        if (
            self.thinking
            and self.chat_template_kwargs
            and (self.thinking.type == "enabled") != self.chat_template_kwargs.enable_thinking
        ):
            raise ValueError("thinking: contradicts chat_template_kwargs.enable_thinking")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        if self.must_call and not self.tools:
            raise ValueError("tool_choice: there are no tools to call")
        if self.must_call and self.json_format is not None:
            raise ValueError("response_format: contradicts tool_choice, which asks for a tool call")
        last = self.messages[-1] if self.messages else None
        if self.continue_final_message and not (
            isinstance(last, dict) and last.get("role") == "assistant"
        ):
            raise ValueError("continue_final_message: the last message must be the assistant's")
        if self.add_generation_prompt == self.continue_final_message and not (
            self.continue_final_message and self._by_default
        ):
            raise ValueError("add_generation_prompt: is true unless continue_final_message is")
        return self

    @property
    def _by_default(self) -> bool:
        return "add_generation_prompt" not in self.model_fields_set

    @property
    def thinks(self) -> bool:
        if self.thinking:
            return self.thinking.type == "enabled"
        if self.chat_template_kwargs is not None:
            return self.chat_template_kwargs.enable_thinking
        return self.reasoning_effort != "none"

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in ("none", "auto")

    @property
    def json_format(self) -> ResponseFormat | None:
        """The response_format, where it asks for JSON."""
        asked = self.response_format
        return None if asked is None or asked.type == "text" else asked

    @property
    def offered_tools(self) -> list:
        return self.tools if self.tool_choice != "none" else []

    @property
    def num_top_logprobs(self) -> int:
        return self.top_logprobs

    def constraint(self, tokenizer: Tokenizer, begun: str) -> Constraint | None:
        """What the output must look like. begun: the field of the answer that the prompt has begun,
        or "".

        Raises ApiError for a schema that cannot be followed.
        """
        forms: dict[str, grammar.Reasoning] = {
            "": "whole" if self.thinks else "",
            "content": "",
            "reasoning_content": "rest",
        }
        reasoning, asked = forms[begun], self.json_format
        try:
            if self.must_call:
                name = (
                    self.tool_choice.function.name
                    if isinstance(self.tool_choice, NamedTool)
                    else None
                )
                return grammar.tool_call(
                    tokenizer,
                    self.tools,
                    name,
                    reasoning=reasoning,
                    parallel=self.parallel_tool_calls,
                )
            if asked is None:
                return None
            if asked.json_schema is None:
                return grammar.json_object(tokenizer, reasoning=reasoning)
            return grammar.json_schema(
                tokenizer, asked.json_schema.json_schema, reasoning=reasoning
            )
        except ValueError as error:
            param = "tool_choice" if self.must_call else "response_format"
            raise ApiError(400, f"{param}: {error}", param=param) from None

    def asked_length(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


AnyRequest = TypeVar("AnyRequest", bound=_Request)


def read_request(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """The request in a body of JSON. Raises ApiError naming the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    message, value = first["msg"].removeprefix("Value error, "), first["input"]
    param = (
        "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
        ).lstrip(".")[:100]
        or None
    )
    if first["type"] == "extra_forbidden":
        near = (
            difflib.get_close_matches(param, kind.model_fields, n=1)
            if param is not None and len(first["loc"]) == 1
            else None
        )
        message = "unknown field" + (f"; did you mean {near[0]}?" if near else "")
    elif first["type"] == "value_error" and param is None:
        param, _, message = message.partition(": ")  # of the checks over several fields
    elif param is None:
        message = f"the body is no request: {message}"
    elif first["type"] not in ("missing", "value_error") and isinstance(value, int | float | str):
        message = f"{message}, not {value!r:.100}"
    raise ApiError(400, f"{param}: {message}" if param else message, param=param)
