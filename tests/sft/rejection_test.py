"""Rejection sampling: each filter drops what it is for and nothing else, and every drop is
counted.
"""

import dataclasses
import random

import pytest

from data.chat_template import segments
from glm_jax.sft import rejection
from glm_jax.sft.rejection import RejectionConfig, Sample

CONFIG = RejectionConfig(
    min_tokens=5, min_reward=1.0, min_preference=0.5, drop_shortest=0.5, hard_pass_rate=0.5,
    hard_responses=4, easy_responses=1
)  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"properties": {"city": {}, "days": {}}, "required": ["city"]},
    },
}


def user(text):
    return {"role": "user", "content": text}


def says(content, reasoning="why", *calls):
    return {"role": "assistant", "reasoning_content": reasoning, "content": content} | (
        {"tool_calls": list(calls)} if calls else {}
    )


def calls(name="weather", arguments='{"city": "Bonn"}'):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL = {"role": "tool", "content": "sunny"}


def sample(task="t", content="4", **more):
    settings = {
        "thinking": True,
        "num_tokens": 10,
        "status": "completed",
        "reward": 1.0,
        "response": (says(content),),
    }
    return Sample(task=task, prompt=(user(task),), **(settings | more))


def reasons(samples, preference=None):
    kept, counts = rejection.apply_filters(samples, CONFIG, preference)
    assert len(kept) + counts.total() == len(samples)
    return dict(counts)


GOOD = [
    sample(), sample(content="5"), sample("u"), sample(response=(says("4", ""),), thinking=False),
    sample(num_tokens=5),
    sample(content="4", response=(says("", "w", calls()), TOOL, says("sunny", "")),
           tools=(WEATHER,)),
    sample(response=(says("", "w", calls(), calls(arguments={"city": "x", "days": 2})), TOOL, TOOL,
                     says("a", "")), tools=(WEATHER,)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (sample(status="truncated"), "form/truncated"),
        (sample(status="format_error"), "form/format_error"),
        (sample(status="environment_error", reward=None), "form/environment_error"),
        (sample(num_tokens=4), "form/too_short"),
        (sample(response=(says("4", " \n"),)), "form/bad_reasoning"),
        (sample(response=(says("4", None),)), "form/bad_reasoning"),
        (sample(thinking=False), "form/bad_reasoning"),
        (sample(content="a</think>4"), "form/bad_reasoning"),
        (sample(response=(says("4", "a <think> b"),)), "form/bad_reasoning"),
        (sample(reward=0.99), "correctness/wrong"),
        (sample(reward=None), "preference/disliked"),
        (
            sample(response=(says("", "w", calls("rain")), TOOL, says("a")), tools=(WEATHER,)),
            "tools/protocol",
        ),
        (sample(response=(says("", "w", calls()), TOOL, says("a"))), "tools/protocol"),
        (
            sample(
                response=(says("", "w", calls(arguments="{}")), TOOL, says("a")), tools=(WEATHER,)
            ),
            "tools/protocol",
        ),
        (
            sample(
                response=(says("", "w", calls(arguments='{"city": 1, "day": 2}')), TOOL, says("a")),
                tools=(WEATHER,),
            ),
            "tools/protocol",
        ),
        (
            sample(
                response=(says("", "w", calls(arguments="city=1")), TOOL, says("a")),
                tools=(WEATHER,),
            ),
            "tools/protocol",
        ),
        (
            sample(response=(says("", "w", calls(), calls()), TOOL, says("a")), tools=(WEATHER,)),
            "tools/protocol",
        ),
        (
            sample(response=(says("", "w", calls()), TOOL, TOOL, says("a")), tools=(WEATHER,)),
            "tools/protocol",
        ),
        (sample(response=(says("a"), user("b"), says("c"))), "tools/protocol"),
        (sample(response=(says("", "w", calls()),), tools=(WEATHER,)), "tools/not_terminal"),
        (sample(response=(says("", "w", calls()), TOOL), tools=(WEATHER,)), "tools/not_terminal"),
        (sample(is_terminal=False), "tools/not_terminal"),
    ],
)
def test_each_reason_to_drop(bad, reason):
    assert reasons(GOOD, None) == {"form/duplicate": 1}  # GOOD[4] says what GOOD[0] says
    assert reasons([bad], lambda found: [0.49] * len(found)) == {reason: 1}


