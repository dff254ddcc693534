"""Our engine as a language model of lm-eval 0.4.13 (the `LM` interface): any of its tasks runs on
any of our checkpoints.

Every text begins with the tokenizer's start tokens, as every document did in training; lm-eval's
own Hugging Face adapter begins with nothing, or with <|endoftext|> where a text has no context.
"""

from __future__ import annotations

import difflib
import os
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, yaml

from data.tokenizer import Tokenizer
from glm_jax.infer.bulk import continue_all, score_all
from glm_jax.infer.engine import Engine
from glm_jax.infer.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 256  # lm-eval's own, for tasks that do not say
FILES = (".yaml", ".yml", ".json")
GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class EngineLM(LM):
    """Scores by the model's forward pass, generates by the engine. A text too long for the engine's
    context loses its beginning.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, batch_tokens: int, seed: int, progress: bool
    ):
        """engine: with decode_text, for stop strings. batch_tokens: of a forward pass that scores.
        seed: of the first of the requests that sample; each has its own. progress: show bars.
        """
        super().__init__()
        self.engine = engine
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.progress = progress

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is greedy) for each request of (context,
        continuation).
        """
        return self._score([self.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-probability of each whole text, from windows of the full context where it is longer;
        every token counts once.
        """
        windows, owners = [], []
        start = list(self.tokenizer.start_ids)
        for owner, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0])
            # lm-eval knows prefixes of one token; the others are put in front of the first window,
            # and room is kept for them.
            size = self.engine.config.context - len(start) + 1
            pairs = get_rolling_token_windows(
                tokens, prefix_token=start[-1], max_seq_len=size, context_len=1
            )
            for number, pair in enumerate(map(make_disjoint_window, pairs)):
                context, continuation = pair
                windows.append((start if number == 0 else context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The text after each context, up to the first of its `until` strings (left out),
        <|endoftext|> or max_gen_toks tokens.
        """
        prompts, params, stops = [], [], []
        for number, request in enumerate(requests):
            context, asked = request.arguments
            settings: dict[str, Any] = {**normalize_gen_kwargs(asked, DEFAULT_NEW_TOKENS)}
            unknown = settings.keys() - GENERATION_KEYS
            if unknown:
                raise ValueError(
                    f"generation_kwargs {', '.join(sorted(unknown))}: valid are"
                    f" {', '.join(sorted(GENERATION_KEYS))}"
                )
            room = self.engine.config.context - settings["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={settings['max_gen_toks']} leaves no room for a prompt in a"
                    f" context of {self.engine.config.context}: set it in the task's"
                    " generation_kwargs"
                )
            stops.append([stop for stop in settings["until"] if stop])
            prompts.append([*self.tokenizer.start_ids, *self.tokenizer.encode(context)][-room:])
            params.append(self._sampling(settings, stops[-1], number))
        answers = continue_all(self.engine, prompts, params, "generate" if self.progress else "")
        return [
            _cut(self.tokenizer.decode(answer.text_tokens), own)
            for answer, own in zip(answers, stops, strict=True)
        ]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both parts, split as lm-eval splits them: spaces at the context's end belong
        to the continuation, and its tokens are those of the whole text after as many as the
        context has alone.
        """
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole, before = self.tokenizer.encode_batch([bare + continuation, bare])
        # Where both melt into fewer tokens nothing is left after the context, which lm-eval's own
        # adapter refuses to score.
        after = whole[len(before) :] or self.tokenizer.encode(continuation)
        return [*self.tokenizer.start_ids, *before], after

    def _score(self, pairs) -> list[tuple[float, bool]]:
        return score_all(
            self.engine,
            pairs,
            batch_tokens=self.batch_tokens,
            label="score" if self.progress else "",
        )

    def _sampling(self, settings: dict, stops: list[str], number: int) -> SamplingParams:
        """lm-eval's settings as ours; without do_sample or a temperature it is the most likely
        token.
        """
        return SamplingParams(
            max_new_tokens=settings["max_gen_toks"],
            temperature=settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 1.0),
            seed=self.seed,
            sample_index=number,
            stop_tokens=(self.tokenizer.eos_id,),
            stop_strings=tuple(stops),
        )


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def load_tasks(
    names: Sequence[str], folder: pathlib.Path, more_names: Sequence[str] = ()
) -> dict[str, TaskDict]:
    """Each name's tasks and groups, with their documents read: names of lm-eval or of `folder`, or
    paths of YAML files of one task.

    more_names: valid elsewhere, to be suggested as well. Raises ValueError with the nearest names
    for an unknown one, OSError where documents are missing or their download fails.
    """
    for name in names:
        if pathlib.Path(name).suffix in FILES and not pathlib.Path(name).is_file():
            raise ValueError(f"tasks: there is no file {name!r}")
    manager = TaskManager(include_path=folder, include_defaults=False)
    if _unknown(names, manager):
        manager = TaskManager(include_path=folder)  # with all of lm-eval's: takes seconds
    for name in _unknown(names, manager):
        near = difflib.get_close_matches(name, [*more_names, *manager.all_tasks], n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"tasks: {name!r} is neither one of {', '.join(more_names)} nor a task of lm-eval or a"
            f" YAML file{hint}"
        )
    return {name: _load(name, manager) for name in names}


def _load(name: str, manager: TaskManager) -> TaskDict:
    if name in manager.all_tasks:
        return manager.load([name])
    try:
        return manager.load([name])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"tasks: {name!r} does not describe a task of lm-eval: {type(error).__name__}: {error}"
        ) from error


def _unknown(names: Sequence[str], manager: TaskManager) -> list[str]:
    return [
        name for name in names if name not in manager.all_tasks and not pathlib.Path(name).is_file()
    ]


def run_tasks(lm: LM, loaded: TaskDict, limit: int | None) -> dict[str, dict]:
    """Runs what `load_tasks` gave for one name, on the first `limit` documents of each task (None:
    all).

    Returns for each task and group {"metrics": {name: {"value", "stderr"}}, "count", "unit",
    "num_fewshot", "version"}; stderr is None where lm-eval knows none.
    """
    # For bootstrapped errors lm-eval forks workers, which a process with XLA's threads in it must
    # not do.
    os.environ["DISABLE_MULTIPROC"] = "1"
    random.seed(0)  # this and what follows as in lm-eval's own command
    np.random.seed(1234)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    evaluated = evaluator.evaluate(
        lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=1000, log_samples=False
    )
    assert evaluated is not None, "one process has all results"
    out: dict[str, Any] = {**evaluated}
    found = {}
    for name, values in (out["results"] | out.get("groups", {})).items():
        metrics = {}
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = values.get(f"{metric}_stderr,{filtered}")
                shown = metric if filtered == "none" else f"{metric} ({filtered})"
                metrics[shown] = {
                    "value": float(value),
                    "stderr": None if stderr in (None, "N/A") else float(stderr),
                }
        about = {"num_fewshot": out["n-shot"].get(name), "version": out["versions"].get(name)}
        found[name] = {"metrics": metrics, "count": _count(name, out), "unit": "documents", **about}
    return found


def _count(name: str, out: dict) -> int:
    """Documents of a task, or of all tasks of a group."""
    if name in out["n-samples"]:
        return out["n-samples"][name]["effective"]
    return sum(_count(child, out) for child in out["group_subtasks"].get(name, ()))
