"""experiments.evaluate: held-out numbers against logits of our own, puzzles answered by hand, the
results file, errors in a line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from data.tokenizer import Tokenizer
from experiments import convert
from experiments.measure_sandbox import reference_solutions
from glm_jax import hf
from glm_jax.envs.episode import SamplingSpec
from glm_jax.evaluation import held_out, human_eval, results, run_worker, tasks
from glm_jax.evaluation import puzzles as puzzle_tasks
from glm_jax.evaluation import subject as subjects
from glm_jax.infer.request import Request
from glm_jax.rewards import puzzles
from glm_jax.rewards.code import CodeVerifier
from tests.model.oracle import RUNTIME, random_state, tiny_config
from tests.sandboxes import needs_sandbox

SETTINGS = subjects.Settings(
    max_turns=(1, 3),
    limit=2, context=None, num_rows=1, batch_tokens=256, draft_tokens=0, max_new_tokens=4,
    temperature=0.0, seed=0, num_examples=0,
    chat=False, thinking=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(corpus_folder, tmp_path_factory):
    """A Hugging Face folder with random weights and the tokenizer of the corpus."""
    config = tiny_config(vocab_size=320, max_length=256)
    target = tmp_path_factory.mktemp("export") / "hf"
    return hf.export_checkpoint(
        target,
        config,
        random_state(config),
        dtype="float32",
        tokenizer=corpus_folder / "tokenizer.json",
    )


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    """The same as a work directory that knows no data."""
    path = tmp_path_factory.mktemp("runs") / "run"
    convert.from_hf(folder, path, RUNTIME)
    return path


@pytest.fixture(scope="module")
def tokenizer(workdir):
    return subjects.read_tokenizer(workdir)


@pytest.fixture(scope="module")
def subject(workdir, tokenizer):
    return subjects.open_subject(workdir, None, tokenizer, SETTINGS)


def test_a_worker_has_room_in_its_cache_for_every_row(workdir, tmp_path):
    asked = toy.write_tasks(tmp_path / "tasks.jsonl", 0, 1)
    spec = SamplingSpec(
        group_size=2, max_new_tokens=100, temperature=1.0, seed=0, thinking=True
    )  # fmt: skip
    _, worker = run_worker.open_worker(str(workdir), [asked], spec, num_rows=5)
    config = worker.engine.config
    assert config.num_rows == 5 and config.context > 100
    assert config.num_pages * config.page_size >= 5 * config.context


def changed(subject, **changes) -> subjects.Subject:
    return dataclasses.replace(subject, settings=dataclasses.replace(SETTINGS, **changes))


# --- held-out text ---


def nats(logits_BLV, targets_BL, weights_BL) -> float:
    logits = np.asarray(logits_BLV, np.float64)
    top = logits.max(-1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -float(
        (
            np.take_along_axis(logprobs, np.asarray(targets_BL)[..., None], -1)[..., 0] * weights_BL
        ).sum()
    )


def test_held_out_numbers_are_those_of_the_logits(subject, corpus_folder):
    batches = held_out.held_out_batches(
        subject.path,
        [str(corpus_folder)],
        subject.tokenizer,
        dataclasses.replace(SETTINGS, context=50),
    )
    metrics = held_out.run_held_out(batches, subject)["held_out"]["metrics"]
    model, sums = subject.model, np.zeros(6)
    both = jax.jit(lambda tokens, **rows: (model(tokens, **rows), model.mtp_logits(tokens, **rows)))
    for batch in batches:
        logits, second = both(
            batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
        )
        weights = batch["loss_weights"]
        # The second head's target at i is the first head's at i + 1, where that is still the same
        # document.
        second_weights = weights[:, 1:] * (
            batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
        )
        sums += [
            nats(logits, batch["targets"], weights), weights.sum(), batch["target_bytes"].sum(),
            nats(second, batch["targets"][:, 1:], second_weights), second_weights.sum(),
            batch["target_bytes"][:, 1:][second_weights > 0].sum(),
        ]  # fmt: skip
    values = {name: pair["value"] for name, pair in metrics.items()}
    assert values["loss"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(sums[0] / sums[1]), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(sums[0] / math.log(2) / sums[2], rel=1e-5)
    assert values["mtp_loss"] == pytest.approx(sums[3] / sums[4], rel=1e-5)
    assert values["mtp_bits_per_byte"] == pytest.approx(sums[3] / math.log(2) / sums[5], rel=1e-5)


def test_held_out_text_of_a_run_is_its_own(corpus_folder, toy_config, tokenizer, tmp_path):
    (tmp_path / "config.json").write_text(toy_config.to_json())
    batches = held_out.held_out_batches(tmp_path, [], tokenizer, SETTINGS)
    assert len(batches) == 2 and next(iter(batches))["tokens"].shape == (8, 64)


def test_data_of_another_tokenizer_is_refused(workdir, corpus_folder, tokenizer):
    other = Tokenizer.load(workdir / "tokenizer.json")
    other.to_json = lambda: "{}"
    with pytest.raises(ValueError, match="was made with another tokenizer than that of"):
        held_out.held_out_batches(workdir, [str(corpus_folder)], other, SETTINGS)
    with pytest.raises(
        ValueError, match=r"does not say what data it was trained on; give --data=DIR"
    ):
        held_out.held_out_batches(workdir, [], tokenizer, SETTINGS)


# --- puzzles ---


def chosen() -> dict[str, list[puzzles.Puzzle]]:
    return {
        generator: puzzles.distinct(generator, "held_out", 3) for generator in ("gcd", "products")
    }


def test_puzzles_are_scored_by_what_the_model_wrote(subject, monkeypatch):
    asked = [puzzle for some in chosen().values() for puzzle in some]
    written = [
        f" {asked[0].answer}\n",
        " 1000000\n",
        "\n",
        f" {asked[3].answer} is it",
        " -7\n",
        "",
    ]

    def answer(engine, prompts, params, label):
        assert [subject.tokenizer.decode(p) for p in prompts] == [
            f"[gMASK]<sop>Question: {puzzle.question}\nAnswer:" for puzzle in asked
        ]
        return [
            Request(i, p, params[i], tokens=subject.tokenizer.encode(text))
            for i, (p, text) in enumerate(zip(prompts, written, strict=True))
        ]

    monkeypatch.setattr(puzzle_tasks, "continue_all", answer)
    found = puzzle_tasks.run_puzzles("arithmetic", chosen(), changed(subject, context=200))
    whole = {name: pair["value"] for name, pair in found["arithmetic"]["metrics"].items()}
    scores = [
        puzzles.score(puzzle, puzzles.completion_answer(text))
        for puzzle, text in zip(asked, written, strict=True)
    ]
    assert scores[0] == 1 and scores[2] == scores[5] == 0
    assert whole["score"] == pytest.approx(np.mean(scores))
    assert found["arithmetic"]["metrics"]["score"]["stderr"] == pytest.approx(
        np.std(scores, ddof=1) / math.sqrt(6)
    )
    assert whole["solved"] == pytest.approx(sum(s == 1 for s in scores) / 6)
    assert whole["not_extracted"] == pytest.approx(2 / 6) and whole["did_not_fit"] == 0
    assert whole["tokens_per_answer"] == pytest.approx(
        np.mean([len(subject.tokenizer.encode(text)) for text in written])
    )
    assert found["arithmetic/gcd"]["metrics"]["score"]["value"] == pytest.approx(
        np.mean(scores[:3])
    )
    assert found["arithmetic/products"]["count"] == 3


def test_the_engine_is_as_large_as_the_settings_say(subject):
    drafting = changed(subject, context=40, draft_tokens=2, num_rows=3).engine.config
    assert (drafting.context, drafting.draft_tokens, drafting.num_rows) == (40, 2, 3)
    assert drafting.num_pages * drafting.page_size >= 3 * 42
    assert changed(subject, context=None).engine.config.context == subject.model.config.max_length


def test_what_does_not_fit_is_not_asked_and_scores_nothing(subject, monkeypatch):
    asked = [puzzle for some in chosen().values() for puzzle in some]
    lengths = [len(puzzle_tasks.completion_prompt(puzzle, subject)) for puzzle in asked]
    right = [
        puzzle.answer
        for puzzle, length in zip(asked, lengths, strict=True)
        if length < max(lengths)
    ]

    def answer(engine, prompts, params, label):
        return [
            Request(0, prompt, param, tokens=subject.tokenizer.encode(text))
            for prompt, param, text in zip(prompts, params, right, strict=True)
        ]

    monkeypatch.setattr(puzzle_tasks, "continue_all", answer)
    cut = changed(subject, context=max(lengths) + SETTINGS.max_new_tokens - 1)
    metrics = puzzle_tasks.run_puzzles("arithmetic", chosen(), cut)["arithmetic"]["metrics"]
    assert 0 < len(right) < len(asked)
    assert metrics["did_not_fit"]["value"] == pytest.approx(1 - len(right) / len(asked))
    assert (
        metrics["solved"]["value"] == pytest.approx(len(right) / len(asked))
        and metrics["not_extracted"]["value"] == 0
    )
    right.clear()
    none = puzzle_tasks.run_puzzles("arithmetic", chosen(), changed(subject, context=8))[
        "arithmetic"
    ]["metrics"]
    assert (
        none["did_not_fit"]["value"] == 1
        and none["score"]["value"] == 0
        and "tokens_per_answer" not in none
    )


def test_examples_come_from_training_puzzles(subject):
    puzzle = puzzles.distinct("gcd", "held_out", 1)[0]
    text = subject.tokenizer.decode(
        puzzle_tasks.completion_prompt(puzzle, changed(subject, num_examples=3))
    )
    train = list(itertools.islice(puzzles.puzzles("gcd", "train"), 3))
    solved = [f"Question: {example.question}\nAnswer: {example.answer}" for example in train]
    assert text == "[gMASK]<sop>" + "\n\n".join([*solved, f"Question: {puzzle.question}\nAnswer:"])


def test_chat_is_judged_as_reinforcement_learning_judges(subject, monkeypatch):
    """The whole of RL's path: the parser refuses a second `</think>`, a cut answer is wrong."""
    asking = changed(subject, chat=True, thinking=False, context=200)
    asked = [puzzle for some in chosen().values() for puzzle in some][:5]
    box = rf"\boxed{{{asked[0].answer}}}"
    stop = subject.tokenizer.special("<|user|>")
    encode = subject.tokenizer.encode
    written = [
        ([*encode(f"So {box}"), stop], "stop"),
        ([*encode(f"So {box}"), subject.tokenizer.special("</think>"), stop], "stop"),
        (encode(f"So {box}"), "length"),
        ([*encode("no box"), stop], "stop"),
    ]
    prompts = []

    def submit(engine, prompt, params):
        request = Request(len(prompts), prompt, params)
        prompts.append(request)
        return request

    def step(engine):
        for request, (tokens, reason) in zip(prompts, written, strict=True):
            request.tokens, request.finish_reason = tokens, reason
            request.status = "finished"
            request.logprobs, request.versions = [0.0] * len(tokens), [0] * len(tokens)
        return prompts

    engine = type(subject.engine)
    monkeypatch.setattr(engine, "submit", submit)
    monkeypatch.setattr(engine, "step", step)
    monkeypatch.setattr(engine, "idle", property(lambda engine: False))
    found = puzzle_tasks.run_puzzles("arithmetic", {"gcd": [asked[0]] * 4}, asking)["arithmetic"]
    text = subject.tokenizer.decode(prompts[0].prompt)
    assert text.startswith(f"[gMASK]<sop><|user|>\n{asked[0].question}")
    assert text.endswith("<think></think>")
    assert set(prompts[0].params.stop_tokens) == {
        subject.tokenizer.special(n) for n in ("<|endoftext|>", "<|user|>", "<|observation|>")
    }
    values = {name: pair["value"] for name, pair in found["metrics"].items()}
    assert values["solved"] == 1 / 4 and values["not_extracted"] == 3 / 4


