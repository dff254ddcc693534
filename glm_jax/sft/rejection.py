"""Rejection sampling (arXiv 2508.06471, section 3.1): which sampled responses become conversations
to fine-tune on.

Responses are sampled and judged elsewhere; here are the four filters, the selection of prompts by
the length of their responses, and several responses for each hard prompt. Pure: the same samples
give the same conversations, in the order of the samples.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from data.chat_messages import TemplateError, arguments_of, check_tools, visible_text
from glm_jax.rollouts.rollout import RolloutStatus

STATUSES = tuple(status.value for status in RolloutStatus)
FILTERS = ("form", "correctness", "preference", "tools")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A response to a task. prompt, response, tools: as data.chat_template takes them; the response
    begins with the assistant's turn, ends with it, and has the tools' answers in between. Messages
    of the assistant as data.chat_output.parse gives them.
    """

    task: str  # samples of one task have its id and its prompt in common
    prompt: tuple[Mapping, ...]
    response: tuple[Mapping, ...]
    thinking: bool  # whether the model was asked to reason
    num_tokens: int  # of the response, sampled by the model
    status: str  # of STATUSES
    reward: float | None  # by a verifier; None where the task has no objective answer
    tools: tuple[Mapping, ...] = ()
    is_terminal: bool = True  # the environment reached its end, where the task has one


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
    """min_tokens: of a response. min_reward: of an objective one. min_preference: of a subjective
    one, in the reward model's scale.
    drop_shortest: share of the prompts, by the mean length of what is kept, that is dropped. A
    prompt is hard where at most hard_pass_rate of its objective responses have min_reward; it keeps
    up to hard_responses, another one up to easy_responses.
    """

    min_tokens: int
    min_reward: float
    min_preference: float
    drop_shortest: float
    hard_pass_rate: float
    hard_responses: int
    easy_responses: int

    def __post_init__(self):
        for name in ("drop_shortest", "hard_pass_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; valid: 0 to 1")
        for name in ("hard_responses", "easy_responses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; valid: 1 or more")


def select(
    samples: Sequence[Sample],
    config: RejectionConfig,
    preference: Callable[[Sequence[Sample]], Sequence[float]] | None = None,
) -> tuple[list[dict], collections.Counter]:
    """Conversations to fine-tune on (`messages`, `tools`, `thinking`), and what became of the
    samples: `kept`, and `filter/reason` of each drop. preference: a reward model's scores of
    samples without a reward. Raises ValueError where it is needed and missing.
    """
    passing, counts = apply_filters(samples, config, preference)
    hard = hard_tasks(samples, config)
    by_prompt = drop_shortest_prompts(passing, config.drop_shortest)
    counts["selection/short_prompt"] = len(passing) - len(by_prompt)
    kept = limit_responses(by_prompt, hard, config)
    counts["selection/enough_responses"] = len(by_prompt) - len(kept)
    counts["kept"] = len(kept)
    return [
        {"messages": [*s.prompt, *s.response], "tools": list(s.tools), "thinking": s.thinking}
        for s in kept
    ], +counts


# --- the four filters ---


def apply_filters(
    samples: Sequence[Sample],
    config: RejectionConfig,
    preference: Callable[[Sequence[Sample]], Sequence[float]] | None = None,
) -> tuple[list[Sample], collections.Counter]:
    """The samples that pass all four, each filter seeing what the one before it has left, and
    `filter/reason` -> drops.
    """
    steps = (
        lambda left: wrong_forms(left, config.min_tokens),
        lambda left: wrong_answers(left, config.min_reward),
        lambda left: disliked(left, config.min_preference, preference),
        lambda left: [broken_tool_use(sample) for sample in left],
    )
    counts = collections.Counter()
    for name, reasons_of in zip(FILTERS, steps, strict=True):
        reasons = reasons_of(samples)
        counts.update(f"{name}/{reason}" for reason in reasons if reason)
        samples = [sample for sample, reason in zip(samples, reasons, strict=True) if not reason]
    return list(samples), counts


def wrong_forms(samples: Sequence[Sample], min_tokens: int) -> list[str | None]:
    """Filter 1, a reason for each sample or None: how it ended, too_short, bad_reasoning, or
    duplicate of one before it.
    """
    seen, reasons = set(), []
    for sample in samples:
        reason = _form(sample, min_tokens)
        key = " ".join(
            json.dumps([sample.prompt, sample.response], sort_keys=True, default=dict)
            .replace("\\n", " ")
            .split()
        )
        if reason is None and key in seen:
            reason = "duplicate"
        if reason is None:
            seen.add(key)
        reasons.append(reason)
    return reasons


