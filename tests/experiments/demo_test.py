"""The demo: its cold start shows work that is right, fits the lengths of its reinforcement
learning, and the report counts rightly.
"""

import json
import pathlib
import re
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from configs import rl_calculator_tiny, rl_math_tiny, sft_calculator_tiny
from data import chat_template
from data.tokenizer import train_tokenizer
from experiments import calculator_start, cold_start, reasoning_report
from glm_jax.rewards import puzzles
from glm_jax.sft.conversations import read_conversations


@pytest.mark.parametrize("generator", cold_start.WORKED)
def test_work_is_right_and_guesses_are_guesses(generator):
    found = cold_start.conversations(generator, 400, 0.5, 0, np.random.default_rng(0))
    assert len(found) == 400
    guesses = []
    for asked, answer in (c["messages"] for c in found):
        question = asked["content"].partition("\n\n")[0]
        assert puzzles.split_of(question) == "train"
        terms = re.search(r": ([-+ \d]+) =", question)
        right = (
            eval(terms[1])
            if terms
            else 1 + int(re.search(r"(\d+) (sisters|female friends)", question)[1])
        )
        if "reasoning_content" not in answer:
            guesses.append(answer["content"] == f"\\boxed{{{right}}}")
            continue
        assert answer["content"] == f"\\boxed{{{right}}}"
        lines = [line.rpartition(": ")[2] for line in answer["reasoning_content"].splitlines()]
        for before, line in zip([None, *lines], lines, strict=False):
            left, _, result = line.rpartition(" = ")
            assert eval(left) == int(result) and (
                before is None or left.startswith(before.rpartition(" = ")[2] + " ")
            )
        assert lines[-1].endswith(f" = {right}")
    assert 160 < len(guesses) < 240  # half of them
    # by chance: one in nine of aiw's answers, fewer of chain_sum's
    assert 0 < np.mean(guesses) < 0.2


def test_a_generator_whose_work_is_not_known_is_refused():
    with pytest.raises(ValueError, match="generators: 'gcd' is not one of chain_sum, aiw"):
        cold_start.conversations("gcd", 10, 0.5, 0, np.random.default_rng(0))


@pytest.fixture(scope="module")
def tokenizer():
    """As the demo's: 4,096 tokens, of the standard library's text."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    return train_tokenizer(
        [file.read_text("utf-8") for file in sorted(folder.glob("[a-d]*.py"))], 4096
    )


def test_the_cold_start_fits_the_demos_reinforcement_learning(tokenizer, tmp_path):
    file = tmp_path / "cold_start.jsonl"
    subprocess.run([sys.executable, "-m", "experiments.cold_start", f"--output={file}"], check=True)
    found = [entry for _, entry in read_conversations(file)]
    config = rl_math_tiny.get_config()
    longest = max(tokens for _, tokens in config.control.length_stages)
    generators = {source.split(":")[1] for source in (*config.tasks.train, *config.tasks.held_out)}
    assert generators == set(cold_start.GENERATORS.default)
    for conversation in found:
        prompt = chat_template.encode(tokenizer, conversation["messages"][:1], thinking=True)
        whole, _ = chat_template.encode_for_training(
            tokenizer, conversation["messages"], thinking=True
        )
        assert len(whole) - len(prompt) < longest and len(prompt) + longest <= config.engine.context


def test_the_calculators_episodes_fit_their_configs(tokenizer):
    sft, rl = sft_calculator_tiny.get_config(), rl_calculator_tiny.get_config()
    worked = calculator_start.conversations(100, 1.0, np.random.default_rng(0))
    encoded = [
        chat_template.encode_for_training(tokenizer, c["messages"], c["tools"], thinking=False)
        for c in worked
    ]
    longest = max(len(ids) for ids, _ in encoded)
    assert longest <= sft.data.sequence_length and longest <= rl.engine.context
    assert rl.engine.num_pages * rl.engine.page_size >= rl.engine.num_rows * longest
    [(_, most)] = rl.control.length_stages
    assert max(sum(trained) for _, trained in encoded) <= most


# --- the report ---


def answer(task, output, reward):
    return {
        "task": task,
        "prompt": f"Q{task}",
        "output": output,
        "reward": reward,
        "length": len(output),
    }


@pytest.fixture
def workdir(tmp_path):
    """Of a run of two steps: two guesses and a worked answer before, three worked ones after."""
    guess, work = "<think></think>\n\\boxed{3}", "<think>2 + 1 = 3</think>\n\\boxed{3}"
    answers = {
        0: [answer(0, guess, 1.0), answer(1, guess, 0.0), answer(2, work, 0.0)],
        2: [answer(0, work, 1.0), answer(1, work, 1.0), answer(2, work, 0.0)],
    }
    (tmp_path / "held_out").mkdir()
    for steps, lines in answers.items():
        (tmp_path / "held_out" / f"{steps:07d}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    records = [
        {"step": 0, "reward": 0.3, "held_out": 1 / 3},
        {"step": 1, "reward": 0.5, "held_out_after": 2 / 3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def test_the_report_counts_reasoning(workdir, capsys, monkeypatch):
    monkeypatch.setattr(reasoning_report, "MIN_ANSWERS", 1)
    before, after = reasoning_report.evaluations(workdir)
    assert (before.steps, after.steps) == (0, 2)
    assert before.solved == pytest.approx(1 / 3) and after.solved == pytest.approx(2 / 3)
    assert before.reasoned == pytest.approx(1 / 3) and after.reasoned == 1
    assert before.solved_where(reasoned=False) == 0.5 and before.solved_where(reasoned=True) == 0
    assert after.solved_where(reasoned=False) is None
    reasoning_report.report_rl(workdir)
    printed = capsys.readouterr().out
    assert "Q1\n\nAfter 0 steps of reinforcement learning (wrong):\n<think></think>" in printed
    assert "After 2 steps of reinforcement learning (right):\n<think>2 + 1 = 3</think>" in printed
    assert (
        "33.3% solved; 33.3% of the answers show their work" in printed
        and "66.7% solved; 100.0% of" in printed
    )
    assert (workdir / "rl.png").stat().st_size > 10_000


def test_an_unfinished_run_is_not_reported(workdir):
    metrics = workdir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="holds no finished run"):
        reasoning_report.report_rl(workdir)


# --- the curves of several runs ---


def test_curves_of_runs_are_drawn_and_tabled(workdir, tmp_path):
    for file in (workdir / "held_out").glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        turns = [{"turns": 1.0}, {"turns": 3.0}, {}]  # the last one was cut off
        file.write_text(
            "".join(
                json.dumps(line | {"parts": parts}) + "\n"
                for line, parts in zip(lines, turns, strict=True)
            )
        )
    output = tmp_path / "curves.png"
    draw = lambda workdirs: subprocess.run(
        [sys.executable, "-m", "experiments.rl_curves", f"--workdirs={workdirs}",
         f"--output={output}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    done = draw(workdir)
    assert (
        "| 0 | 0.333 in 2.00 turns |\n| 2 | 0.667 in 2.00 turns |\n| minutes | 0.0 |" in done.stdout
    )
    assert output.stat().st_size > 10_000
    again = draw(f"{workdir},{workdir}")
    assert again.returncode == 1 and "must be folders of unlike names" in again.stderr
