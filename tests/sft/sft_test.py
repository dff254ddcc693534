"""Supervised fine-tuning: what is learnt of a conversation, who is held out, packing, resume, the
start; and what is refused.
"""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import toy
from flax import nnx
from launching import finish, flags

from data.chat_template import render
from data.tokenizer import Tokenizer, train_tokenizer
from experiments import entry
from glm_jax import load
from glm_jax.sft.conversations import (
    SOURCE,
    ConversationBatches,
    ConversationConfig,
    encode_all,
    write_conversations,
)
from glm_jax.train import loop
from glm_jax.train.start import load_weights

NOW = {"type": "function", "function": {"name": "now"}}


def user(text):
    return {"role": "user", "content": text}


def says(content, reasoning=None, calls=()):
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    return message | (
        {
            "tool_calls": [
                {"type": "function", "function": {"name": n, "arguments": {}}} for n in calls
            ]
        }
        if calls
        else {}
    )


def sums(count, first=0):
    """Short conversations with reasoning, no two alike."""
    return [
        {"messages": [user(f"{i}+1"), says(str(i + 1), f"1+{i}")]}
        for i in range(first, first + count)
    ]


@pytest.fixture
def tokenizer(start):
    return Tokenizer.load(start)


@pytest.fixture
def data_config(start, tmp_path):
    """write(conversations, **changes) -> the config of a file with these."""

    def write(conversations, **changes):
        write_conversations(tmp_path / "chat.jsonl", conversations)
        sizes = {
            "batch_size": 8,
            "sequence_length": 64,
            "num_packing_bins": 8,
            "virtual_shards": 8,
            "seed": 0,
            "epochs": 1,
        }
        settings = {
            "paths": (str(tmp_path / "chat.jsonl"),),
            "tokenizer": str(start),
            "thinking_share": 1.0,
            "held_out_fraction": 0.0,
        }
        return ConversationConfig(**settings | sizes | changes)

    return write


def texts(features, tokenizer):
    """Each conversation as it is written, in order."""
    return [tokenizer.decode([*f["tokens"], f["targets"][-1]]) for f in features]


def conversations_of(batch):
    """Where each conversation of a batch lies: (row, positions)."""
    ids = batch["segment_ids"]
    return [
        (row, np.flatnonzero(ids[row] == segment))
        for row in range(len(ids))
        for segment in range(1, ids[row].max() + 1)
    ]


# --- what a conversation becomes ---


def test_only_what_the_assistant_wrote_and_its_stop_is_learnt(data_config, tokenizer):
    system, tool = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "noon"}
    turns = [user("a"), says("b", "dropped"), user("c"), says("d", "why")]
    called = [user("time?"), says("", "ask", ["now", "now"]), tool, tool, says("It is noon.", "so")]
    conversations = [
        {"messages": turns, "thinking": True}, {"messages": turns, "thinking": False},
        {"messages": [system, *turns[:2]], "thinking": True},
        {"messages": called, "tools": [NOW], "thinking": True},
        {"messages": called, "tools": [NOW], "thinking": False},
        {"messages": [*called, *turns], "tools": [NOW], "thinking": True}, *sums(10),
    ]  # fmt: skip
    batches = ConversationBatches(
        data_config(conversations, sequence_length=1024, virtual_shards=1, num_packing_bins=4), 0, 1
    )
    expected, seen = {expected_text(c) for c in conversations}, set()
    for batch in batches:
        assert not batch["loss_weights"][batch["segment_ids"] == 0].any()
        for at in conversations_of(batch):
            pieces = [
                tokenizer.decode([i]) for i in [*batch["tokens"][at], batch["targets"][at][-1]]
            ]
            seen.add("".join(pieces))
            assert batch["loss_weights"][at].tolist() == learnt(pieces)[1:]
    assert seen == expected


def expected_text(conversation):
    thinking, messages = conversation.get("thinking", True), conversation["messages"]
    if not thinking:
        messages = [m | {"reasoning_content": None} for m in messages]
    return (
        render(messages, conversation.get("tools"), thinking=thinking, generation_prompt=False)
        + "<|user|>"
    )


def learnt(pieces):
    """1 for each piece that the assistant is to write, found in the text alone."""
    text = "".join(pieces)
    last_user, thinking = text.rindex("<|user|>", 0, -1), "/nothink" not in text
    is_learnt = np.zeros(len(text), bool)
    for turn in re.finditer(
        r"<\|assistant\|>(\n<think></think>)?.*?(<\|user\|>|<\|observation\|>)", text, re.DOTALL
    ):
        is_written = thinking and turn.start() > last_user
        is_learnt[
            turn.start() + len("<|assistant|>") if is_written else turn.end(1) : turn.end()
        ] = True
    ends = np.cumsum([len(piece) for piece in pieces])
    return [float(is_learnt[end - 1]) for end in ends]


