"""What can be measured, by name: held-out text, puzzles, HumanEval, and the tasks of lm-eval."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import time
from collections.abc import Sequence

from data.tokenizer import Tokenizer
from glm_jax.evaluation import human_eval, task_file
from glm_jax.evaluation.held_out import held_out_batches, run_held_out
from glm_jax.evaluation.puzzles import run_puzzles
from glm_jax.evaluation.results import write_results
from glm_jax.evaluation.subject import Measurement, Settings, Subject
from glm_jax.rewards import puzzles

OURS = ("held_out", *puzzles.GROUPS, "human_eval")
LOCAL_TASKS = pathlib.Path(__file__).parents[2] / "data" / "tasks"
DEFAULT_PUZZLES = 100  # of each generator


def prepare(
    names: Sequence[str],
    path: pathlib.Path,
    data: Sequence[str],
    tokenizer: Tokenizer,
    settings: Settings,
) -> dict[str, Measurement]:
    """The tasks by name, with all that can be wrong found out before any weights are read.

    data: dataset folders for `held_out`; empty for those of the run. Raises ValueError for an
    unknown name, naming the nearest.
    """
    if not names:
        raise ValueError(
            f"tasks: none given; valid are {', '.join(OURS)}, names of lm-eval, YAML files, and"
            " task files that end in .jsonl"
        )
    names = list(dict.fromkeys(names))
    foreign = [n for n in names if n not in OURS and not task_file.is_task_file(n)]
    theirs = prepare_lm_eval(foreign, settings) if foreign else {}
    tasks: dict[str, Measurement] = {}
    for name in names:
        if name in theirs:
            tasks[name] = theirs[name]
        elif task_file.is_task_file(name):
            tasks[name] = task_file.prepare(name, settings)
        elif name == "held_out":
            tasks[name] = functools.partial(
                run_held_out, held_out_batches(path, data, tokenizer, settings)
            )
        elif name == "human_eval":
            tasks[name] = human_eval.prepare(settings)
        else:
            limit = settings.limit or DEFAULT_PUZZLES
            chosen = {
                generator: puzzles.distinct(generator, "held_out", limit)
                for generator in puzzles.GROUPS[name]
            }
            tasks[name] = functools.partial(run_puzzles, name, chosen)
    return tasks


def prepare_lm_eval(names: Sequence[str], settings: Settings) -> dict[str, Measurement]:
    """Tasks by their names there, in data/tasks, or by the path of their YAML file."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"tasks: {', '.join(names)} not among {', '.join(OURS)}; other tasks are lm-eval's: pip"
            " install -r requirements-dev.txt"
        )
    from glm_jax.evaluation import lm_eval  # its import takes ten seconds

    def run(loaded, subject: Subject) -> dict[str, dict]:
        lm = lm_eval.EngineLM(
            subject.engine,
            subject.tokenizer,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
            progress=True,
        )
        return lm_eval.run_tasks(lm, loaded, settings.limit)

    return {
        name: functools.partial(run, loaded)
        for name, loaded in lm_eval.load_tasks(names, LOCAL_TASKS, OURS).items()
    }


def run(
    tasks: dict[str, Measurement], subject: Subject, output: pathlib.Path, known: dict[str, dict]
) -> dict[str, dict]:
    """Runs the tasks one after the other, and after each writes all results so far, in front of
    them those `known` before.
    """
    results = dict(known)
    if set(tasks) != {"held_out"}:
        # made here, so that wrong sizes are found out before anything is computed
        _ = subject.engine
    for name, task in tasks.items():
        started = time.perf_counter()
        found = task(subject)
        seconds = time.perf_counter() - started
        shared = {
            "task": name,
            "seconds": seconds,
            "settings": dataclasses.asdict(subject.settings),
        }
        results |= {part: entry | shared for part, entry in found.items()}
        write_results(output, subject, results)
    return results
