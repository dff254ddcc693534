"""The server on a real socket, asked by the public client: with a tiny model, and with an engine
that follows a script.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys

import httpx
import jax
import openai
import pytest

from data import chat_template
from data.tokenizer import SPECIAL_TOKENS
from glm_jax import hf
from glm_jax.infer.sampling import SamplingParams
from glm_jax.serve.service import ServiceDown
from tests.model.oracle import random_state
from tests.serve.serving import (
    CHAT,
    MODEL,
    TEXT,
    USER,
    ScriptedEngine,
    assert_idle,
    chat,
    client,
    complete,
    metrics,
    model_config,
    say,
    serving,
    stalled,
    tiny_engine,
    tiny_state,
    tiny_tokenizer,
)  # fmt: skip
from tests.serve.soaking import soak

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


@pytest.fixture(scope="module")
def tiny():
    """With a tiny model, which draws anything."""
    with serving(tiny_engine()) as running:
        yield running


@pytest.fixture(scope="module")
def scripted():
    """With an engine that says what `say` gives it."""
    with serving(ScriptedEngine(), max_new_tokens=1000) as running:
        yield running


def streamed(chunks) -> dict:
    """The choice of a streamed chat answer, put together."""
    message, reason = {"reasoning_content": "", "content": "", "tool_calls": []}, None
    for chunk in chunks:
        for choice in chunk.choices:
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            message["content"] += choice.delta.content or ""
            message["tool_calls"] += choice.delta.tool_calls or []
            assert reason is None, "behind the end"
            reason = choice.finish_reason
    return message | {"finish_reason": reason}


# --- what is answered ---


def test_greedy_completions_are_the_engines(tiny):
    tokenizer = tiny_tokenizer()
    asked = ["def add(", "größer", "", "return a + b"]
    prompts = [[*tokenizer.start_ids, *tokenizer.encode(text)] for text in asked]
    stops = tuple(map(tokenizer.special, ("<|endoftext|>", "<|user|>", "<|observation|>")))
    expected = tiny_engine().generate(
        prompts, SamplingParams(max_new_tokens=20, temperature=0, stop_tokens=stops)
    )
    answer = complete(tiny, prompt=asked, max_tokens=20, temperature=0, logprobs=0)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    for choice, request in zip(answer.choices, expected, strict=True):
        assert choice.text == tokenizer.decode(request.text_tokens)
        assert choice.finish_reason == request.finish_reason
        assert choice.logprobs.token_logprobs == pytest.approx(
            request.logprobs[: len(request.text_tokens)], abs=1e-4
        )
        assert "".join(choice.logprobs.tokens) == choice.text
        assert [
            choice.text[o : o + len(t)]
            for o, t in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)
        ] == choice.logprobs.tokens
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.completion_tokens == sum(len(r.tokens) for r in expected)
    ids = complete(tiny, prompt=prompts[:2], max_tokens=20, temperature=0)
    assert [c.text for c in ids.choices] == [c.text for c in answer.choices[:2]]


def test_streamed_completions_add_up_to_the_unstreamed(tiny):
    asked = dict(prompt=["def add(", "変数"], n=2, max_tokens=30, seed=4, logprobs=0)
    whole = complete(tiny, **asked)
    texts = [""] * 4
    tokens = [[], [], [], []]
    reasons = [[], [], [], []]
    usage = None
    for chunk in complete(tiny, **asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [c.text for c in whole.choices]
    assert tokens == [c.logprobs.tokens for c in whole.choices]
    assert reasons == [[c.finish_reason] for c in whole.choices]
    assert usage == whole.usage


def test_samples_of_a_prompt_are_no_other_seeds_samples(tiny):
    together = [c.text for c in complete(tiny, n=3, seed=5, max_tokens=16).choices]
    alone = [complete(tiny, seed=seed, max_tokens=16).choices[0].text for seed in (5, 6, 7)]
    assert together[0] == alone[0] and len({*together, *alone}) == 5
    assert together == [c.text for c in complete(tiny, n=3, seed=5, max_tokens=16).choices]
    # clients send milliseconds, and any 64 bits
    for seed in (-(2**63), 2**63 - 1, 2**64 - 1, 1764190000123):
        assert complete(tiny, seed=seed, max_tokens=2).choices


def test_streamed_chat_adds_up_to_the_unstreamed(tiny):
    for seed in range(3):
        whole = chat(tiny, max_tokens=40, seed=seed, logprobs=True).choices[0]
        pieces = streamed(chat(tiny, max_tokens=40, seed=seed, stream=True))
        assert pieces["content"] == whole.message.content
        assert pieces["finish_reason"] == whole.finish_reason
        assert len(whole.logprobs.content) == 40 or whole.finish_reason == "stop"
    assert_idle(tiny)


def test_a_stop_string_ends_the_text_in_front_of_it(scripted):
    say(scripted, "one two 😀 twotwo three")
    for stop, text in {
        "two": "one ",
        "😀 t": "one two ",
        "twotwo": "one two 😀 ",
        "three": "one two 😀 twotwo ",
        "four": "one two 😀 twotwo three",
    }.items():
        answer = complete(scripted, stop=stop, logprobs=0).choices[0]
        assert (answer.text, answer.finish_reason) == (text, "stop")
        assert "".join(answer.logprobs.tokens) == text
        assert (
            "".join(
                c.choices[0].text for c in complete(scripted, stop=[stop, "never"], stream=True)
            )
            == text
        )
    cut = complete(
        scripted, stop="twotwo three!", max_tokens=len(tiny_tokenizer().encode("one two 😀 twotwo"))
    )
    # held back, and no stop after all
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("one two 😀 twotwo", "length")


def test_length_ends_at_the_limit_or_the_context(tiny):
    assert complete(tiny, prompt=[5] * 120, temperature=0).usage.completion_tokens == 8
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(tiny, seed=1, **{name: 3})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_reasoning_is_apart_from_content(scripted):
    say(scripted, "\n<think>\nWhy? 😀 I\n\nknow</think>\n\nBecause ü.\n")
    message = chat(scripted).choices[0].message
    assert (message.reasoning_content, message.content, message.tool_calls) == (
        "Why? 😀 I\n\nknow",
        "Because ü.",
        None,
    )
    chunks = list(chat(scripted, stream=True))
    assert streamed(chunks) == {
        "reasoning_content": "Why? 😀 I\n\nknow", "content": "Because ü.", "tool_calls": [],
        "finish_reason": "stop",
    }  # fmt: skip
    assert sum(bool(getattr(c.choices[0].delta, "reasoning_content", None)) for c in chunks) > 3


CALLS = (
    "<think></think>\nI look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
    "<arg_value>Köln \"</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>get_weather\n</tool_call>"
)  # fmt: skip


def test_tool_calls_come_in_the_apis_structure(scripted):
    say(scripted, CALLS)
    choice = chat(scripted, tools=[WEATHER]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    expected = [("get_weather", {"city": 'Köln "', "days": 2}), ("get_weather", {})]
    assert [
        (c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls
    ] == expected
    assert len({c.id for c in choice.message.tool_calls}) == 2
    pieces = streamed(chat(scripted, tools=[WEATHER], stream=True))
    assert (pieces["finish_reason"], pieces["content"]) == ("tool_calls", "I look.")
    assert [
        (c.index, c.function.name, json.loads(c.function.arguments)) for c in pieces["tool_calls"]
    ] == [(i, *e) for i, e in enumerate(expected)]
    # What came back can be sent again.
    history = [
        USER,
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "sun"},
    ]
    chat(scripted, messages=history, tools=[WEATHER])
    assert '<arg_value>Köln "</arg_value>' in tiny_tokenizer().decode(scripted.engine.prompts[-1])


def test_without_tools_a_call_is_content(scripted):
    say(scripted, CALLS)
    for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = chat(scripted, **body).choices[0]
        assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
        assert choice.message.content == CALLS.removeprefix("<think></think>\n")
        assert scripted.engine.prompts[-1] == chat_template.encode(tiny_tokenizer(), [USER])


def test_a_malformed_call_is_content(scripted):
    for text in (
        "A <tool_call>walk\n</tool_call>",
        "A <tool_call>get_weather\n<arg_key>days</arg_key>",
    ):
        say(scripted, text)
        choice = chat(scripted, tools=[WEATHER]).choices[0]
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == (
            "stop",
            text,
            None,
        )
        assert streamed(chat(scripted, tools=[WEATHER], stream=True))["content"] == text


def test_prompts_are_the_templates(scripted):
    tokenizer = tiny_tokenizer()
    say(scripted, "ok")
    nasty = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "".join(SPECIAL_TOKENS)},
    ]
    cases = {
        True: [
            {},
            {"thinking": {"type": "enabled"}},
            {"chat_template_kwargs": {"enable_thinking": True}},
        ],
        False: [
            {"thinking": {"type": "disabled"}},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ],
    }
    for thinking, bodies in cases.items():
        for body in bodies:
            chat(scripted, messages=nasty, extra_body=body)
            assert scripted.engine.prompts[-1] == chat_template.encode(
                tokenizer, nasty, thinking=thinking
            )
    chat(scripted, tools=[WEATHER])
    assert scripted.engine.prompts[-1] == chat_template.encode(tokenizer, [USER], [WEATHER])


def test_models_health_and_metrics(tiny):
    assert [m.id for m in client(tiny).models.list()] == [MODEL]
    assert httpx.get(f"{tiny.url}/health").json() == {"status": "ok"}
    tiny.wait_until(lambda: not tiny.service.status.running)
    before = metrics(tiny)
    answer = complete(tiny, max_tokens=7, temperature=0)
    tiny.wait_until(lambda: not tiny.service.status.running)
    after = metrics(tiny)
    grown = {
        name: after[name] - before.get(name, 0) for name in after if not name.endswith("_created")
    }
    assert grown["glm_http_requests_total['/v1/completions', '200']"] == 1
    assert grown["glm_prompt_tokens_total"] == answer.usage.prompt_tokens
    assert grown["glm_generated_tokens_total"] == answer.usage.completion_tokens
    assert grown["glm_time_to_first_token_seconds_count"] == 1
    assert sum(v for name, v in grown.items() if name.startswith("glm_finished_total")) == 1
    assert (
        after["glm_free_pages"],
        after["glm_requests_waiting"],
        after["glm_requests_running"],
    ) == (16, 0, 0)
    assert {
        "glm_accepted_drafts_total",
        "glm_decode_passes_total",
        "glm_weights_version",
    } <= after.keys()


# --- load, clients that go, time ---


def test_a_request_that_takes_too_long_is_aborted():
    with stalled(request_seconds=0.3) as running:
        answer = httpx.post(f"{running.url}/v1/completions", json=TEXT)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "server_error")
        assert_idle(running)
        with pytest.raises(openai.APIError, match=r"longer than 0.3 s"):
            list(complete(running, stream=True))
        assert_idle(running)
        assert dict(running.service.status.finished) == {"abort": 2}


def test_a_client_that_goes_frees_its_row():
    with stalled() as running:
        for path, body in (
            ("/v1/completions", TEXT | {"n": 2}),
            ("/v1/chat/completions", CHAT),
            ("/v1/chat/completions", CHAT | {"stream": True}),
        ):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(running.url + path, json=body, timeout=httpx.Timeout(10, read=0.2))
            assert_idle(running)
        running.engine.go.set()
        assert complete(running).choices[0].text == "ok"


def test_a_client_that_hangs_up_frees_its_pages(tiny):
    for seed in range(3):
        with httpx.stream(
            "POST",
            f"{tiny.url}/v1/completions",
            json=TEXT | {"stream": True, "max_tokens": 120, "seed": seed},
        ) as answer:
            next(answer.iter_lines())
    assert_idle(tiny)


def test_neighbours_do_not_notice(tiny):
    asked = dict(prompt="def add(", seed=11, max_tokens=60)
    alone = complete(tiny, **asked).choices[0].text

    async def crowd():
        async with httpx.AsyncClient(timeout=30) as http:

            async def go_away(seed):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.02 * seed):
                        await http.post(
                            f"{tiny.url}/v1/completions",
                            json=TEXT | {"seed": seed, "max_tokens": 100},
                        )

            mine = asyncio.create_task(
                http.post(f"{tiny.url}/v1/completions", json={"model": MODEL} | asked)
            )
            bad = http.post(f"{tiny.url}/v1/completions", json=TEXT | {"n": -1})
            await asyncio.gather(bad, *(go_away(seed) for seed in range(10)))
            return (await mine).json()["choices"][0]["text"]

    assert asyncio.run(crowd()) == alone
    assert_idle(tiny)


def test_a_thousand_connections_at_once_get_answers(tiny):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    body = json.dumps(TEXT | {"max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()

    async def one(everyone: asyncio.Barrier):
        reader, writer = await asyncio.open_connection(*tiny.host_and_port)
        await everyone.wait()
        writer.write(head + body)
        answer = await reader.read()
        writer.close()
        json.loads(answer.partition(b"\r\n\r\n")[2])
        return int(answer.split()[1])

    async def all_of_them():
        everyone = asyncio.Barrier(1000)
        return await asyncio.wait_for(asyncio.gather(*(one(everyone) for _ in range(1000))), 60)

    statuses = asyncio.run(all_of_them())
    assert set(statuses) <= {200, 429, 503}
    assert statuses.count(200) >= 4
    assert complete(tiny, max_tokens=2).usage.completion_tokens <= 2
    assert_idle(tiny)


def test_a_short_soak(tiny):
    report = soak(tiny, num_requests=60, num_swaps=2, num_nuisances=30)
    assert report.half_closed["200"] and report.half_closed.keys() <= {
        "200",
        "429",
    }, report.half_closed
    assert report.health_answers
    assert (report.pages_lost, report.answered_twice, report.swaps) == (0, 0, 2)
    assert sum(report.outcomes.values()) == 60
    assert set(report.outcomes) <= {
        "streamed to the end", "answered whole: 200", "hung up", "gave up waiting", "bad: 400",
        "answered whole: 429", "streamed: 429",
    }, report.outcomes  # fmt: skip
    assert_idle(tiny)


# --- swaps and ends ---


def test_weights_are_swapped_between_steps():
    with serving(tiny_engine()) as running:
        before = complete(running, temperature=0, max_tokens=10).choices[0].text
        assert running.service.set_weights(tiny_state(1), recompute=True).result(30) == 1
        assert complete(running, temperature=0, max_tokens=10).choices[0].text != before
        assert running.service.set_weights(tiny_state(0), recompute=True).result(30) == 2
        assert complete(running, temperature=0, max_tokens=10).choices[0].text == before
        assert metrics(running)["glm_weights_version"] == 2
        with pytest.raises(ValueError, match="shape"):
            running.service.set_weights(
                jax.tree.map(lambda x: x[..., None], tiny_state()), recompute=True
            ).result(30)
        assert complete(running, temperature=0, max_tokens=10).choices[0].text == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_engine_leaves_nobody_waiting():
    with stalled() as running, concurrent.futures.ThreadPoolExecutor() as pool:
        whole = pool.submit(complete, running)
        stream = pool.submit(lambda: list(complete(running, stream=True)))
        running.wait_until(lambda: len(running.engine.running) + len(running.engine.waiting) == 2)
        running.engine.failure = RuntimeError("out of memory")
        with pytest.raises(openai.InternalServerError, match="the engine failed") as caught:
            whole.result(30)
        assert caught.value.status_code == 503
        with pytest.raises(openai.APIError, match="the engine failed"):
            stream.result(30)
        assert httpx.get(f"{running.url}/health").status_code == 503
        assert httpx.post(f"{running.url}/v1/completions", json=TEXT).status_code == 503
        with pytest.raises(ServiceDown):
            running.service.set_weights(None, recompute=True)


def test_shutdown_lets_requests_end():
    with concurrent.futures.ThreadPoolExecutor() as pool, stalled() as running:
        asked = [
            pool.submit(complete, running),
            pool.submit(lambda: "".join(c.choices[0].text for c in complete(running, stream=True))),
        ]
        running.wait_until(lambda: len(running.engine.running) + len(running.engine.waiting) == 2)
        running.server.should_exit = True
        assert not concurrent.futures.wait(asked, timeout=0.5).done
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/health")
        running.engine.go.set()
        assert [asked[0].result(30).choices[0].text, asked[1].result(30)] == ["ok", "ok"]
    assert running.service.refusal == "the server is shutting down"


def test_shutdown_waits_no_longer_than_it_may():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with stalled(drain_seconds=0.3) as running:
            asked = pool.submit(complete, running)
            running.wait_until(lambda: running.engine.running)
        assert running.engine.idle
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            asked.result(30)


def test_the_command_serves_a_checkpoint_and_drains_on_sigterm(tmp_path):
    config = model_config()
    hf.export_checkpoint(tmp_path / "hf", config, random_state(config), dtype="float32")
    (tmp_path / "hf" / "tokenizer.json").write_text(tiny_tokenizer().to_json())
    (tmp_path / "key").write_text("secret\n")
    arguments = [
        "--port=0",
        "--num_rows=1",
        "--context=128",
        "--page_size=32",
        "--prefill_chunk=4",
        "--decode_steps=4",
        "--drain_seconds=20",
    ]
    command = [
        sys.executable,
        "-m",
        "experiments.serve",
        f"--workdir={tmp_path / 'hf'}",
        f"--api_key_file={tmp_path / 'key'}",
        *arguments,
    ]
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        command,
        cwd=root,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = re.search(r"at (http://127.0.0.1:\d+/v1)$", process.stdout.readline().strip()).group(
            1
        )
        asking = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        stream = asking.completions.create(
            model="glm", prompt="def ", temperature=0, max_tokens=100, stream=True
        )
        pieces = [next(stream).choices[0]]
        process.send_signal(signal.SIGTERM)
        pieces += [chunk.choices[0] for chunk in stream]
        assert pieces[-1].finish_reason in ("length", "stop")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
