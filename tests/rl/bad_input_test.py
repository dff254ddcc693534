"""What reinforcement learning refuses: at start-up, by name, before anything is in the work
directory.
"""

import dataclasses
import json
import math
import pathlib
import re
import shutil

import pytest

from configs import rl_math_tiny
from experiments import entry
from glm_jax import bubblewrap, sandbox
from glm_jax.rl import loop
from glm_jax.rl.config import ControlConfig, GrpoConfig, RlLoopConfig, RolloutConfig, TasksConfig

# A value that each field must refuse; booleans have none.
OUT_OF_RANGE = {
    TasksConfig: ("tasks", {"train": (), "held_out": (), "seed": -1, "wrong_answers": 1.1}),
    RolloutConfig: ("rollout",
                    {"prompts_per_step": 0, "group_size": 1, "over_sampling": 0.9, "max_waves": 0,
                     "workers": -1, "worker_resources": (("CPU", 0),)}),
    GrpoConfig: ("grpo", {
        "learning_rate": -1e-3, "warmup_updates": -1, "clip_low": 1.0, "clip_high": -0.1,
        "aggregation": "mean", "old_logprobs": "none",
        "importance_cap": -1.0, "updates_per_step": 0, "max_staleness": -1, "mtp_weight": -0.1,
        "bias_rate": -0.1, "balance_weight": -0.1,
        "row_length": 0, "rows": 0,
    }),
    ControlConfig: ("control", {
        "curriculum": "hard", "difficulty": "a.jsonl", "pass_few": 0, "pass_many": 7,
        "temperatures": (1.0, 0.0), "temperature_loss": 1.1,
        "plateau_window": 0, "plateau_gain": math.nan, "length_stages": ((1, 6),),
    }),
    RlLoopConfig: ("loop", {
        "seed": -1, "steps": 0, "checkpoint_every": 0, "keep_checkpoints": 0, "eval_every": 0,
        "eval_samples": 0, "eval_temperature": 0.0,
        "save_rollouts_every": -1,
    }),
}  # fmt: skip

# The last value on each side that it takes.
AT_THE_EDGE = {
    TasksConfig: {"seed": 0, "wrong_answers": (0.0, 1.0)},
    RolloutConfig: {"prompts_per_step": 1, "group_size": 2, "over_sampling": 1.0, "max_waves": 1},
    GrpoConfig: {
        "learning_rate": 0.0, "warmup_updates": 0, "clip_low": (0.0, 0.99), "clip_high": 0.0,
        "importance_cap": 0.0, "updates_per_step": 1, "max_staleness": 0, "mtp_weight": 0.0,
        "bias_rate": 0.0, "balance_weight": 0.0, "row_length": 1, "rows": 1,
    },
    ControlConfig: {
        "pass_few": 1, "temperatures": ((0.1,), (2.0, 1)), "temperature_loss": (0.0, 1.0),
        "plateau_window": 1, "plateau_gain": (-0.1, 0.0),
        "length_stages": (((0, 1),), ((0, 6), (1, 8), (9, 7))),
    },
    RlLoopConfig: {
        "seed": 0, "steps": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "eval_every": 1,
        "eval_samples": 1, "eval_temperature": 0.01, "save_rollouts_every": (0, 1),
    },
}  # fmt: skip

PUZZLE = {"verifier": "puzzle", "answer": {"generator": "gcd", "seed": 1}}
CODE = {"verifier": "code", "answer": {"entry_point": "f", "cases": [{"expected": 1}]}}