# --- code ---


@needs_sandbox
def test_human_eval_runs_what_the_model_wrote(subject, monkeypatch):
    """A right continuation that runs on into something else, a wrong one, and a prompt that leaves
    no room for an answer.
    """
    problems = sorted(human_eval.human_eval_tasks(), key=lambda task: len(task.answer["prompt"]))
    tasks, solutions = [*problems[:2], problems[-1]], reference_solutions()
    written = [
        solutions[tasks[0].id] + "\ndef other():\n    1 / 0\n\nother()\n",
        "    return None\n",
    ]

    def answer(engine, prompts, params, label):
        assert [subject.tokenizer.decode(p) for p in prompts] == [
            f"[gMASK]<sop>{task.answer['prompt']}" for task in tasks[:2]
        ]
        return [
            Request(0, p, q, tokens=subject.tokenizer.encode(t))
            for p, q, t in zip(prompts, params, written, strict=True)
        ]

    monkeypatch.setattr(human_eval, "continue_all", answer)
    found = human_eval.run_human_eval(tasks, CodeVerifier(workers=2), subject)["human_eval"]
    assert found["count"] == 3 and found["metrics"]["pass@1"]["value"] == pytest.approx(1 / 3)
    assert (
        found["metrics"]["did_not_fit"]["value"] == pytest.approx(1 / 3)
        and found["metrics"]["environment_error"]["value"] == 0
    )


