"""Self-distillation on a toy: what is kept is right and can be learnt, the loop goes round, the
same command gives the same file.
"""

import dataclasses
import subprocess
import sys

import chatting
import numpy as np
import pytest
import toy

from data import chat_output, chat_template
from data.tokenizer import Tokenizer
from experiments import calculator_start
from glm_jax.envs import calculator
from glm_jax.envs.episode import SamplingSpec
from glm_jax.envs.scripted import play
from glm_jax.evaluation import run_worker
from glm_jax.rollouts.rollout import Group, Rollout, RolloutStatus
from glm_jax.rollouts.task import Reward, Task
from glm_jax.sft import distillation, rejection
from glm_jax.sft.conversations import ConversationConfig, encode_all, read_conversations
from glm_jax.sft.rejection import RejectionConfig

SPEC = SamplingSpec(group_size=4, max_new_tokens=24, temperature=1.0, seed=0, thinking=True)
FILTERS = RejectionConfig(
    min_tokens=1, min_reward=1.0, min_preference=0.0, drop_shortest=0.25, hard_pass_rate=0.5,
    hard_responses=4, easy_responses=1
)  # fmt: skip
ROLLOUTS = chatting.NUM_TASKS * SPEC.group_size
NUM_ROWS = 16


@pytest.fixture(scope="module")
def expert(corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert")
    chatting.fine_tune(
        folder / "run",
        [chatting.write_guesses(folder / "guesses.jsonl")],
        corpus_folder,
        start="",
        steps=80,
    )
    return folder / "run"


@pytest.fixture
def tasks(tmp_path):
    return toy.write_tasks(tmp_path / "tasks.jsonl", 0, chatting.NUM_TASKS)


def distill(run, tasks, output, spec=SPEC, config=FILTERS):
    return distillation.distill(str(run), [tasks], output, spec, NUM_ROWS, config, progress=False)


def right(run, tasks):
    """Share of the rollouts."""
    opened, rollout_worker = run_worker.open_worker(str(run), [tasks], SPEC, NUM_ROWS)
    rollouts = [r for g in rollout_worker.rollouts(opened, SPEC, first=1000) for r in g.rollouts]
    return sum(r.reward.value for r in rollouts) / len(rollouts)


def test_what_is_kept_is_right_and_fine_tuning_on_it_goes_round(
    expert, tasks, corpus_folder, tmp_path
):
    # two experts of one unified stage
    files = [tmp_path / "new" / "folder" / f"{seed}.jsonl" for seed in (1, 2)]
    for seed, file in enumerate(files, 1):
        counts = distill(expert, tasks, file, dataclasses.replace(SPEC, seed=seed))
        assert (
            counts.total() == ROLLOUTS
            and counts["correctness/wrong"] > 0
            and counts["form/truncated"] > 0
        )
        assert counts["kept"] == len(list(read_conversations(file))) > 0
        assert list(file.parent.glob(".*")) == []

    tokenizer = Tokenizer.load(corpus_folder)
    config = ConversationConfig(
        paths=tuple(map(str, files)), tokenizer=str(corpus_folder), thinking_share=0.0,
        held_out_fraction=0.0, batch_size=1,
        sequence_length=64, num_packing_bins=1, virtual_shards=1, seed=0, epochs=1,
    )  # fmt: skip
    kept = [entry for file in files for _, entry in read_conversations(file)]
    for entry, features in zip(kept, encode_all(config, tokenizer).train, strict=True):
        assert entry["thinking"] and entry["messages"][-1]["content"] == "\\boxed{A}"
        learnt = features["targets"][features["loss_weights"] > 0]
        assert chat_output.parse_tokens(tokenizer, learnt.tolist()) == entry["messages"][-1]

    chatting.fine_tune(
        tmp_path / "unified", config.paths, corpus_folder, start=str(expert), steps=30
    )
    before, after = right(expert, tasks), right(tmp_path / "unified", tasks)
    assert before < 0.6 and after > before + 0.2
    assert distill(tmp_path / "unified", tasks, tmp_path / "again.jsonl")["kept"] > 0


def played(tokenizer, task, agent, status=RolloutStatus.COMPLETED):
    """The rollout of an agent's episode with the calculator."""
    episode = play(calculator.Calculator(), task, agent)
    tokens, mask = chat_template.encode_for_training(
        tokenizer, episode.messages, episode.tools, thinking=False
    )
    along = {"logprobs": np.zeros(len(tokens)), "versions": np.zeros(len(tokens))}
    reward = Reward(episode.reward, {})
    return Rollout(task=task, tokens=tokens, mask=mask, **along, status=status, reward=reward)


def test_an_episode_of_several_turns_becomes_a_conversation(corpus_folder, tmp_path):
    """Tools, calls and the calculator's answers, of those that are right."""
    tokenizer, pool = Tokenizer.load(corpus_folder), calculator_start.tasks("train")[:3]
    guess = lambda messages: {"role": "assistant", "content": "who knows"}
    groups = [
        Group(
            task,
            [
                played(tokenizer, task, calculator.expert),
                played(tokenizer, task, guess),
                played(tokenizer, task, calculator.expert, RolloutStatus.MAX_TURNS),
                played(tokenizer, task, calculator.expert, RolloutStatus.TIMEOUT),
            ],
        )
        for task in pool
    ]
    config = dataclasses.replace(FILTERS, drop_shortest=0.0)
    samples = list(distillation.samples(groups, tokenizer, thinking=False))
    kept, counts = rejection.select(samples, config)
    assert counts == {
        "kept": 3, "correctness/wrong": 3, "form/max_turns": 3, "form/timeout": 3,
    }  # fmt: skip
    for task, entry in zip(pool, kept, strict=True):
        expected = play(calculator.Calculator(), task, calculator.expert)
        assert entry["tools"] == list(expected.tools) and not entry["thinking"]
        roles = [m["role"] for m in entry["messages"]]
        assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
        again = chat_template.encode_for_training(
            tokenizer, entry["messages"], entry["tools"], thinking=False
        )
        once = chat_template.encode_for_training(
            tokenizer, expected.messages, expected.tools, thinking=False
        )
        assert again == once


def test_the_command_gives_what_the_seed_says_in_every_process(expert, tasks, tmp_path):
    flags = {"seed": 3, "workdir": expert, "tasks": tasks, "output": tmp_path / "there.jsonl",
             "samples": 4, "max_new_tokens": 24,
             "num_rows": NUM_ROWS, "drop_shortest": 0.25}  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "experiments.distill",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    here = {seed: tmp_path / f"{seed}.jsonl" for seed in (3, 4)}
    counts = {
        seed: distill(expert, tasks, file, dataclasses.replace(SPEC, seed=seed))
        for seed, file in here.items()
    }
    assert here[3].read_text() == (tmp_path / "there.jsonl").read_text() != here[4].read_text()
    assert (
        done.stdout == f"{distillation.table(counts[3])}\n{counts[3]['kept']} conversations in"
        f" {tmp_path / 'there.jsonl'}\n"
    )
    assert done.stdout.split()[:4] == ["rollouts", str(ROLLOUTS), "100.0%", "kept"]


REFUSED = {
    "unknown generator": ("puzzle:nothing:3", {}, {}, "'nothing'"),
    "no file": ("nowhere.jsonl", {}, {}, "no task file at 'nowhere.jsonl'"),
    "too long": (
        None,
        {"max_new_tokens": 60},
        {},
        r"task '10': its prompt of \d+ tokens and max_new_tokens=60 exceed .*max_length=64",
    ),
    "greedy": (None, {"temperature": 0.0}, {}, "temperature=0.0 must be above 0"),
    "nothing kept": (
        None,
        {},
        {"min_tokens": 25},
        "no rollout of .*run was kept, '.*o.jsonl' is not written; of 48: .*form/too_short",
    ),
}


@pytest.mark.parametrize(("source", "draw", "filters", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_named_and_leave_no_file(
    source, draw, filters, message, expert, tasks, tmp_path
):
    draw, filters = dataclasses.replace(SPEC, **draw), dataclasses.replace(FILTERS, **filters)
    with pytest.raises(ValueError, match=message):
        distill(expert, source or tasks, tmp_path / "o.jsonl", draw, filters)
    assert [p.name for p in tmp_path.iterdir()] == ["tasks.jsonl"]


def test_a_folder_and_a_run_that_is_not_there_are_refused(expert, tasks, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        distill(expert, tasks, tmp_path)
    with pytest.raises(ValueError, match="nowhere' is neither a run's"):
        distill("nowhere", tasks, tmp_path / "o.jsonl")


def test_calls_and_failures_of_the_judge_are_samples_as_well(corpus_folder):
    tokenizer = Tokenizer.load(corpus_folder)
    weather = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
    }
    task = Task("t", "g", "choice", ({"role": "user", "content": "rain?"},), {}, tools=(weather,))
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "5"}'}}
    turn = {"role": "assistant", "reasoning_content": "look", "content": "", "tool_calls": [call]}
    given = chat_template.encode(tokenizer, task.messages, task.tools)
    whole, _ = chat_template.encode_for_training(
        tokenizer, [*task.messages, turn], task.tools, thinking=True
    )
    count = len(whole) - len(given)
    mask = [False] * len(given) + [True] * count
    logprobs = [0.0] * len(whole)
    versions = [0] * len(whole)
    statuses = (
        RolloutStatus.COMPLETED,
        RolloutStatus.ENVIRONMENT_ERROR,
        RolloutStatus.FORMAT_ERROR,
    )
    rollouts = [
        Rollout(task, whole, mask, logprobs, versions, status, Reward(1.0, {}))
        for status in statuses
    ]
    first, *others = distillation.samples([Group(task, rollouts)], tokenizer, thinking=True)
    assert first.response == (turn,) and first.num_tokens == count and first.tools == task.tools
    assert [s.response for s in others] == [(), ()]
    kept, counts = rejection.apply_filters([first, *others], FILTERS)
    assert not kept
    assert counts == {"tools/not_terminal": 1, "form/environment_error": 1, "form/format_error": 1}