def test_the_set_share_keeps_its_reasoning_and_the_others_are_asked_with_thinking_off(
    data_config, tokenizer
):
    plain = [{"messages": [user(f"plain {i}"), says("yes")]} for i in range(20)]
    says_so = [c | {"thinking": i % 2 == 0} for i, c in enumerate(sums(40, 5000))]
    for share in (0.0, 0.3, 1.0):
        written = texts(
            encode_all(
                data_config([*sums(1000), *plain, *says_so], thinking_share=share), tokenizer
            ).train,
            tokenizer,
        )
        by_lot, without, own = written[:1000], written[1000:1020], written[1020:]
        kept = ["<think>1+" in text for text in by_lot]
        assert abs(np.mean(kept) - share) <= 4 * np.sqrt(share * (1 - share) / 1000)
        assert [text.count("/nothink") for text in by_lot] == [int(not k) for k in kept]
        assert all("<think></think>" in text for text, k in zip(by_lot, kept, strict=True) if not k)
        assert all("/nothink" in text for text in without)  # there is no reasoning to show
        assert (
            ["<think>1+" in text for text in own]
            == ["/nothink" not in text for text in own]
            == [True, False] * 20
        )


def test_who_is_held_out_depends_on_the_messages_alone(data_config, tokenizer):
    def split(conversations, **changes):
        encoded = encode_all(
            data_config(
                conversations, **{"held_out_fraction": 0.2, "thinking_share": 0.5} | changes
            ),
            tokenizer,
        )
        return [
            {re.search(r"\d+\+1", text).group() for text in texts(part, tokenizer)}
            for part in (encoded.train, encoded.held_out)
        ]

    train, held_out = split(sums(1000))
    assert len(train | held_out) == 1000 and not train & held_out
    assert abs(len(held_out) / 1000 - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 1000)
    more_train, more_held_out = split(sums(1500)[::-1], thinking_share=1.0)
    assert train < more_train and held_out < more_held_out
    turned = [{"messages": [dict(reversed(m.items())) for m in c["messages"]]} for c in sums(1000)]
    assert split(turned) == [train, held_out]
    # the same words are on one side
    twice = [c | {"thinking": thinking} for c in sums(100) for thinking in (True, False)]
    assert not set.intersection(*split(twice))


