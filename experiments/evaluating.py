"""What experiments.evaluate measures: held-out text, puzzles, tasks of lm-eval; and the file and
table of its results.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import time
import types
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from data import chat_template
from data.held_out import HeldOutBatches
from data.pipeline import DataConfig
from data.tokenizer import Tokenizer
from glm_jax import load
from glm_jax.config import from_mapping
from glm_jax.infer.bulk import continue_all
from glm_jax.infer.engine import Engine, EngineConfig, Request, SamplingParams
from glm_jax.losses import chunked_cross_entropy, mtp_targets
from glm_jax.model.moe import RouterBias
from glm_jax.model.transformer import GLM
from glm_jax.rewards import puzzles
from glm_jax.sharding import MeshConfig, make_mesh
from glm_jax.train.checkpoint import load_weights, newest_step, read_config
from glm_jax.train.evaluation import Evaluator
from glm_jax.train.state import build_model
from glm_jax.train.step import LOSS_CHUNK

OURS = ("held_out", *puzzles.GROUPS, "human_eval")
LOCAL_TASKS = pathlib.Path(__file__).parent.parent / "data" / "tasks"
DEFAULT_CONTEXT = 4096  # tokens, where the model is meant for more
DEFAULT_ROW = 512  # tokens of held-out text, for a model that does not say how it was trained
DEFAULT_PUZZLES = 100  # of each generator


@dataclasses.dataclass(frozen=True)
class Settings:
    """How everything is measured; goes into the results as it is."""

    # batches of held-out text, puzzles of each generator, problems, documents of lm-eval; None:
    # all, or 100 puzzles
    limit: int | None
    # tokens of prompt and answer; None: the model's max_length, at most DEFAULT_CONTEXT
    context: int | None
    num_rows: int  # prompts in the engine's batch
    batch_tokens: int  # of a forward pass that scores
    draft_tokens: int  # guessed by the MTP block
    max_new_tokens: int  # of an answer to a puzzle or problem
    temperature: float  # of answers to puzzles and problems
    seed: int
    num_examples: int  # solved puzzles in front of a puzzle; not in chat
    chat: bool  # puzzles and problems as a chat's first turn
    thinking: bool  # in chat: ask for reasoning


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is measured. step: None for a Hugging Face folder."""

    path: pathlib.Path
    step: int | None
    model: GLM
    tokenizer: Tokenizer
    settings: Settings

    @functools.cached_property
    def engine(self) -> Engine:
        settings, page_size = self.settings, 16
        context = settings.context or min(self.model.config.max_length, DEFAULT_CONTEXT)
        config = EngineConfig(
            context=context, num_rows=settings.num_rows, page_size=page_size, prefill_chunk=256,
            decode_steps=16,
            min_rows=min(8, settings.num_rows), min_chunk=16,
            num_pages=settings.num_rows * -(-(context + settings.draft_tokens) // page_size),
            draft_tokens=settings.draft_tokens,
            weights="compute", cache_dtype="compute", keep_experts=False,
        )  # fmt: skip
        return Engine(self.model, config, decode_text=self.tokenizer.decode)

    @property
    def identity(self) -> dict:
        count = sum(x.size for x in jax.tree.leaves(nnx.state(self.model, nnx.Param)))
        return {
            "path": str(self.path),
            "step": self.step,
            "parameters": count,
            "config": dataclasses.asdict(self.model.config),
        }


Task = Callable[[Subject], dict[str, dict]]  # results by name, see `result`


def result(metrics: dict[str, tuple[float, float | None] | float], count: int, unit: str) -> dict:
    """One entry of the results: metrics as {"value", "stderr"} (None: not known), and of how many
    `unit` they are.
    """
    pairs = {
        name: value if isinstance(value, tuple) else (value, None)
        for name, value in metrics.items()
    }
    return {
        "metrics": {n: {"value": float(v), "stderr": e} for n, (v, e) in pairs.items()},
        "count": count,
        "unit": unit,
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, which one value does not have."""
    return float(np.mean(values)), (
        float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    )


def read_tokenizer(path: pathlib.Path) -> Tokenizer:
    return Tokenizer.load(path / "tokenizer.json")


def open_subject(
    path: pathlib.Path, step: int | None, tokenizer: Tokenizer, settings: Settings
) -> Subject:
    """Reads the weights of a work directory's checkpoint (None: the newest) or of a Hugging Face
    folder.
    """
    if "model" not in read_config(path):
        if step is not None:
            raise ValueError(f"step={step}: {path} is a Hugging Face folder, which has no steps")
        return Subject(path, None, load(path)[0], tokenizer, settings)
    step = newest_step(path) if step is None else step
    return Subject(path, step, build_model(*load_weights(path, step)), tokenizer, settings)


def prepare(
    names: Sequence[str],
    path: pathlib.Path,
    data: Sequence[str],
    tokenizer: Tokenizer,
    settings: Settings,
) -> dict[str, Task]:
    """The tasks by name, with all that can be wrong found out before any weights are read.

    data: dataset folders for `held_out`; empty for those of the run. Raises ValueError for an
    unknown name, naming the nearest.
    """
    if not names:
        raise ValueError(
            f"tasks: none given; valid are {', '.join(OURS)}, names of lm-eval and YAML files"
        )
    tasks: dict[str, Task] = dict.fromkeys(names)
    foreign = [name for name in tasks if name not in OURS]
    if foreign:
        tasks |= prepare_lm_eval(foreign, settings)
    for name in tasks:
        if name == "held_out":
            tasks[name] = functools.partial(
                run_held_out, held_out_batches(path, data, tokenizer, settings)
            )
        elif name == "human_eval":
            from experiments import evaluating_code  # which imports this module

            tasks[name] = evaluating_code.prepare(settings)
        elif name in OURS:
            limit = settings.limit or DEFAULT_PUZZLES
            chosen = {
                generator: puzzles.distinct(generator, "held_out", limit)
                for generator in puzzles.GROUPS[name]
            }
            tasks[name] = functools.partial(run_puzzles, name, chosen)
    return tasks


# --- held-out text ---


def held_out_batches(
    path: pathlib.Path, paths: Sequence[str], tokenizer: Tokenizer, settings: Settings
) -> HeldOutBatches:
    """The held-out text of the run's data, or of `paths`, in rows as the run was trained on, or
    else of the context's length.
    """
    recorded = read_config(path)
    if "data" in recorded:
        config = from_mapping(DataConfig, recorded["data"], "data")
    elif paths:
        length = settings.context or DEFAULT_ROW
        config = DataConfig(
            paths=tuple(paths), weights=(1.0,) * len(paths),
            batch_size=max(1, settings.batch_tokens // length), sequence_length=length,
            packing="concat_then_split", num_packing_bins=1, virtual_shards=1, seed=0, fim_rate=0.0,
            fim_psm_fraction=0.0,
            fim_level="character", epochs=0, verify_checksums=True,
        )  # fmt: skip
    else:
        raise ValueError(
            f"held_out: {path} does not say what data it was trained on; give --data=DIR"
        )
    if paths:
        config = dataclasses.replace(config, paths=tuple(paths), weights=(1.0,) * len(paths))
    batches = HeldOutBatches(config, 0, 1, settings.limit)
    if batches.tokenizer.to_json() != tokenizer.to_json():
        raise ValueError(
            f"held_out: {', '.join(config.paths)} was made with another tokenizer than that of"
            f" {path}"
        )
    return batches


class SecondHeadEvaluator(Evaluator):
    """The same pass for the MTP block: the token after the next, wherever both are of one
    document.
    """

    def _sums(self, params, router, batch):
        model = build_model(self.config, params, router)
        h = model.trunk(batch["tokens"], batch["segment_ids"], batch["positions"]).h
        x, _, _ = model.mtp_hidden(h, batch["targets"], batch["segment_ids"], batch["positions"])
        targets, weights = mtp_targets(batch)
        nats = chunked_cross_entropy(x, model.mtp_head.weight[...], targets, weights, LOSS_CHUNK)
        text_bytes = jnp.pad(batch["target_bytes"][:, 1:], ((0, 0), (0, 1)))
        return nats, jnp.sum(weights), jnp.sum(jnp.where(weights > 0, text_bytes, 0))


def run_held_out(batches: HeldOutBatches, subject: Subject) -> dict[str, dict]:
    """Loss in nats a token, its exponential, bits per byte; loss and bits per byte of the MTP block
    where there is one.
    """
    config = subject.model.config
    mesh = make_mesh(
        MeshConfig(data=1, fsdp=1, expert=1, context=1, tensor=1), jax.local_devices()[:1]
    )
    params, router = (
        nnx.to_pure_dict(part) for part in nnx.state(subject.model, nnx.Param, RouterBias)
    )
    state = types.SimpleNamespace(params=params, router=router)
    metrics = {}
    with jax.set_mesh(mesh):
        first = Evaluator(config, mesh, tqdm(batches, desc="held_out", unit="batch"))(state)
        metrics |= {"loss": first["held_out_loss"], "perplexity": np.exp(first["held_out_loss"])}
        metrics["bits_per_byte"] = first["held_out_bits_per_byte"]
        if subject.model.mtp is not None:
            second = SecondHeadEvaluator(
                config, mesh, tqdm(batches, desc="held_out, MTP", unit="batch")
            )(state)
            metrics |= {
                "mtp_loss": second["held_out_loss"],
                "mtp_bits_per_byte": second["held_out_bits_per_byte"],
            }
    return {"held_out": result(metrics, len(batches), "batches")}


# --- puzzles ---


def run_puzzles(
    group: str, chosen: dict[str, list[puzzles.Puzzle]], subject: Subject
) -> dict[str, dict]:
    """Every puzzle answered once by the engine. A puzzle that does not fit into the context, or an
    answer that could not be extracted, scores 0.

    Metrics: `score`, the mean of the verifiers' scores; `solved`, the share of right answers;
    `not_extracted` and `did_not_fit`, shares; `tokens_per_answer`, of those that fit.
    """
    settings = subject.settings
    asked = [puzzle for some in chosen.values() for puzzle in some]
    prompts = [puzzle_prompt(puzzle, subject) for puzzle in asked]
    fits = [
        len(prompt) + settings.max_new_tokens <= subject.engine.config.context for prompt in prompts
    ]
    params = [answer_sampling(number, subject) for number in range(len(asked))]
    requests = iter(continue_all(subject.engine, *_where(fits, prompts, params), group))
    records = [
        puzzle_record(puzzle, next(requests) if fit else None, subject)
        for puzzle, fit in zip(asked, fits, strict=True)
    ]
    found = {group: puzzle_result(records)}
    for generator in chosen:
        found[f"{group}/{generator}"] = puzzle_result(
            [r for p, r in zip(asked, records, strict=True) if p.generator == generator]
        )
    return found


def _where(mask: list[bool], *columns: list) -> list[list]:
    return [list(itertools.compress(column, mask)) for column in columns]


def puzzle_prompt(puzzle: puzzles.Puzzle, subject: Subject) -> list[int]:
    """Token ids: text to continue behind solved training puzzles of the same generator, or the
    user's turn of a chat.
    """
    settings, tokenizer = subject.settings, subject.tokenizer
    if settings.chat:
        messages = [{"role": "user", "content": puzzles.chat_request(puzzle)}]
        return chat_template.encode(tokenizer, messages, thinking=settings.thinking)
    examples = list(
        itertools.islice(puzzles.puzzles(puzzle.generator, "train"), settings.num_examples)
    )
    return [*tokenizer.start_ids, *tokenizer.encode(puzzles.completion_prompt(puzzle, examples))]


def answer_sampling(number: int, subject: Subject) -> SamplingParams:
    settings, tokenizer = subject.settings, subject.tokenizer
    stop_tokens = (
        tuple(map(tokenizer.special, chat_template.STOP_TOKENS))
        if settings.chat
        else (tokenizer.eos_id,)
    )
    return SamplingParams(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        seed=settings.seed, sample_index=number,
        stop_tokens=stop_tokens, stop_strings=() if settings.chat else ("\n",),
    )  # fmt: skip


def puzzle_record(puzzle: puzzles.Puzzle, request: Request | None, subject: Subject) -> dict:
    """What became of one puzzle; request: None where it did not fit."""
    if request is None:
        return {"score": 0.0, "extracted": False, "tokens": None}
    extract = puzzles.chat_answer if subject.settings.chat else puzzles.completion_answer
    answer = extract(subject.tokenizer.decode(request.text_tokens))
    return {
        "score": puzzles.score(puzzle, answer),
        "extracted": answer is not None,
        "tokens": len(request.tokens),
    }


def puzzle_result(records: list[dict]) -> dict:
    """The metrics of `run_puzzles` over some records."""
    lengths = [r["tokens"] for r in records if r["tokens"] is not None]
    metrics = {
        "score": mean_and_error([r["score"] for r in records]),
        "solved": mean_and_error([float(r["score"] == 1) for r in records]),
        "not_extracted": mean_and_error(
            [float(r["tokens"] is not None and not r["extracted"]) for r in records]
        ),
        "did_not_fit": mean_and_error([float(r["tokens"] is None) for r in records]),
    }
    if lengths:
        metrics["tokens_per_answer"] = mean_and_error(lengths)
    return result(metrics, len(records), "puzzles")


# --- tasks of lm-eval ---


def prepare_lm_eval(names: Sequence[str], settings: Settings) -> dict[str, Task]:
    """Tasks by their names there, in data/tasks, or by the path of their YAML file."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"tasks: {', '.join(names)} not among {', '.join(OURS)}; other tasks are lm-eval's: pip"
            " install -r requirements-dev.txt"
        )
    from glm_jax.infer import harness  # its import takes ten seconds

    def run(loaded, subject: Subject) -> dict[str, dict]:
        lm = harness.EngineLM(
            subject.engine,
            subject.tokenizer,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
            progress=True,
        )
        return harness.run_tasks(lm, loaded, settings.limit)

    return {
        name: functools.partial(run, loaded)
        for name, loaded in harness.load_tasks(names, LOCAL_TASKS, OURS).items()
    }


# --- results ---


def run(
    tasks: dict[str, Task], subject: Subject, output: pathlib.Path, known: dict[str, dict]
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


def find_output(
    path: pathlib.Path, step: int | None, output: str | None
) -> tuple[pathlib.Path, dict[str, dict]]:
    """The results file and what stays in it: by default W/evaluation/<step>.json with its tasks of
    before, else a new file.

    Raises ValueError where it cannot be written, or is damaged.
    """
    if output is None and "model" not in read_config(path):
        raise ValueError(f"{path} is a Hugging Face folder: give --output=FILE for the results")
    file = (
        pathlib.Path(output)
        if output
        else path / "evaluation" / f"{newest_step(path) if step is None else step}.json"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"output={str(file)!r} cannot be written")
    if output or not file.is_file():
        return file, {}
    try:
        return file, json.loads(file.read_text())["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of an evaluation: {error!r}") from error


def write_results(output: pathlib.Path, subject: Subject, results: dict[str, dict]):
    """The file appears, or changes, as a whole."""
    temporary = output.with_name(f".{output.name}.partial")
    temporary.write_text(
        json.dumps({"model": subject.identity, "results": results}, indent=2) + "\n"
    )
    temporary.replace(output)


def table(results: dict[str, dict]) -> str:
    """A line a metric; of the parts of a group only their score."""
    lines = [("task", "metric", "value", "stderr", "of")]
    for name, entry in results.items():
        is_part = name not in OURS and name.split("/")[0] in puzzles.GROUPS
        for metric, pair in entry["metrics"].items():
            if metric == "score" or not is_part:
                error = "" if pair["stderr"] is None else f"{pair['stderr']:.4f}"
                lines.append(
                    (
                        name,
                        metric,
                        f"{pair['value']:.4f}",
                        error,
                        f"{entry['count']} {entry['unit']}",
                    )
                )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = ("<", "<", ">", ">", ">")
    rows = [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])
