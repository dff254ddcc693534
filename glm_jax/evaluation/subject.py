"""The model that an evaluation measures, how, and what one result looks like."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from data.tokenizer import Tokenizer
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.loading import load
from glm_jax.model.transformer import GLM
from glm_jax.run.checkpoints import newest_step, read_config
from glm_jax.train.start import load_weights
from glm_jax.train.state import build_model

DEFAULT_CONTEXT = 4096  # tokens, where the model is meant for more


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
    max_turns: tuple[int, ...]  # of an episode in an environment; each is measured


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


Metric = tuple[float, float | None] | float  # with its standard error (None: not known), or alone
Measurement = Callable[[Subject], dict[str, dict]]  # results by name, see `result`


def result(metrics: Mapping[str, Metric], count: int, unit: str) -> dict:
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