def test_packed_conversations_never_see_each_other(data_config, start):
    model, _ = load(start)
    packed = next(ConversationBatches(data_config(sums(100)), 0, 1))
    places = conversations_of(packed)
    assert len(places) >= 16

    @nnx.jit
    def losses(model, batch):
        logprobs = jax.nn.log_softmax(
            model(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
        )
        return (
            -batch["loss_weights"]
            * jax.numpy.take_along_axis(logprobs, batch["targets"][..., None], -1)[..., 0]
        )

    together = np.asarray(losses(model, packed))
    for some in (places[:8], places[-8:]):
        alone = {name: np.zeros_like(x) for name, x in packed.items()}
        for row, at in enumerate(some):
            for name, x in packed.items():
                alone[name][row, : len(at[1])] = 1 if name == "segment_ids" else x[at]
        found = np.asarray(losses(model, alone)).sum(-1)
        np.testing.assert_allclose(found, [together[at].sum() for at in some], rtol=1e-5)


# --- the run ---


@pytest.fixture
def config(start, tmp_path, monkeypatch):
    """configs/sft_tiny.py for the toy, in a folder of its own."""
    from configs import sft_tiny

    monkeypatch.chdir(tmp_path)
    write_conversations(pathlib.Path("chat.jsonl"), sums(100))
    config = sft_tiny.get_config()
    config.model.update(toy.MODEL)
    config.mesh.data = 8
    config.start.workdir = str(start)
    config.data.update(
        paths=("chat.jsonl",),
        tokenizer=str(start),
        batch_size=8,
        virtual_shards=8,
        sequence_length=64,
    )
    config.schedule.update(total_tokens=6 * 512, decay_tokens=6 * 512, warmup_tokens=512)
    config.loop.update(checkpoint_every=2, keep_checkpoints=9, eval_every=2)
    return config


def train(config, workdir):
    settings = entry.sft_config(config)
    return loop.train(
        settings, pathlib.Path(workdir), config_json=config.to_json(), progress=False, source=SOURCE
    )


def weights(workdir, step=None):
    return jax.tree.leaves(load_weights(workdir, step)[1:])


def equal(some, others):
    return [np.array_equal(a, b) for a, b in zip(some, others, strict=True)]


def test_a_killed_run_goes_on_bit_for_bit(config):
    assert train(config, "whole") == 6
    found = toy.records("whole")
    assert [r["step"] for r in found] == list(range(6)) and found[5]["held_out_loss"] < found[1][
        "held_out_loss"
    ]
    shutil.copytree("whole", "killed")
    for step in (4, 6):
        shutil.rmtree(f"killed/checkpoints/{step}")
    assert train(config, "killed") == 6
    assert toy.records("killed") == found
    assert all(equal(weights("killed"), weights("whole"))) and not all(
        equal(weights("whole"), weights("whole", 2))
    )


@pytest.mark.slow
def test_two_processes_learn_from_the_rows_of_one(config, tmp_path, start):
    config.schedule.total_tokens = 2 * 512
    train(config, "one")
    changes = {f"model.{key}": value for key, value in toy.MODEL.items()} | {
        "start.workdir": start, "data.tokenizer": start, "data.paths": (f"{tmp_path}/chat.jsonl",),
        "data.sequence_length": 64, "mesh.data": 4,
    }  # fmt: skip
    changes |= {f"schedule.{key}": config.schedule[key] for key in
                ("total_tokens", "decay_tokens", "warmup_tokens")}  # fmt: skip
    arguments = ["--config=configs/sft_tiny.py", f"--workdir={tmp_path}/two", *flags(changes)]
    finish(tmp_path / "log", "experiments.sft", arguments, count=2)
    one, two = (toy.records(workdir) for workdir in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):  # eight devices and four sum in different orders
        for name in ("loss", "cross_entropy", "mtp"):
            assert a[name] == pytest.approx(b[name], rel=1e-6)
    assert one[-1]["held_out_loss"] == pytest.approx(two[-1]["held_out_loss"], rel=1e-5)


def test_a_run_begins_with_the_starts_weights_and_keeps_its_tokenizer(config, start):
    config.schedule.update(
        learning_rate=0.0,
        final_learning_rate=0.0,
        bias_rate=0.0,
        late_bias_rate=0.0,
        total_tokens=512,
    )
    assert train(config, "run") == 1
    assert all(equal(weights("run"), weights(start)))
    assert (
        pathlib.Path("run/tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    )


# What is wrong -> (changes of config keys; `line` is added to the file, message).
REFUSED = {
    "no such file": ({"data.paths": ("nowhere.jsonl",)},
                     "no file of conversations at 'nowhere.jsonl'"),
    "no file at all": ({"data.paths": ()}, "data.paths is empty"),
    "a line that is not JSON": ({"line": '{"messages": ['}, "chat.jsonl:101: is not JSON"),
    "a line that is not UTF-8": ({"line": b'{"messages": "\xff"}'}, "chat.jsonl:101: is not JSON"),
    "a line that is no object": ({"line": "[]"}, "chat.jsonl:101: must be an object with messages"),
    "no messages": ({"line": '{"tools": []}'}, "chat.jsonl:101: must be an object with messages"),
    "an unknown field": ({"line": '{"messages": [], "reward": 1}'},
                         "chat.jsonl:101: must be an object with messages, and maybe tools"),
    "messages that are text": ({"line": '{"messages": "hi"}'},
                               "chat.jsonl:101: messages must be a list of objects"),
    "a message that is text": ({"line": '{"messages": ["hi"]}'},
                               "chat.jsonl:101: messages must be a list of objects"),
    "an empty conversation": ({"line": '{"messages": []}'},
                              "chat.jsonl:101: messages: must be a list of at least one message"),
    "thinking as text": ({"line": '{"messages": [], "thinking": "no"}'},
                         "chat.jsonl:101: thinking must be true or false, not 'no'"),
    "no assistant turn": ({"line": json.dumps({"messages": [user("?")]})},
                          "messages[0].role: a finished conversation ends with the assi"),
    "an unknown role": ({"line": '{"messages": [{"role": "model", "content": ""}]}'},
                        "chat.jsonl:101: messages[0].role: 'model' is unkn"),
    "all longer than a row": ({"data.sequence_length": 8},
                              "no conversation of at most 8 tokens to train on: 100 are longer"),
    "all held out": ({"data.held_out_fraction": 1.0}, "to train on: 0 are longer, 100 held out"),
    "none held out": ({"data.held_out_fraction": 0.0}, "data.held_out_fraction=0.0 holds out none"),
    "too few": ({"data.virtual_shards": 200, "data.batch_size": 200},
                "fewer than data.virtual_shards=200"),
    "a share above one": ({"data.thinking_share": 1.5}, "data.thinking_share=1.5"),
    "a seed below zero": ({"data.seed": -1}, "data.seed=-1"),
    "rows beyond the model": ({"data.sequence_length": 128},
                              "data.sequence_length=128 exceeds model.max_length=64"),
    "no tokenizer": ({"data.tokenizer": "nowhere"}, "no tokenizer at 'nowhere'"),
    "another tokenizer": ({"data.tokenizer": "other.json"},
                          "has another tokenizer than this run's data"),
    "a start that is no run": ({"start.workdir": "nowhere"},
                               "nowhere is no work directory of a run"),
    "a start without a checkpoint": ({"start.workdir": "young"},
                                     "young holds no finished checkpoint"),
    "a start without this checkpoint": ({"start.step": 5}, "start.step=5: "),
    "a start of another model": ({"model.expert_ffn_size": 24},
                                 "has model.expert_ffn_size=16, not 24"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, config, start):
    changes, message = REFUSED[case]
    shutil.copytree(start, "young", ignore=shutil.ignore_patterns("checkpoints"))
    pathlib.Path("other.json").write_text(train_tokenizer(["a b"], 300).to_json())
    for key, value in changes.items():
        if key == "line":
            with pathlib.Path("chat.jsonl").open("ab") as file:
                file.write(value if isinstance(value, bytes) else value.encode())
        else:
            section, name = key.split(".")
            config[section][name] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        train(config, "run")
    assert not pathlib.Path("run").exists()
