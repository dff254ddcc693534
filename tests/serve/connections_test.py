"""Connections that say nothing, or little; clients that stop sending; web pages; and what common
clients send.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import httpx
import pytest

from glm_jax.serve import connections
from tests.serve.serving import (
    CHAT,
    MODEL,
    TEXT,
    USER,
    ScriptedEngine,
    assert_idle,
    chat,
    complete,
    say,
    serving,
    stalled,
    tiny_engine,
    tiny_tokenizer,
)  # fmt: skip

HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: {}\r\n\r\n"
)


@pytest.fixture(scope="module")
def running():
    with serving(ScriptedEngine(context=2048, num_rows=4)) as running:
        say(running, "ok")
        yield running


@pytest.fixture(scope="module")
def tiny():
    with serving(tiny_engine()) as running:
        yield running


def closed_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: "]
)
def test_a_head_has_a_deadline(running, sent):
    running.server.connections.head_seconds = 0.4
    try:
        with socket.create_connection(running.host_and_port) as silent:
            silent.sendall(sent)
            for _ in range(6):  # a byte now and then is no reason to wait for longer
                time.sleep(0.1)
                if sent.endswith(b": "):
                    try:
                        silent.sendall(b"a")
                    except (BrokenPipeError, ConnectionResetError):
                        break
            assert closed_within(silent, 0.5)
    finally:
        running.server.connections.head_seconds = 15
    assert not running.server.connections.silent


def test_a_second_request_on_a_connection_has_a_deadline_too(running):
    running.server.connections.head_seconds = 0.4
    try:
        with socket.create_connection(running.host_and_port) as kept:
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += kept.recv(4096)
            kept.sendall(b"GET /hea")
            assert closed_within(kept, 2)
    finally:
        running.server.connections.head_seconds = 15


def test_the_oldest_silent_connection_makes_room(running):
    before, running.server.connections.most = running.server.connections.most, 20
    silent = [socket.create_connection(running.host_and_port) for _ in range(60)]
    try:
        for _ in range(5):
            started = time.monotonic()
            assert httpx.get(f"{running.url}/health").status_code == 200
            assert time.monotonic() - started < 1
        assert all(closed_within(s, 1) for s in silent[:30])
        assert not closed_within(silent[-1], 0.05)
        assert running.server.connections.num_open <= 20
    finally:
        running.server.connections.most = before
        for s in silent:
            s.close()
    running.wait_until(lambda: not running.server.connections.num_open)


def test_few_descriptors_are_enough_however_many_connect():
    """In a process of its own, with 200: it must answer, and not fill its log."""
    program = """if True:
        import resource, socket, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        from tests.serve.serving import ScriptedEngine, serving, say
        with serving(ScriptedEngine()) as running:
            say(running, "ok")
            print(*running.host_and_port, flush=True)
            sys.stdin.readline()
    """
    server = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    host, port = server.stdout.readline().split()
    silent = [socket.create_connection((host, int(port))) for _ in range(230)]
    time.sleep(0.5)
    for _ in range(3):
        assert httpx.get(f"http://{host}:{port}/health", timeout=1).status_code == 200
    for s in silent:
        s.close()
    _, log = server.communicate("\n", timeout=60)
    assert server.returncode == 0 and len(log) < 5000, log


def test_the_limit_of_connections_leaves_files_for_everything_else(monkeypatch):
    for files in (100, 200, 1024, 65536):
        monkeypatch.setattr(
            connections.resource, "getrlimit", lambda _, files=files: (files, files)
        )
        most, backlog = connections.connection_limits()
        assert most >= 8 and most + backlog + 20 <= files


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_only_stops_sending_gets_its_answer(running, version):
    """As `nc -N` does. An HTTP/1.1 client may get interim responses first."""
    running.engine.go.clear()
    body = json.dumps(TEXT).encode()
    with socket.create_connection(running.host_and_port) as half:
        half.sendall(HEAD.format(len(body)).replace("1.1", version).encode() + body)
        half.shutdown(socket.SHUT_WR)
        time.sleep(0.6)
        running.engine.go.set()
        answer, part = b"", b"x"
        while part:
            part = half.recv(65536)
            answer += part
    assert b"200 OK" in answer and b'"ok"' in answer
    assert answer.startswith(b"HTTP/1.1 102" if version == "1.1" else b"HTTP/1.1 200")
    assert_idle(running)


def test_a_client_that_is_gone_frees_its_row():
    with stalled() as running:
        for body in (TEXT, TEXT | {"stream": True}):
            data = json.dumps(body).encode()
            gone = socket.create_connection(running.host_and_port)
            gone.sendall(HEAD.format(len(data)).encode() + data)
            running.wait_until(lambda: running.engine.running)
            gone.close()
            assert_idle(running)


# --- web pages ---


def post(running, headers=None, content=None):
    given = {"Content-Type": "application/json"} | (headers or {})
    return httpx.post(
        f"{running.url}/v1/completions", content=content or json.dumps(TEXT).encode(), headers=given
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "10.0.0.1"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
    ],
)
def test_a_web_page_cannot_use_a_server_without_a_key(running, headers, status):
    assert post(running, headers).status_code == status
    if "Host" in headers:
        assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == status
        assert httpx.get(f"{running.url}/health", headers=headers).status_code == 200


def test_its_own_page_is_no_stranger(running):
    host, port = running.host_and_port
    assert post(running, {"Origin": f"http://{host}:{port}"}).status_code == 200


def test_cors_is_off_unless_configured_and_then_right(running):
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    refused = httpx.options(f"{running.url}/v1/completions", headers=asked)
    assert refused.status_code in (403, 405) and not any(
        h.startswith("access-control") for h in refused.headers
    )
    with serving(ScriptedEngine(), cors_origins=("https://app.example",)) as open_one:
        say(open_one, "ok")
        allowed = httpx.options(f"{open_one.url}/v1/completions", headers=asked)
        assert (
            allowed.status_code == 200
            and allowed.headers["access-control-allow-origin"] == "https://app.example"
        )
        answer = post(open_one, {"Origin": "https://app.example"})
        assert (
            answer.status_code == 200
            and answer.headers["access-control-allow-origin"] == "https://app.example"
        )
        assert "origin" in answer.headers["vary"].lower()
        wrong = post(open_one, {"Origin": "https://app.example"}, b"{")
        assert (
            wrong.status_code == 400
            and wrong.headers["access-control-allow-origin"] == "https://app.example"
        )
        stranger = post(open_one, {"Origin": "https://evil.example"})
        assert stranger.status_code == 403 and "access-control-allow-origin" not in stranger.headers


def test_a_key_makes_the_name_of_the_server_its_own_affair():
    with serving(ScriptedEngine(), api_key="secret") as running:
        say(running, "ok")
        for scheme in ("Bearer", "bearer", "BEARER"):
            answer = post(running, {"Authorization": f"{scheme} secret", "Host": "glm.example"})
            assert answer.status_code == 200
        assert post(running, {"Authorization": "Basic secret"}).status_code == 401


# --- what clients send ---

CALL = {"id": "a", "type": "function", "function": {"name": "now"}}
TOOL = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
        {"messages": [USER, {"role": "assistant", "content": "a", "reasoning": "why"}, USER]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "content": "x"}]},
        {"messages": [USER,
                      {"role": "assistant",
                       "tool_calls": [CALL | {"function": {"name": "now", "arguments": ""}}]},
                       {"role": "tool", "tool_call_id": "a",
                        "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [USER,
                      {"role": "assistant", "content": "",
                       "tool_calls": [CALL | {"function": {"name": "now", "arguments": None}}]},
                       {"role": "tool", "content": "x"}]},
        {"messages": [USER | {"name": "ann"},
                      {"role": "assistant", "content": "a", "refusal": None, "annotations": [],
                       "audio": None, "function_call": None}, USER]},
        {"stream": True, "stream_options": {"include_obfuscation": False, "include_usage": True}},
        {"reasoning_effort": "low"},
        {"top_k": -1, "min_p": 0, "top_p": 0, "repetition_penalty": 1.0},
        {"stop": ""},
        {"stop": []},
        {"seed": -1},
        {"seed": 1764190000123},
        {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
        {"n": 1, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "u",
         "store": False, "metadata": {}},
        {"skip_special_tokens": True, "spaces_between_special_tokens": True, "ignore_eos": False},
        {"response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto",
         "prompt_cache_key": "k"},
    ],
)  # fmt: skip
def test_what_common_clients_send_is_taken(running, fields):
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | fields)
    assert answer.status_code == 200, answer.text


def test_no_reasoning_effort_is_no_thinking(running):
    chat(running, reasoning_effort="none")
    assert tiny_tokenizer().decode(running.engine.prompts[-1]).endswith("</think>")


def test_a_model_is_found_by_its_name(running):
    assert httpx.get(f"{running.url}/v1/models/{MODEL}").json()["id"] == MODEL
    assert httpx.get(f"{running.url}/v1/models/other").status_code == 404
    with serving(ScriptedEngine(), model_name="zai-org/GLM-4.5") as other:
        for spelt in ("zai-org/GLM-4.5", "zai-org%2FGLM-4.5"):
            assert httpx.get(f"{other.url}/v1/models/{spelt}").json()["id"] == "zai-org/GLM-4.5"


def test_an_ill_typed_argument_reaches_the_client_as_its_text(running):
    parameters = {
        "properties": {
            "a": {"type": "boolean"},
            "b": {"type": "integer"},
            "c": {"type": "object"},
            "d": {"type": "number"},
        }
    }
    tool = {"type": "function", "function": {"name": "w", "parameters": parameters}}
    given = {"a": "True", "b": "1,000", "c": "{'a': 1}", "d": ""}
    arguments = "".join(
        f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in given.items()
    )
    say(running, f"<think></think><tool_call>w\n{arguments}</tool_call><|observation|>")
    try:
        choice = chat(running, tools=[tool]).choices[0]
    finally:
        say(running, "ok")
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == given


def test_bytes_of_tokens_make_the_output_even_of_broken_characters(running):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("é変😀ö")
    running.engine.script = [*ids[:-1], tokenizer.eos_id]  # the last character is broken
    try:
        choice = chat(running, logprobs=True).choices[0]
    finally:
        say(running, "ok")
    assert (
        len(ids) > 4
        and b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        == "é変😀ö".encode()[:-1]
    )


# --- what the engine does for them ---


def test_a_schema_is_kept(tiny):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(3):
        choice = chat(
            tiny,
            response_format=wanted,
            seed=seed,
            max_tokens=90,
            extra_body={"thinking": {"type": "disabled"}},
        ).choices[0]
        if choice.finish_reason == "stop":
            found = json.loads(choice.message.content)
            assert found.keys() == {"n", "ok"} and isinstance(found["ok"], bool)
        else:
            assert choice.message.content.startswith("{")


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ("f", "g")), ({"type": "function", "function": {"name": "g"}}, ("g",))],
)
@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_a_required_tool_can_only_be_called(running, choice, names, thinking, monkeypatch):
    """What the engine is asked for lets through the calls of the tools, and nothing else."""
    parameters = {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"]}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name in ("f", "g")
    ]
    asked, submit = [], running.engine.submit
    monkeypatch.setattr(
        running.engine,
        "submit",
        lambda prompt, params: asked.append(params) or submit(prompt, params),
    )
    chat(
        running,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=False,
        extra_body={"thinking": {"type": thinking}},
    )
    opening = "<think>why</think>" if thinking == "enabled" else ""

    def is_let_through(text: str) -> bool:
        state = asked[0].constraint.start()
        for token in tiny_tokenizer().encode(text, allow_special=True):
            if not state.mask()[token // 32] >> (token % 32) & 1:
                return False
            state.accept(token)
        return state.finished or bool(
            state.mask()[tiny_tokenizer().eos_id // 32] >> (tiny_tokenizer().eos_id % 32) & 1
        )

    call = "<tool_call>{}\n<arg_key>x</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
    assert [
        name for name in ("f", "g", "h") if is_let_through(opening + call.format(name, "a"))
    ] == list(names)
    for text in (
        "no",
        opening + call.format("g", "c"),
        opening + "<tool_call>g\n</tool_call>",
        opening + call.format("g", "a") * 2,
        opening,
    ):
        assert not is_let_through(text), text


def test_log_probabilities_of_alternatives_and_of_the_prompt(tiny):
    entries = (
        chat(tiny, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0)
        .choices[0]
        .logprobs.content
    )
    assert all(
        len(e.top_logprobs) == 3 and e.top_logprobs[0].logprob == pytest.approx(e.logprob, abs=1e-4)
        for e in entries
    )
    whole = complete(tiny, prompt="def add(a, b)", echo=True, logprobs=2, max_tokens=0).choices[0]
    assert whole.text == "def add(a, b)" and "".join(whole.logprobs.tokens) == whole.text
    assert (
        all(isinstance(x, float) for x in whole.logprobs.token_logprobs)
        and len(whole.logprobs.top_logprobs[1]) == 2
    )
    ids = tiny_tokenizer().encode("def add(a, b)")
    by_ids = complete(tiny, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0).choices[
        0
    ]
    assert by_ids.logprobs.token_logprobs[0] is None and len(by_ids.logprobs.tokens) == len(ids) + 1
    assert by_ids.text.startswith("def add(a, b)") and whole.logprobs.text_offset[:2] == [
        0,
        len(whole.logprobs.tokens[0]),
    ]


def test_a_stop_token_is_an_entry_beside_an_echoed_prompt(tiny):
    """lm-eval takes the entries of a prompt to be all but the last."""
    ends = {str(tiny_tokenizer().eos_id): 100}
    found = complete(
        tiny, prompt="def add", echo=True, logprobs=1, max_tokens=1, temperature=0, logit_bias=ends
    ).choices[0]
    assert found.finish_reason == "stop"
    assert (
        found.text == "def add"
        and len(found.logprobs.tokens) == len(tiny_tokenizer().encode("def add")) + 1
    )


def test_a_begun_answer_is_continued(tiny):
    messages = [USER, {"role": "assistant", "content": "def add("}]
    body = {
        "continue_final_message": True,
        "add_generation_prompt": False,
        "thinking": {"type": "disabled"},
    }
    continued = chat(tiny, messages=messages, max_tokens=1, extra_body=body).usage.prompt_tokens
    begun = chat(
        tiny, messages=[USER], max_tokens=1, extra_body={"thinking": {"type": "disabled"}}
    ).usage.prompt_tokens
    assert continued == begun + len(tiny_tokenizer().encode("\ndef add("))
    thinking = [USER, {"role": "assistant", "content": "", "reasoning_content": "def add("}]
    found = (
        chat(tiny, messages=thinking, max_tokens=8, extra_body={"continue_final_message": True})
        .choices[0]
        .message
    )
    assert found.reasoning_content and not found.content


def test_penalties_and_bias_change_what_is_sampled(tiny):
    token = tiny_tokenizer().encode("a")[0]
    only = complete(tiny, max_tokens=6, temperature=0, logit_bias={str(token): 100}).choices[0].text
    assert only == "a" * 6
    other = (
        complete(
            tiny,
            max_tokens=6,
            temperature=0,
            logit_bias={str(token): 1},
            frequency_penalty=2.0,
            presence_penalty=2.0,
        )
        .choices[0]
        .text
    )
    assert other.count("a") < 6
