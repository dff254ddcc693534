"""Tasks of lm-eval on our engine, against torch: every log-probability, rolling windows,
generation, and whole tasks.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import torch
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from data.tokenizer import train_tokenizer
from glm_jax import hf
from glm_jax.evaluation import lm_eval as harness
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from tests.model.oracle import Oracle, random_state, tiny_config, to_jax

CONTEXT = 72  # no power of two
TEXT = "\n\n".join(
    f"def {name}(first, second):\n    return first {sign} second\n"
    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*"))
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 4, 300)


@pytest.fixture(scope="module")
def config(tokenizer):
    return tiny_config(vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def lm(config, tokenizer):
    model = nnx.merge(nnx.graphdef(hf.abstract_model(config)), to_jax(random_state(config)))
    # Sizes with which few programs are compiled.
    sizes = {
        "num_rows": 1,
        "page_size": 16,
        "num_pages": 8,
        "prefill_chunk": 4,
        "decode_steps": 4,
        "draft_tokens": 0,
        "min_rows": 1,
        "min_chunk": 1,
    }
    engine_config = EngineConfig(
        context=CONTEXT, weights="compute", cache_dtype="compute", keep_experts=False, **sizes
    )
    engine = Engine(model, engine_config, decode_text=tokenizer.decode)
    return harness.EngineLM(engine, tokenizer, batch_tokens=256, seed=0, progress=False)


@pytest.fixture(scope="module")
def oracle(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    hf.export_checkpoint(folder, config, random_state(config), dtype="float32")
    return Oracle(folder)


@pytest.fixture(scope="module")
def logprobs(oracle):
    """logprobs(inputs): float64 log-softmax after each token of one row, [L, V]."""
    return lambda inputs: torch.log_softmax(
        torch.tensor(oracle.logits([inputs])[0], dtype=torch.float64), dim=-1
    ).numpy()


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=0, metadata=("task", i, 1))
        for i, a in enumerate(arguments)
    ]


def score(logprobs, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """By torch, from texts whose tokens do not melt into each other where they meet."""
    before = [*tokenizer.start_ids, *tokenizer.encode(context)]
    behind = tokenizer.encode(continuation)
    assert before + behind == [*tokenizer.start_ids, *tokenizer.encode(context + continuation)]
    row = (before + behind)[-(CONTEXT + 1) :]
    table = logprobs(row[:-1])[-len(behind) :]
    return table[np.arange(len(behind)), behind].sum(), bool((table.argmax(-1) == behind).all())


PAIRS = [
    ("def add(first, second):", "\n    return first + second\n"),
    ("def add(first, second):", "\n    return second\n"),
    ("", "def sub(first, second):"),
    ("x", " = 1"),
    (TEXT.rstrip(), "\ndef mul("),  # longer than the context
]


def test_loglikelihood_equals_torch(lm, logprobs, tokenizer):
    assert len(tokenizer.encode(TEXT)) > CONTEXT
    ours = lm.loglikelihood(requests("loglikelihood", *PAIRS))
    theirs = [score(logprobs, tokenizer, *pair) for pair in PAIRS]
    np.testing.assert_allclose([s for s, _ in ours], [s for s, _ in theirs], atol=1e-4)
    assert [g for _, g in ours] == [g for _, g in theirs]


def test_pairs_split_where_lm_eval_splits_them(lm, tokenizer):
    start = list(tokenizer.start_ids)
    assert lm.encode_pair("return ", "first") == (
        [*start, *tokenizer.encode("return")],
        tokenizer.encode(" first"),
    )
    assert lm.encode_pair("", "x") == (start, tokenizer.encode("x"))
    pieces = (TEXT[i : i + 2] for i in range(len(TEXT)))
    first, second = next(
        piece for piece in pieces if piece.isalpha() and len(tokenizer.encode(piece)) == 1
    )
    # One token together: nothing is left behind the context, so the continuation stands for itself.
    assert lm.encode_pair(first, second) == (
        [*start, *tokenizer.encode(first)],
        tokenizer.encode(second),
    )


def test_rolling_counts_every_token_once_with_windows_as_lm_eval_describes(lm, logprobs, tokenizer):
    texts = ["def add(first):", TEXT * 2, ""]
    ours = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    start, size = list(tokenizer.start_ids), CONTEXT - 1
    for text, value in zip(texts, ours, strict=True):
        tokens, expected = tokenizer.encode(text), 0.0
        for i, token in enumerate(tokens):
            window_end = min((i // size + 1) * size, len(tokens))
            # The first window begins with the document; a later one with the token before its
            # first, the last one is full.
            inputs = start + tokens[:i] if i < size else tokens[window_end - size - 1 : i]
            expected += logprobs(inputs)[-1, token]
        assert value == pytest.approx(expected, abs=1e-4 * max(1, len(tokens) / 10)), text
    assert len(tokenizer.encode(texts[1])) > 2 * CONTEXT


def greedy(oracle, tokenizer, context: str, count: int) -> str:
    row = torch.tensor([[*tokenizer.start_ids, *tokenizer.encode(context)][-(CONTEXT - count) :]])
    with torch.no_grad():
        out = oracle.main.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=tokenizer.eos_id,
        )
    new = out[0, row.shape[1] :].tolist()
    return tokenizer.decode(new[: new.index(tokenizer.eos_id)] if tokenizer.eos_id in new else new)


def test_generation_equals_transformers_up_to_the_stop(lm, oracle, tokenizer):
    contexts = ["def add(", "return", TEXT, "x = 1\n"]
    whole = [greedy(oracle, tokenizer, context, 12) for context in contexts]
    ours = lm.generate_until(
        requests("generate_until", *((c, {"until": [], "max_gen_toks": 12}) for c in contexts))
    )
    assert ours == whole
    stops = [text[len(text) // 2 :][:2] for text in whole]
    stopped = lm.generate_until(
        requests(
            "generate_until",
            *(
                (c, {"until": [s, "never"], "max_gen_toks": 12})
                for c, s in zip(contexts, stops, strict=True)
            ),
        )
    )
    assert stopped == [text.partition(stop)[0] for text, stop in zip(whole, stops, strict=True)]


def test_sampling_follows_the_settings_and_the_seed(lm):
    sampled = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "until": []}
    first, second = (
        lm.generate_until(requests("generate_until", *[("def", sampled)] * 3)) for _ in range(2)
    )
    assert first == second and len(set(first)) == 3
    cold = lm.generate_until(
        requests("generate_until", *[("def", sampled | {"do_sample": False})] * 2)
    )
    assert (
        cold[0]
        == cold[1]
        == lm.generate_until(requests("generate_until", ("def", sampled | {"top_k": 1})))[0]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs num_beams: valid are do_sample, max_gen_toks"),
        (
            {"max_gen_toks": CONTEXT},
            "max_gen_toks=72 leaves no room for a prompt in a context of 72",
        ),
        ({}, "max_gen_toks=256 leaves no room"),
    ],
)
def test_generation_settings_that_cannot_be_met_are_named(lm, settings, message):
    with pytest.raises(ValueError, match=message):
        lm.generate_until(requests("generate_until", ("def", {"until": ["\n"], **settings})))


# --- whole tasks ---


@pytest.fixture
def task(tmp_path):
    """task(name, documents, **keys): path of a YAML file with its documents beside it."""

    def make(name: str, documents: list[dict], **keys) -> str:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        described = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(described | keys))  # JSON is YAML
        return str(path)

    return make


def run(lm, path: str, limit: int | None = None) -> dict:
    (loaded,) = harness.load_tasks([path], pathlib.Path("data/tasks")).values()
    return harness.run_tasks(lm, loaded, limit)[pathlib.Path(path).stem]


def mean_metric(name: str, **more) -> dict:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True, **more}


def test_a_multiple_choice_task_runs_end_to_end(lm, logprobs, tokenizer, task):
    choices = [" first", " second", " return"]
    documents = [{"question": f"def f{i}({'x' * i}", "label": i % 3} for i in range(9)]
    path = task(
        "toy_choice", documents, output_type="multiple_choice", doc_to_text="{{question}}",
        doc_to_choice=choices,
        doc_to_target="label", target_delimiter="", metric_list=[mean_metric("acc")],
    )  # fmt: skip
    right = [
        float(
            np.argmax([score(logprobs, tokenizer, d["question"], choice)[0] for choice in choices])
            == d["label"]
        )
        for d in documents
    ]
    out = run(lm, path)
    assert (
        out["metrics"]["acc"]["value"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
    )
    assert out["metrics"]["acc"]["stderr"] == pytest.approx(np.std(right, ddof=1) / 3)
    assert (out["count"], out["num_fewshot"]) == (9, 0)
    assert run(lm, path, limit=4)["metrics"]["acc"]["value"] == pytest.approx(np.mean(right[:4]))


def test_examples_are_the_same_in_every_run(lm, task, monkeypatch):
    documents = [{"question": f"def f{i}(", "label": i % 2} for i in range(9)]
    path = task(
        "toy_shots", documents, output_type="multiple_choice", doc_to_text="{{question}}",
        doc_to_choice=[" first", " second"], doc_to_target="label", num_fewshot=2,
        fewshot_split="test", metric_list=[mean_metric("acc")],
    )  # fmt: skip
    asked, score_all = [], lm.loglikelihood
    monkeypatch.setattr(
        lm, "loglikelihood",
        lambda requests: asked.append([r.args for r in requests]) or score_all(requests),
    )  # fmt: skip
    outs = [run(lm, path), run(lm, path)]
    assert asked[0] == asked[1] and outs[0] == outs[1] and outs[0]["num_fewshot"] == 2
    assert all(context.count("def f") == 3 for context, _ in asked[0])
    assert len({context for context, _ in asked[0]}) == 9


def test_a_generation_task_runs_end_to_end(lm, oracle, tokenizer, task):
    contexts = ["def add(", "return", "x = 1", "first"]
    targets = [
        greedy(oracle, tokenizer, f"{c}\n", 6) if i % 2 else "something else"
        for i, c in enumerate(contexts)
    ]
    path = task(
        "toy_generation",
        [{"question": c, "target": t} for c, t in zip(contexts, targets, strict=True)],
        output_type="generate_until",
        doc_to_text="{{question}}\n", doc_to_target="{{target}}", target_delimiter="",
        generation_kwargs={"until": ["\n\n\n\n"], "max_gen_toks": 6},
        metric_list=[mean_metric("exact_match")],
        filter_list=[{"name": "whole", "filter": [{"function": "take_first"}]}],
    )  # fmt: skip
    assert run(lm, path)["metrics"]["exact_match (whole)"]["value"] == 0.5


def test_a_rolling_task_runs_end_to_end(lm, task):
    path = task(
        "toy_text", [{"text": TEXT}, {"text": "x = 1\n"}], output_type="loglikelihood_rolling",
        doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    (nats,) = [
        sum(lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,), ("x = 1\n",))))
    ]
    expected = -nats / np.log(2) / len(TEXT + "x = 1\n")
    assert run(lm, path)["metrics"]["bits_per_byte"] == {
        "value": pytest.approx(expected, rel=1e-5),
        "stderr": None,
    }


def test_the_shipped_task_is_what_it_says(lm):
    pairs = [
        json.loads(line)
        for line in pathlib.Path("data/tasks/python_syntax.jsonl").read_text().splitlines()
    ]
    out = run(lm, "data/tasks/python_syntax.yaml")
    scores = {
        kind: lm.loglikelihood(requests("loglikelihood", *(("", pair[kind]) for pair in pairs)))
        for kind in ("valid", "invalid")
    }
    better = [valid > invalid for (valid, _), (invalid, _) in zip(*scores.values(), strict=True)]
    assert out["metrics"]["acc"]["value"] == pytest.approx(np.mean(better)) and out["count"] == len(
        pairs
    )
    assert len(pairs) >= 50 and len({pair["valid"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert len(pair["valid"]) == len(pair["invalid"])
        compile(pair["valid"], "valid", "exec")
        with pytest.raises(SyntaxError):
            compile(pair["invalid"], "invalid", "exec")


def test_a_group_counts_the_documents_of_its_tasks(lm, tmp_path):
    parts = [
        {"task": name, "dataset_path": "json",
         "dataset_kwargs": {"data_files": {"test": "data/tasks/python_syntax.jsonl"}},
         "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "",
         "doc_to_choice": f"{{{{[{first}, {second}]}}}}",
         "doc_to_target": 0, "metric_list": [mean_metric("acc")]}
        for name, first, second in (("right", "valid", "invalid"), ("wrong", "invalid", "valid"))
    ]  # fmt: skip
    means = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (tmp_path / "both.yaml").write_text(
        json.dumps({"group": "both", "task": parts, "aggregate_metric_list": means})
    )
    (loaded,) = harness.load_tasks(["both"], tmp_path).values()
    out = harness.run_tasks(lm, loaded, 6)
    assert out["both"]["metrics"]["acc"]["value"] == 0.5 and out["both"]["count"] == 12
    assert sorted(entry["count"] for entry in out.values()) == [6, 6, 12]


def test_a_file_that_is_no_task_is_named(tmp_path):
    for text in ("task: [a\n b: {", "task: [1, 2]"):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(
            ValueError, match=r"tasks: '.*broken.yaml' does not describe a task of lm-eval"
        ):
            harness.load_tasks([str(tmp_path / "broken.yaml")], pathlib.Path("data/tasks"))


def test_an_unknown_task_gets_the_nearest_names(monkeypatch):
    # lm-eval's own list takes seconds to read.
    monkeypatch.setattr(
        harness,
        "TaskManager",
        lambda include_path, **_: TaskManager(include_path=include_path, include_defaults=False),
    )
    with pytest.raises(
        ValueError,
        match=r"tasks: 'python_sintax' is neither one of held_out nor .*; nearest: python_syntax",
    ):
        harness.load_tasks(["python_sintax"], pathlib.Path("data/tasks"), ("held_out",))
    with pytest.raises(ValueError, match=r"there is no file 'nowhere/task.yaml'"):
        harness.load_tasks(["nowhere/task.yaml"], pathlib.Path("data/tasks"))