# --- names, results ---


def test_unknown_names_are_found_out_before_weights_are_read(workdir, tokenizer, monkeypatch):
    prepare = lambda *names: tasks.prepare(names, workdir, [], tokenizer, SETTINGS)
    assert list(prepare("logic", "arithmetic")) == ["logic", "arithmetic"]
    with pytest.raises(
        ValueError, match="tasks: none given; valid are held_out, arithmetic, logic"
    ):
        prepare()
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"hellaswag not among held_out, .*: pip install -r requirements-dev.txt"
    ):
        prepare("logic", "hellaswag")


def test_results_keep_what_was_measured_before(subject, workdir, tmp_path):
    output, known = results.find_output(workdir, None, None)
    assert output == workdir / "evaluation" / "0.json" and known == {}
    measure = lambda value: {
        "a": lambda _: {"a": subjects.result({"x": (value, 0.5), "y": 1}, 3, "things")}
    }
    tasks.run(measure(1.0), subject, output, {})
    first = json.loads(output.read_text())
    assert first["model"]["step"] == 0 and first["model"]["config"]["vocab_size"] == 320
    assert first["model"]["parameters"] == hf.parameter_count(subject.model.config)["total"]
    assert first["results"]["a"]["metrics"] == {
        "x": {"value": 1.0, "stderr": 0.5},
        "y": {"value": 1.0, "stderr": None},
    }
    settings = json.loads(json.dumps(dataclasses.asdict(SETTINGS)))
    assert first["results"]["a"]["settings"] == settings
    assert first["results"]["a"]["seconds"] >= 0
    tasks.run(
        {"b": lambda _: {"b": subjects.result({"z": 2}, 1, "thing")}},
        subject,
        *results.find_output(workdir, None, None),
    )
    assert json.loads(output.read_text())["results"].keys() == {"a", "b"}
    assert [f.name for f in output.parent.iterdir()] == ["0.json"]
    assert results.find_output(workdir, None, str(tmp_path / "new.json")) == (
        tmp_path / "new.json",
        {},
    )
    output.write_text("{}")
    with pytest.raises(ValueError, match="holds no results of an evaluation"):
        results.find_output(workdir, None, None)
    output.unlink()


