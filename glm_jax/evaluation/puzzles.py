"""Puzzles of reasoning-gym, as a chat or as text to complete."""

from __future__ import annotations

import itertools

from glm_jax.evaluation import chat
from glm_jax.evaluation.subject import Subject, mean_and_error, result
from glm_jax.infer.bulk import continue_all
from glm_jax.infer.request import Request
from glm_jax.infer.sampling import SamplingParams
from glm_jax.rewards import puzzles
from glm_jax.rollouts.rollout import Rollout

NOT_FITTING = {"score": 0.0, "solved": 0.0, "extracted": False, "tokens": None}


def run_puzzles(
    group: str, chosen: dict[str, list[puzzles.Puzzle]], subject: Subject
) -> dict[str, dict]:
    """Every puzzle answered once by the engine. A puzzle that does not fit into the context, and an
    answer that was cut short or could not be read, score 0.

    Metrics: `score`, the mean of the generators' scores; `solved`, the share of right answers;
    `not_extracted` and `did_not_fit`, shares; `tokens_per_answer`, of those that fit.
    """
    asked = [puzzle for some in chosen.values() for puzzle in some]
    if subject.settings.chat:
        tasks = [puzzles.task_of(puzzle) for puzzle in asked]
        records = [chat_record(r) for r in chat.rollouts(tasks, subject, group)]
    else:
        records = completed(asked, subject, group)
    found = {group: puzzle_result(records)}
    for generator in chosen:
        own = [r for p, r in zip(asked, records, strict=True) if p.generator == generator]
        found[f"{group}/{generator}"] = puzzle_result(own)
    return found


def chat_record(rollout: Rollout | None) -> dict:
    """What became of one puzzle; rollout: None where it did not fit."""
    if rollout is None:
        return NOT_FITTING
    parts = rollout.reward.parts  # none where the output could not be read
    return {
        "score": parts.get("partial", 0.0),
        "solved": rollout.reward.value,
        "extracted": parts.get("answered", 0.0) > 0,
        "tokens": rollout.num_sampled,
    }


def completed(asked: list[puzzles.Puzzle], subject: Subject, label: str) -> list[dict]:
    """Records of puzzles whose text a base model goes on after."""
    prompts = [completion_prompt(puzzle, subject) for puzzle in asked]
    fits = [chat.fits_into(subject, prompt) for prompt in prompts]
    params = [completion_sampling(number, subject) for number in range(len(asked))]
    fitting = list(itertools.compress(prompts, fits)), list(itertools.compress(params, fits))
    requests = iter(continue_all(subject.engine, *fitting, label))
    return [
        completion_record(puzzle, next(requests), subject) if fit else NOT_FITTING
        for puzzle, fit in zip(asked, fits, strict=True)
    ]


def completion_prompt(puzzle: puzzles.Puzzle, subject: Subject) -> list[int]:
    """Token ids, after solved training puzzles of the same generator."""
    tokenizer, count = subject.tokenizer, subject.settings.num_examples
    examples = list(itertools.islice(puzzles.puzzles(puzzle.generator, "train"), count))
    return [*tokenizer.start_ids, *tokenizer.encode(puzzles.completion_prompt(puzzle, examples))]


def completion_sampling(number: int, subject: Subject) -> SamplingParams:
    settings = subject.settings
    return SamplingParams(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        seed=settings.seed, sample_index=number,
        stop_tokens=(subject.tokenizer.eos_id,), stop_strings=("\n",),
    )  # fmt: skip


def completion_record(puzzle: puzzles.Puzzle, request: Request, subject: Subject) -> dict:
    answer = puzzles.completion_answer(subject.tokenizer.decode(request.text_tokens))
    score = puzzles.score(puzzle, answer)
    return {
        "score": score,
        "solved": float(score == 1),
        "extracted": answer is not None,
        "tokens": len(request.tokens),
    }


def puzzle_result(records: list[dict]) -> dict:
    """The metrics of `run_puzzles` over some records."""
    lengths = [r["tokens"] for r in records if r["tokens"] is not None]
    metrics = {
        "score": mean_and_error([r["score"] for r in records]),
        "solved": mean_and_error([r["solved"] for r in records]),
        "not_extracted": mean_and_error(
            [float(r["tokens"] is not None and not r["extracted"]) for r in records]
        ),
        "did_not_fit": mean_and_error([float(r["tokens"] is None) for r in records]),
    }
    if lengths:
        metrics["tokens_per_answer"] = mean_and_error(lengths)
    return result(metrics, len(records), "puzzles")