def _form(sample: Sample, min_tokens: int) -> str | None:
    if sample.status not in STATUSES:
        raise ValueError(
            f"task {sample.task!r}: status {sample.status!r} is not one of {', '.join(STATUSES)}"
        )
    if sample.status != "completed":
        return sample.status
    if sample.num_tokens < min_tokens:
        return "too_short"
    turns = [message for message in sample.response if message["role"] == "assistant"]
    reasonings = [(turn.get("reasoning_content") or "").strip() for turn in turns]
    visible = [visible_text(turn, "response") for turn in turns]
    has_tags = any(
        tag in text for text in (*reasonings, *visible) for tag in ("<think>", "</think>")
    )
    return "bad_reasoning" if has_tags or any(reasonings) != sample.thinking else None


def wrong_answers(samples: Sequence[Sample], min_reward: float) -> list[str | None]:
    """Filter 2: `wrong` where a verifier gave less than min_reward."""
    return [
        "wrong" if sample.reward is not None and sample.reward < min_reward else None
        for sample in samples
    ]


def disliked(
    samples: Sequence[Sample],
    min_preference: float,
    preference: Callable[[Sequence[Sample]], Sequence[float]] | None,
) -> list[str | None]:
    """Filter 3: `disliked` where no verifier judged and the reward model gives less than
    min_preference.
    """
    subjective = [sample for sample in samples if sample.reward is None]
    scores: Iterator[float] = iter(())
    if subjective:
        if preference is None:
            raise ValueError(
                f"task {subjective[0].task!r} has no objective answer: a reward model is needed"
            )
        scores = iter(preference(subjective))
    return [
        ("disliked" if next(scores) < min_preference else None) if sample.reward is None else None
        for sample in samples
    ]


def broken_tool_use(sample: Sample) -> str | None:
    """Filter 4: `protocol` where a call is not of the tools or lacks an argument, or calls and
    answers do not take turns; `not_terminal` where the end was not reached: the last turn still
    calls, or the environment was not done.
    """
    schemas, open_calls = check_tools(sample.tools), 0
    for message in sample.response:
        if message["role"] == "tool":
            open_calls -= 1
        elif message["role"] != "assistant" or open_calls:
            return "protocol"
        else:
            calls = message.get("tool_calls") or ()
            if not all(_fits(call["function"], schemas) for call in calls):
                return "protocol"
            open_calls = len(calls)
    ends = bool(sample.response) and sample.response[-1]["role"] == "assistant" and not open_calls
    return None if ends and sample.is_terminal else "not_terminal"


def _fits(function: Mapping, schemas: Mapping[str, Mapping]) -> bool:
    """Whether a call names a tool, and the arguments that this has and needs."""
    if function["name"] not in schemas:
        return False
    schema = schemas[function["name"]]
    try:
        names = set(arguments_of(function, "function"))
    except TemplateError:
        return False
    return names >= set(schema.get("required") or ()) and (
        "properties" not in schema or names <= set(schema["properties"])
    )


# --- prompts and responses ---


def drop_shortest_prompts(samples: Sequence[Sample], share: float) -> list[Sample]:
    """Without the share (0 to 1, rounded down to whole prompts) of the tasks whose samples are
    shortest on average.
    """
    lengths = _by_task(samples)
    order = sorted(
        lengths, key=lambda task: sum(s.num_tokens for s in lengths[task]) / len(lengths[task])
    )
    dropped = set(order[: int(share * len(order))])
    return [sample for sample in samples if sample.task not in dropped]


def hard_tasks(samples: Iterable[Sample], config: RejectionConfig) -> set[str]:
    """Tasks with an objective answer that at most hard_pass_rate of all their samples got right;
    what failed on its way counts not.
    """
    judged = _by_task(
        sample
        for sample in samples
        if sample.reward is not None and RolloutStatus(sample.status).is_models
    )
    rates = {
        task: sum(s.reward is not None and s.reward >= config.min_reward for s in own) / len(own)
        for task, own in judged.items()
    }
    return {task for task, rate in rates.items() if rate <= config.hard_pass_rate}


def limit_responses(
    samples: Sequence[Sample], hard: set[str], config: RejectionConfig
) -> list[Sample]:
    """The first of each task, as many as it may keep."""
    kept, counts = [], collections.Counter()
    for sample in samples:
        if counts[sample.task] < (
            config.hard_responses if sample.task in hard else config.easy_responses
        ):
            counts[sample.task] += 1
            kept.append(sample)
    return kept


def _by_task(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    found = collections.defaultdict(list)
    for sample in samples:
        found[sample.task].append(sample)
    return found
