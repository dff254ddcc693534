"""What the server refuses, and that it says why and naming the field; the engine behind it follows
a script.
"""

import concurrent.futures
import socket

import httpx
import openai
import pytest

from tests.serve.serving import (
    CHAT,
    MODEL,
    TEXT,
    USER,
    ScriptedEngine,
    assert_idle,
    client,
    complete,
    metrics,
    say,
    serving,
    stalled,
)

JSON = {"Content-Type": "application/json; charset=utf-8"}


@pytest.fixture(scope="module")
def running():
    with serving(ScriptedEngine(context=128, num_rows=4)) as running:
        say(running, "ok")
        yield running


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (TEXT | {"temperature": -0.5}, 400, "temperature", "greater than or equal to 0, not -0.5"),
        (TEXT | {"temperature": "hot"}, 400, "temperature", "valid number, not 'hot'"),
        (TEXT | {"top_p": -0.1}, 400, "top_p", "not -0.1"),
        (TEXT | {"top_k": -2}, 400, "top_k", "not -2"),
        (TEXT | {"min_p": 1.5}, 400, "min_p", "not 1.5"),
        (TEXT | {"top_k": 2**31}, 400, "top_k", "less than"),
        (TEXT | {"seed": 2**64}, 400, "seed", "less than"),
        (TEXT | {"n": 0}, 400, "n", "not 0"),
        (TEXT | {"n": 65}, 400, "n", "65 samples; at most 64"),
        (TEXT | {"prompt": ["x"] * 65}, 400, "prompt", "65 samples; at most 64"),
        (TEXT | {"max_tokens": 0}, 400, "max_tokens", "0 goes with echo alone"),
        (
            TEXT | {"max_tokens": 126},
            400,
            "max_tokens",
            "126 tokens are too many: 3 of prompt leave 125 of the context of 128",
        ),
        (TEXT | {"prompt": "x" * 200}, 400, "prompt", "202 tokens, but the context is 128"),
        (TEXT | {"prompt": []}, 400, "prompt", "not empty"),
        (TEXT | {"prompt": [[]]}, 400, "prompt", "[0] must be"),
        (TEXT | {"prompt": [1, 99999]}, 400, "prompt", "[0] holds token 99999; valid are 0.."),
        (TEXT | {"prompt": [[1], [-1]]}, 400, "prompt", "[1] holds token -1"),
        (TEXT | {"stop": ["a", ""]}, 400, "stop[1]", "at least 1 character"),
        (TEXT | {"stop": ["a"] * 17}, 400, "stop", "at most 16"),
        (TEXT | {"logprobs": 21}, 400, "logprobs", "not 21"),
        (TEXT | {"suffix": "x"}, 400, "suffix", "'x' is not supported"),
        (TEXT | {"logit_bias": {"a": 1}}, 400, "logit_bias.a.[key]", "pattern"),
        (TEXT | {"logit_bias": {"99999": 1}}, 400, "logit_bias", "token 99999 is unknown"),
        (TEXT | {"ignore_eos": True}, 400, "ignore_eos", "True is not supported"),
        (
            TEXT | {"stream_options": {"include_usage": True}},
            400,
            "stream_options",
            "only for stream",
        ),
        (TEXT | {"stream": "yes"}, 400, "stream", "boolean"),
        (TEXT | {"frequency_penalty": 2.5}, 400, "frequency_penalty", "not 2.5"),
        (TEXT | {"repetition_penalty": 0}, 400, "repetition_penalty", "not 0"),
        (TEXT | {"temprature": 1}, 400, "temprature", "unknown field; did you mean temperature?"),
        (TEXT | {"model": "other"}, 404, "model", "'other' is not served here; valid: 'tiny'"),
        ({"prompt": "x"}, 400, "model", "required"),
        ({"model": MODEL}, 400, "prompt", "required"),
        (CHAT | {"messages": []}, 400, "messages", "at least one message"),
        (
            CHAT | {"messages": [USER, {"role": "robot", "content": "x"}]},
            400,
            "messages[1].role",
            "'robot' is unknown; valid: system",
        ),
        (
            CHAT | {"messages": [{"role": "user", "content": 5}]},
            400,
            "messages[0].content",
            "not int",
        ),
        (
            CHAT | {"messages": [USER, {"role": "tool", "content": "x"}]},
            400,
            "messages[1].role",
            "must follow",
        ),
        (
            CHAT | {"messages": [USER | {"content": "x" * 200}]},
            400,
            "messages",
            "but the context is 128",
        ),
        (CHAT | {"tools": ["f"]}, 400, "tools[0]", "must be an object, not str"),
        (
            CHAT | {"tools": [{"type": "function", "function": {}}], "tool_choice": "none"},
            400,
            "tools[0].function.name",
            "None",
        ),
        (CHAT | {"tool_choice": "required"}, 400, "tool_choice", "there are no tools to call"),
        (
            CHAT | {"continue_final_message": True},
            400,
            "continue_final_message",
            "the last message must be the assistant's",
        ),
        (
            CHAT | {"max_tokens": 5, "max_completion_tokens": 6},
            400,
            "max_completion_tokens",
            "contradicts",
        ),
        (CHAT | {"max_completion_tokens": 500}, 400, "max_completion_tokens", "too many"),
        (
            CHAT | {"thinking": {"type": "off"}},
            400,
            "thinking.type",
            "'enabled' or 'disabled', not 'off'",
        ),
        (
            CHAT
            | {
                "thinking": {"type": "enabled"},
                "chat_template_kwargs": {"enable_thinking": False},
            },
            400,
            "thinking",
            "contradicts",
        ),
        (CHAT | {"top_logprobs": 3}, 400, "top_logprobs", "only with logprobs"),
        (CHAT | {"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs", "not 21"),
        (CHAT | {"reasoning_effort": "huge"}, 400, "reasoning_effort", "'none', 'minimal'"),
        (CHAT | {"response_format": {"type": "json"}}, 400, "response_format.type", "not 'json'"),
        (
            CHAT | {"response_format": {"type": "json_schema"}},
            400,
            "response_format",
            "goes with type json_schema",
        ),
        ([1], 400, None, "should be an object"),
    ],
)
def test_bad_requests_name_the_field(running, body, status, param, message):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = httpx.post(running.url + path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert_idle(running)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "\xff"}',
        b"\xff\xfe{",
        b"[" * 10**5,
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": ' + b"9" * 10**4 + b"}",
    ],
    ids=["empty", "cut", "latin", "utf-16", "deep", "surrogate", "long number"],
)
def test_what_is_no_json_is_a_bad_request(running, body):
    answer = httpx.post(f"{running.url}/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert "the body is no request: Invalid JSON" in answer.json()["error"]["message"]


def test_harmless_fields_are_taken(running):
    answer = complete(
        running,
        max_tokens=2,
        user="u",
        extra_body={"store": True, "metadata": {"a": "b"}, "seed": None, "best_of": 1},
    )
    assert answer.usage.completion_tokens <= 2


def test_the_client_raises_its_own_errors(running):
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        complete(running, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="other"):
        complete(running, model="other")


def test_unknown_paths_and_methods_get_json(running):
    for method, path, status in (
        ("GET", "/v2", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
    ):
        answer = httpx.request(method, running.url + path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (
            status,
            "invalid_request_error",
        )


def test_a_long_body_is_refused_before_it_is_read(running):
    big = b'{"model": "' + b"x" * 2**20 + b'"}'
    answer = httpx.post(f"{running.url}/v1/completions", content=big, headers=JSON)
    assert answer.status_code == 413
    assert "longer than 1048576 bytes" in answer.json()["error"]["message"]
    chunks = (b"x" * 2**16 for _ in range(40))  # of unknown length
    assert (
        httpx.post(f"{running.url}/v1/completions", content=chunks, headers=JSON).status_code == 413
    )
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
        " application/json\r\nContent-Length: {}\r\n\r\n"
    )
    with socket.create_connection(running.host_and_port, timeout=10) as raw:  # declared, never sent
        raw.sendall(head.format(10**12).encode())
        assert b" 413 " in raw.recv(4096)
    # the answer survives that the client first sends it all
    with socket.create_connection(running.host_and_port, timeout=10) as raw:
        raw.sendall(head.format(8 * 2**20).encode() + b"x" * (8 * 2**20))
        assert b" 413 " in raw.recv(4096)


def test_a_key_is_asked_for_where_there_is_one():
    with serving(ScriptedEngine(), api_key="secret") as running:
        say(running, "ok")
        for key in ("wrong", "secre", "sécret"):
            answer = httpx.post(
                f"{running.url}/v1/completions",
                json=TEXT,
                headers={"Authorization": f"Bearer {key}".encode()},
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        assert httpx.post(f"{running.url}/v1/completions", content=b"x" * 2**21).status_code == 401
        assert (
            client(running, api_key="secret")
            .completions.create(model=MODEL, prompt="x")
            .choices[0]
            .text
            == "ok"
        )
        assert httpx.get(f"{running.url}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            client(running).models.list()


def test_a_full_queue_says_come_back_later():
    with stalled(queue_limit=2) as running, concurrent.futures.ThreadPoolExecutor() as pool:
        asked = [pool.submit(complete, running) for _ in range(3)]
        running.wait_until(lambda: len(running.engine.running) + len(running.engine.waiting) == 3)
        answer = httpx.post(f"{running.url}/v1/completions", json=TEXT)
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["Retry-After"]) >= 1
        assert metrics(running)["glm_requests_waiting"] == 2
        running.engine.go.set()
        assert [a.result(30).choices[0].text for a in asked] == ["ok"] * 3
        assert complete(running).choices[0].text == "ok"


def test_too_many_requests_at_a_time_are_turned_away():
    with stalled(max_requests=1) as running, concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(complete, running)
        running.wait_until(lambda: running.engine.running)
        answer = httpx.post(f"{running.url}/v1/completions", json=TEXT)
        assert (
            answer.status_code,
            answer.json()["error"]["type"],
            "Retry-After" in answer.headers,
        ) == (503, "server_error", True)
        assert httpx.get(f"{running.url}/health").status_code == 200
        running.engine.go.set()
        assert asked.result(30).choices[0].text == "ok"