def test_duplicates_are_the_same_words_to_the_same_prompt():
    same = [
        sample(content="so  4"),
        sample(content="so\n4"),
        sample("u", "so 4"),
        sample(content="so 5"),
        sample(content="so  4"),
    ]
    assert reasons(same) == {"form/duplicate": 2}
    # What was dropped makes nothing a duplicate.
    assert reasons([sample(num_tokens=1), sample()]) == {"form/too_short": 1}


def test_the_reward_model_sees_subjective_samples_only_once_and_in_order():
    asked = []

    def preference(found):
        asked.append([s.task for s in found])
        return [0.5, 0.4]

    samples = [
        sample("a"),
        sample("b", reward=None),
        sample("c"),
        sample("d", reward=None),
        sample("e", reward=None, num_tokens=1),
    ]
    kept, _ = rejection.apply_filters(samples, CONFIG, preference)
    assert asked == [["b", "d"]] and [s.task for s in kept] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="task 'b' has no objective answer"):
        rejection.apply_filters(samples, CONFIG)


def test_prompts_with_the_shortest_responses_are_dropped():
    lengths = {"a": [90, 10], "b": [40, 40], "c": [60], "d": [20, 70], "e": [1, 2]}
    samples = [sample(task, num_tokens=n) for task, own in lengths.items() for n in own]
    random.Random(0).shuffle(samples)
    for share, left in ((0, "abcde"), (0.19, "abcde"), (0.2, "abcd"), (0.5, "acd"), (1, "")):
        assert {s.task for s in rejection.drop_shortest_prompts(samples, share)} == set(left)
    assert rejection.drop_shortest_prompts(samples, 0) == samples


def test_hard_prompts_keep_four_responses():
    samples = [sample("hard", str(i), reward=float(i >= 5)) for i in range(10)]
    samples += [sample("easy", str(i), reward=float(i >= 4)) for i in range(10)] + [
        sample("liked", str(i), reward=None) for i in range(3)
    ]
    samples += [sample("easy", str(i), reward=0.0, status="environment_error") for i in range(9)]
    assert rejection.hard_tasks(samples, CONFIG) == {"hard"}
    config = dataclasses.replace(CONFIG, drop_shortest=0.0)
    conversations, counts = rejection.select(samples, config, lambda found: [1.0] * len(found))
    assert [(c["messages"][0]["content"], c["messages"][1]["content"]) for c in conversations] == [
        ("hard", "5"), ("hard", "6"), ("hard", "7"), ("hard", "8"), ("easy", "4"), ("liked", "0"),
    ]  # fmt: skip
    assert counts == {
        "form/environment_error": 9,
        "correctness/wrong": 9,
        "selection/enough_responses": 8,
        "kept": 6,
    }


def test_what_is_kept_can_be_written_and_everything_is_counted():
    samples = GOOD + [
        sample(task, num_tokens=n, status=status)
        for task in "vwx"
        for n in (3, 30)
        for status in ("completed", "truncated")
    ]
    conversations, counts = rejection.select(samples, CONFIG)
    assert counts.total() == len(samples) and counts["kept"] == len(conversations) > 0
    for conversation in conversations:
        assert conversation.keys() == {"messages", "tools", "thinking"}
        assert segments(**conversation, generation_prompt=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"drop_shortest": 1.5},
        {"hard_pass_rate": -0.1},
        {"hard_responses": 0},
        {"easy_responses": 0},
    ],
)
def test_wrong_settings_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        dataclasses.replace(CONFIG, **wrong)
    with pytest.raises(ValueError, match="status 'done' is not one of completed, truncated"):
        rejection.wrong_forms([sample(status="done")], 1)
