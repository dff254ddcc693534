"""Evaluation and reinforcement learning give one verdict on 1,000 outputs: right, wrong, hedged,
malformed, cut short and cancelled ones.
"""

import itertools
import pathlib
import types

import numpy as np
import pytest

from data.tokenizer import train_tokenizer
from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.worker import RolloutWorker
from glm_jax.evaluation import chat
from glm_jax.evaluation import puzzles as puzzle_tasks
from glm_jax.evaluation.subject import Settings, Subject
from glm_jax.rewards import puzzles
from tests.rl.scripted import ScriptedEngine

SETTINGS = Settings(
    max_turns=(1,),
    limit=None, context=None, num_rows=1, batch_tokens=256, draft_tokens=0, max_new_tokens=64,
    temperature=1.0, seed=0, num_examples=0, chat=True, thinking=True,
)  # fmt: skip
# {0}: the right answer, {1}: another one.
FORMS = (
    "<think>so</think>\\boxed{{{0}}}", "<think>so</think>\\boxed{{{1}}}",
    "<think></think>It is $\\boxed{{{0}}}$.", "<think>\\boxed{{{0}}}</think>{0}",
    "<think>a</think>\\boxed{{{1}}} no, \\boxed{{{0}}}",
    "<think>a</think>\\boxed{{{0}}} no, \\boxed{{{1}}}",
    "<think>a</think>\\boxed{{{0} or {1}}}", "<think>a</think>\\boxed{{{0}", "\\boxed{{{0}}}",
    "<think>a</think>\\boxed{{\\text{{{0}}}}}", "</think>\\boxed{{{0}}}",
    "<think>a</think>\\boxed{{{0}}}<think>", "<think>a</think>\\boxed{{{0}}}</think>",
    "<think>a<think>b</think>\\boxed{{{0}}}", "<think>\\boxed{{{0}}}", "",
    "<think>a</think><tool_call>f\n</tool_call>", "<think>a</think>\\boxed{{}}",
    "<think>a</think>\\boxed{{**{0}**}}", "<think>a</think>{0}",
)  # fmt: skip
ENDS = (("<|user|>", "stop"), ("<|endoftext|>", "stop"), ("<|observation|>", "stop"),
        ("", "length"), ("<|user|>", "abort"))  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["so it is \\boxed{12} or 7\n"] * 20, 300)


def test_both_give_one_verdict_on_a_thousand_outputs(tokenizer):
    asked = puzzles.distinct("gcd", "held_out", 10)
    cases = list(itertools.product(asked, FORMS, ENDS))
    outputs = [
        (form.format(puzzle.answer, int(puzzle.answer) + 1) + stop, reason)
        for puzzle, form, (stop, reason) in cases
    ]
    assert len(outputs) == 1000

    def engine():
        scripted = ScriptedEngine(tokenizer, outputs)
        scripted.config = types.SimpleNamespace(context=10**6)
        return scripted

    subject = Subject(pathlib.Path("."), None, None, tokenizer, SETTINGS)
    subject.__dict__["engine"] = engine()
    tasks = [puzzles.task_of(puzzle) for puzzle, *_ in cases]
    evaluated = [puzzle_tasks.chat_record(r) for r in chat.rollouts(tasks, subject, "gcd")]

    spec = SamplingSpec(1, 64, 1.0, 0, True)
    groups = RolloutWorker(engine(), tokenizer).rollouts(tasks, spec, 0)
    trained = [group.rollouts[0] for group in groups]
    assert [r["solved"] for r in evaluated] == [r.reward.value for r in trained]
    statuses = {r.status.value for r in trained}
    assert statuses == {"completed", "truncated", "format_error", "aborted"}
    unreadable = [r for r, t in zip(evaluated, trained, strict=True) if not t.reward.parts]
    assert unreadable and {(r["score"], r["extracted"]) for r in unreadable} == {(0.0, False)}
    # By hand: of the forms that are readable and right, the three ends by a stop token.
    right = np.reshape([r["solved"] for r in evaluated], (10, len(FORMS), len(ENDS)))
    assert (right[:, 0] == [1, 1, 1, 0, 0]).all() and (right[:, 2] == [1, 1, 1, 0, 0]).all()
    assert (right[:, 4] == [1, 1, 1, 0, 0]).all() and (right[:, 9] == [1, 1, 1, 0, 0]).all()
    for wrong in (1, 3, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 19):
        assert not right[:, wrong].any(), FORMS[wrong]