# What is wrong -> (changes, message). Changes are of config keys, `task` of the second line of the
# file of training tasks; `difficulty` writes that file.
REFUSED = {
    f"{section}.{name} out of range": ({f"{section}.{name}": value}, f"{name}={value!r}")
    for section, values in OUT_OF_RANGE.values()
    for name, value in values.items()
} | {
    "not a number": ({"grpo.learning_rate": math.nan},
                     "learning_rate=nan: must be a finite number"),
    "over-sampling without end": ({"rollout.over_sampling": math.inf},
                                  "over_sampling=inf: must be a finite number"),
    "a temperature as text": ({"control.temperatures": ("1.0",)}, "control.temperatures=('1.0',)"),
    "no temperature": ({"control.temperatures": ()}, "control.temperatures=()"),
    "a stage that is no pair": ({"control.length_stages": (0, 6)},
                                "control.length_stages=(0, 6): must be pairs"),
    "stages out of order": ({"control.length_stages": ((0, 6), (4, 8), (2, 9))}, "steps rising"),
    "a stage of half a token": ({"control.length_stages": ((0, 6.5),)},
                                "control.length_stages=((0, 6.5),)"),
    "engine's ratios with a correction": ({"grpo.old_logprobs": "engine"},
                                          "grpo.importance_cap=2.0: must be 0 with "
                                              "old_logprobs='engine'"),
    "replay of experts that nobody keeps": ({"grpo.replay_experts": True},
                                            "engine.keep_experts=False"),
    "an output as long as the context": ({"control.length_stages": ((0, 32),)},
                                         "control.length_stages=((0, 32),): must be below"),
    "a context below prompt and output": ({"engine.context": 12},
                                          "tokens and an output of 6 exceed engine.context=12"),
    "a row below the longest rollout": ({"grpo.row_length": 31},
                                        "grpo.row_length=31: must be at least engine.context=32"),
    "a context beyond the model's": ({"engine.context": 65, "grpo.row_length": 65},
                                     "engine.context=65 exceeds the model's max_length=64"),
    "drafts without an MTP block": ({"engine.draft_tokens": 1, "model.num_mtp_layers": 0},
                                    "engine.draft_tokens=1: this model has no MTP"),
    "rows that the mesh cannot split": ({"mesh.data": 8},
                                        "grpo.rows x grpo.row_length: 'batch' of size 4"),
    "engine rows that the mesh cannot split": ({"mesh.data": 8, "engine.num_rows": 20,
                                                "engine.min_rows": 4}, "engine.num_rows=20"),

    "a line that is not JSON": ({"task": b"{"}, "train.jsonl:2: is not JSON"),
    "a line that is not UTF-8": ({"task": b'{"id": "\xff"}'}, "train.jsonl:2: is not JSON"),
    "a missing answer": ({"task": {"answer": None}}, "train.jsonl:2: answer is missing"),
    "a choice that is none": ({"task": {"answer": {"letter": "E", "options": 4}}},
                              "task 'bad': letter='E' is not one of A, B, C, D"),
    "mathematics that cannot be read": ({"task": {"verifier": "math", "answer": "\\frac{1}{"}},
                                        "task 'bad': math-verify cannot use"),
    "a puzzle of no generator": ({"task": PUZZLE | {"answer": {"generator": "sums", "seed": 1}}},
                                 "task 'bad': generator='sums'"),
    "a puzzle of a list": ({"task": PUZZLE | {"answer": {"generator": ["gcd"], "seed": 1}}},
                           "task 'bad': its answer must be"),
    "a puzzle that asks something else": ({"task": PUZZLE},
                                          "task 'bad': does not ask the question of gcd, seed 1"),
    "code without tests": ({"task": CODE | {"answer": {"entry_point": "f"}}},
                           "task 'bad': answer has neither test nor cases"),
    "code whose test is no Python": (
        {"task": CODE | {"answer": {"entry_point": "f", "prompt": "", "test": "assert ("}}},
        "task 'bad': '(' was never closed"),
    "an unknown verifier": (
        {"task": {"verifier": "oracle"}},
        "task 'bad': verifier 'oracle' is not one of puzzle, math, choice, code"),
    "an unknown generator": ({"tasks.train": ("puzzle:sums:9",)}, "generator='sums' is not one of"),
    "a source that is none": ({"tasks.train": ("puzzle:gcd",)},
                              "'puzzle:gcd' must read puzzle:GENERATOR:COUNT"),
    "no such file": ({"tasks.held_out": ("nowhere.jsonl",)}, "no task file at 'nowhere.jsonl'"),
    "a held-out task that is trained on": ({"task": {"id": "51"}},
                                           "task '51' of tasks.held_out is in tasks.train, too"),
    "the same under another name": ({"task": {"prompt": "x51"}},
                                    "task '51' of tasks.held_out is in tasks.train, too"),

    "a curriculum without a file": ({"control.curriculum": "moderate"},
                                    "control.difficulty='': must be the path of a difficulty file"),
    "a file that is not there": (
        {"control.curriculum": "moderate", "control.difficulty": "nowhere.jsonl"},
        "no difficulty file at 'nowhere.jsonl'"),
    "a file that lacks a task": ({"control.curriculum": "moderate", "difficulty": range(11)},
                                 "the difficulty file lacks task '11'"),
    "a pool without a task": ({"control.curriculum": "two_stage", "difficulty": range(12)},
                              "no task is hard"),

    "no start": ({"start.workdir": ""},
                 "start.workdir is empty: reinforcement learning needs the weights of another run"),
    "a start that is no run": ({"start.workdir": "nowhere"},
                               "nowhere is no work directory of a run"),
    "a start without a checkpoint": ({"start.workdir": "young"},
                                     "young holds no finished checkpoint"),
    "a start without this checkpoint": ({"start.step": 5}, "start.step=5: "),
    "a step that is none": ({"start.step": -2}, "start.step=-2"),
    "a start of another model": ({"model.expert_ffn_size": 24},
                                 "has model.expert_ffn_size=16, not 24"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, rl_config, tmp_path, monkeypatch):
    changes, message = REFUSED[case]
    monkeypatch.setattr(sandbox, "check", lambda: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(rl_config.start.workdir, "young", ignore=shutil.ignore_patterns("checkpoints"))
    apply(rl_config, changes)
    refuse(rl_config, message)


def apply(config, changes):
    for key, value in changes.items():
        if key == "task":
            good = {
                "id": "bad",
                "verifier": "choice",
                "prompt": "?",
                "answer": {"letter": "A", "options": 4},
            }
            line = value if isinstance(value, bytes) else json.dumps(good | value).encode()
            lines = pathlib.Path(config.tasks.train[0]).read_bytes().splitlines()
            pathlib.Path(config.tasks.train[0]).write_bytes(
                b"\n".join([lines[0], line, *lines[1:]])
            )
        elif key == "difficulty":
            config.control.difficulty = "difficulty.jsonl"
            pathlib.Path("difficulty.jsonl").write_text(
                "".join(f'{{"id": "{i}", "solved": 1, "tried": 2}}\n' for i in value)
            )
        else:
            section, name = key.split(".")
            with config.ignore_type():
                config[section][name] = value


def refuse(config, message):
    workdir = pathlib.Path("run")
    with pytest.raises(ValueError, match=re.escape(message)):
        rl, start = entry.rl_config(config)
        loop.train(rl, start, workdir, config_json=config.to_json(), progress=False)
    assert not workdir.exists()


def test_code_is_refused_where_there_is_no_sandbox(rl_config, tmp_path, monkeypatch):
    def no_bwrap():
        raise ValueError("untrusted code runs only in a sandbox, and there is no bwrap")

    monkeypatch.setattr(bubblewrap, "find_bwrap", no_bwrap)
    monkeypatch.chdir(tmp_path)
    apply(rl_config, {"task": CODE})
    refuse(rl_config, "there is no bwrap")


def test_values_at_the_edge_are_taken():
    good, _ = entry.rl_config(rl_math_tiny.get_config())
    for cls, values in AT_THE_EDGE.items():
        section = getattr(good, OUT_OF_RANGE[cls][0])
        for name, edges in values.items():
            for value in edges if isinstance(edges, tuple) else (edges,):
                assert getattr(dataclasses.replace(section, **{name: value}), name) == value
    few = good.control.pass_few
    assert dataclasses.replace(good.control, pass_many=few).pass_many == few


def test_every_field_has_a_value_that_it_refuses():
    for cls, (_, values) in OUT_OF_RANGE.items():
        assert {f.name for f in dataclasses.fields(cls) if f.type != "bool"} == values.keys()