def test_a_hugging_face_folder_is_measured_as_well(folder, subject, tokenizer):
    with pytest.raises(ValueError, match="give --output=FILE"):
        results.find_output(folder, None, None)
    with pytest.raises(ValueError, match="step=3: .* is a Hugging Face folder"):
        subjects.open_subject(folder, 3, tokenizer, SETTINGS)
    other = subjects.open_subject(folder, None, tokenizer, SETTINGS)
    tokens = jnp.asarray([[1, 2, 3]])
    np.testing.assert_array_equal(other.model(tokens), subject.model(tokens))
    assert other.identity["step"] is None
    with pytest.raises(ValueError, match=r"engine.context=9999 exceeds the model's max_length=256"):
        tasks.run({"logic": lambda _: {}}, changed(subject, context=9999), folder / "never", {})


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "experiments.evaluate", *arguments]
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=300)


def test_the_command_prints_a_table_and_writes_the_file(workdir, corpus_folder, tmp_path):
    output = tmp_path / "results" / "file.json"
    flags = [
        "--limit=1",
        "--max_new_tokens=2",
        "--num_rows=1",
        "--examples=0",
        f"--data={corpus_folder}",
        f"--output={output}",
    ]
    done = command(f"--workdir={workdir}", "--tasks=held_out,arithmetic", *flags)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    assert {"held_out", "arithmetic", "arithmetic/gcd"} <= results.keys()
    rows = {
        tuple(line.split()[:2]): line.split()[2]
        for line in done.stdout.splitlines()
        if line.startswith(("held_out", "arithmetic"))
    }
    assert float(rows["held_out", "loss"]) == pytest.approx(
        results["held_out"]["metrics"]["loss"]["value"], abs=1e-4
    )
    assert (
        ("arithmetic", "solved") in rows
        and ("arithmetic/gcd", "score") in rows
        and ("arithmetic/gcd", "solved") not in rows
    )
    assert 1 <= results["arithmetic"]["metrics"]["tokens_per_answer"]["value"] <= 2
    assert (
        results["arithmetic"]["metrics"]["did_not_fit"]["value"] == 0
        and results["arithmetic"]["count"] == 8
    )
    assert str(output) in done.stdout


def test_a_wrong_name_is_one_line_and_exit_code_1(workdir):
    done = command(f"--workdir={workdir}", "--tasks=held_out,nowhere.yaml")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert lines[0] == "error: tasks: there is no file 'nowhere.yaml'"
    assert not any((workdir / "evaluation").glob("*"))
