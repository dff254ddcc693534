"""Many clients at once that behave as clients do: they stream, wait, stop early, hang up, ask for
nonsense.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import random
import time

import httpx
import psutil

from tests.serve.serving import MODEL, Running, tiny_state

CLIENTS = 16  # at a time
PATIENCE = 60  # seconds for an answer
WORDS = ("def ", "add", "(a, b)", "größer ", "変数", "😀", "\n", "<think>", "return ")


@dataclasses.dataclass
class Report:
    """What became of the requests, and of the server."""

    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    answered_twice: int = 0
    pages_lost: int = 0
    swaps: int = 0
    seconds: float = 0.0
    # bytes of this process, server and clients: start, middle, end
    rss: list[int] = dataclasses.field(default_factory=list)
    health_seconds: float = 0.0  # the longest that /health took
    health_answers: int = 0
    # clients that stopped sending: what they got
    half_closed: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def soak(
    running: Running, num_requests: int, num_swaps: int, seed: int = 0, num_nuisances: int = 0
) -> Report:
    """Sends the requests, swaps weights in between, and waits until the engine is idle.

    num_nuisances: connections beside them that say nothing, or a byte now and then, or stop sending
    once they have asked.
    """
    report, start = Report(), time.monotonic()
    asyncio.run(_soak(running, num_requests, num_swaps, random.Random(seed), report, num_nuisances))
    running.wait_until(lambda: running.engine.idle and not running.service.status.running)
    report.pages_lost = running.engine.config.num_pages - running.engine.num_free_pages
    report.seconds = time.monotonic() - start
    return report


async def _soak(
    running: Running,
    num_requests: int,
    num_swaps: int,
    rng: random.Random,
    report: Report,
    num_nuisances: int,
):
    ids, places = collections.Counter(), asyncio.Semaphore(CLIENTS)
    swap_at = {num_requests * (i + 1) // (num_swaps + 1) for i in range(num_swaps)}
    states = [tiny_state(seed) for seed in range(2)]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)

    async def one(number: int, client: httpx.AsyncClient, own: random.Random):
        async with places:
            if number in swap_at:
                swap = running.service.set_weights(states[number % 2], recompute=own.random() < 0.5)
                await asyncio.wrap_future(swap)
                report.swaps += 1
            if number in (0, num_requests // 2):
                report.rss.append(psutil.Process().memory_info().rss)
            try:
                async with asyncio.timeout(PATIENCE):
                    report.outcomes[await _ask(client, running.url, own, ids)] += 1
            except TimeoutError:
                report.outcomes[f"no answer within {PATIENCE} s"] += 1

    kinds = (_says_nothing, _drips, _stops_sending)
    nuisances = [asyncio.create_task(kinds[i % 3](running, report)) for i in range(num_nuisances)]
    nuisances.append(asyncio.create_task(_asks_for_health(running, report)))
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        await asyncio.gather(
            *(one(i, client, random.Random(rng.random())) for i in range(num_requests))
        )
    for task in nuisances:
        task.cancel()
    ended = await asyncio.gather(*nuisances, return_exceptions=True)
    for error in ended:
        if not isinstance(error, asyncio.CancelledError):
            raise error
    report.rss.append(psutil.Process().memory_info().rss)
    report.answered_twice = sum(count > 1 for count in ids.values())


async def _says_nothing(running: Running, report: Report):
    """Again and again, whenever it is closed."""
    while True:
        reader, writer = await asyncio.open_connection(*running.host_and_port)
        try:
            await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def _drips(running: Running, report: Report):
    """A head that never ends."""
    while True:
        _, writer = await asyncio.open_connection(*running.host_and_port)
        try:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Drip: ")
            while True:
                await asyncio.sleep(0.5)
                writer.write(b"a")
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def _stops_sending(running: Running, report: Report):
    """Asks, closes its side, and waits for the answer, which has to come whole."""
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 3}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
        f" application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    while True:
        reader, writer = await asyncio.open_connection(*running.host_and_port)
        try:
            writer.write(head.encode() + body)
            writer.write_eof()
            answer = await reader.read()
            final = answer.rpartition(b"HTTP/1.1 ")[2]
            whole = final.endswith(b"}") and json.loads(final.partition(b"\r\n\r\n")[2])
            report.half_closed[final.split()[0].decode() if whole else "no answer"] += 1
        except ConnectionError:
            report.half_closed["reset"] += 1
        finally:
            writer.close()
        await asyncio.sleep(2)


async def _asks_for_health(running: Running, report: Report):
    async with httpx.AsyncClient(timeout=None) as client:
        while True:
            started = time.monotonic()
            try:
                assert (await client.get(f"{running.url}/health")).status_code == 200
                report.health_answers += 1
            finally:  # also of an answer that never came
                report.health_seconds = max(report.health_seconds, time.monotonic() - started)
            await asyncio.sleep(0.2)


def _request(rng: random.Random) -> tuple[str, dict]:
    """Path and body of a request of random kind and length."""
    text = "".join(rng.choices(WORDS, k=rng.randrange(12)))
    body = {
        "model": MODEL,
        "n": rng.choice((1, 1, 1, 2)),
        "seed": rng.randrange(100),
        "temperature": rng.choice((0, 1.0)),
    }
    body["max_tokens"] = rng.randrange(1, 60)
    if rng.random() < 0.3:
        body["stop"] = rng.choices(["e", "u", "\n", "re", "xyz"], k=2)
    if rng.random() < 0.5:
        return "/v1/completions", body | {"prompt": text}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


async def _ask(
    client: httpx.AsyncClient, url: str, rng: random.Random, ids: collections.Counter
) -> str:
    """One request; what became of it. ids: how often each answer ended."""
    path, body = _request(rng)
    manner = rng.choices(("streams", "waits", "hangs up", "gives up", "errs"), (4, 3, 2, 2, 1))[0]
    if manner == "errs":
        answer = await client.post(url + path, json=body | {"temperature": -1})
        return f"bad: {answer.status_code}"
    if manner in ("waits", "gives up"):
        try:
            async with asyncio.timeout(rng.uniform(0, 0.2) if manner == "gives up" else PATIENCE):
                answer = await client.post(url + path, json=body)
        except TimeoutError:
            return "gave up waiting"
        if answer.status_code == 200:
            whole = answer.json()
            assert len(whole["choices"]) == body["n"]
            ids[whole["id"]] += 1
        return f"answered whole: {answer.status_code}"
    return await _stream(
        client, url + path, body, rng.randrange(1, 6) if manner == "hangs up" else None, ids
    )


async def _stream(
    client: httpx.AsyncClient,
    url: str,
    body: dict,
    last_event: int | None,
    ids: collections.Counter,
) -> str:
    """A streamed request. last_event: the one after which the client hangs up."""
    ended, num_events = collections.Counter(), 0
    async with client.stream("POST", url, json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return f"streamed: {answer.status_code}"
        async for line in answer.aiter_lines():
            if not line:
                continue
            event = line.removeprefix("data: ")
            if event == "[DONE]":
                ended["done"] += 1
                continue
            chunk = json.loads(event)
            if "error" in chunk:
                return f"error in a stream: {chunk['error']['type']}"
            ended.update(c["index"] for c in chunk["choices"] if c["finish_reason"])
            ended["behind the end"] += ended["done"]
            num_events += 1
            if num_events == last_event:
                return "hung up"
    complete = ended["done"] == 1 and all(ended[i] == 1 for i in range(body["n"]))
    ids[chunk["id"]] += 1 + (ended["behind the end"] > 0 or max(ended.values()) > 1)
    return "streamed to the end" if complete else "streamed, but not to the end"
