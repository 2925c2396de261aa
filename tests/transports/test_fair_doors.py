"""Doors share an engine: while HTTP keeps it full, what waits in the durable queue is answered all the same.

No timing: the answers that others get until it comes are counted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import nats
import pytest
from nats.aio.client import Client

from tests.nodes import add_worker, build, connected
from transports.node import Node

N_CLIENTS, N_EACH = 3, 8
"""Callers over HTTP; each of them asks again as soon as it has its answer."""
AT_MOST, END = 1000, 2000
"""Others' answers until the durable one is there; and when the flood gives up, so that a starved request ends too."""
N_EARLY = 3
"""So many a node has asked the broker for before the flood: these come whatever it has room for later."""
SHORT = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture
async def node(tmp_path: Path, long_model: Path) -> AsyncIterator[Node]:
    # The line is as long as the flood: nothing over HTTP is refused.
    add_worker(tmp_path, "tiny", long_model, CTX_SIZE=1024, WORKER_CONCURRENCY=2, QUEUE_MAX_MSGS=N_CLIENTS * N_EACH)
    async with build(tmp_path, "tiny") as started:
        await started.fleet.settled("tiny")
        await connected(started.events)
        yield started


@pytest.fixture
async def client(node: Node) -> AsyncIterator[Client]:
    client = await nats.connect(node.settings.nats_url)
    yield client
    await client.close()


@asynccontextmanager
async def flood(node: Node) -> AsyncIterator[Callable[[], int]]:
    """A steady overload from several clients; how many answers it has had."""
    counted = itertools.count(1)
    n_answers = 0
    over = asyncio.Event()

    async def ask(http: httpx2.AsyncClient, name: str) -> None:
        nonlocal n_answers
        while not over.is_set() and n_answers < END:
            answer = await http.post(
                "/v1/completions", json={"input": "hello", "params": SHORT}, headers={"X-Client-ID": name}
            )
            if answer.is_success:
                n_answers = next(counted)

    limits = httpx2.Limits(max_connections=N_CLIENTS * N_EACH)
    async with (
        httpx2.AsyncClient(base_url=node.gateway_url, timeout=60, trust_env=False, limits=limits) as http,
        asyncio.TaskGroup() as callers,
    ):
        for n in range(N_CLIENTS * N_EACH):
            callers.create_task(ask(http, f"client-{n % N_CLIENTS}"))
        while node.fleet.get("tiny").n_in_line < N_CLIENTS * N_EACH - 8:
            await asyncio.sleep(0.005)
        try:
            yield lambda: n_answers
        finally:
            over.set()


def body(req_id: str) -> bytes:
    return json.dumps({"req_id": req_id, "input": "hello", "params": SHORT}).encode()


async def test_a_durable_request_is_answered_under_a_steady_flood_over_http(node: Node, client: Client) -> None:
    async with flood(node) as n_answers:
        for n in range(N_EARLY + 3):
            before = n_answers()
            answer: dict[str, Any] = json.loads(
                (await client.request("inference.request.tiny", body(f"r{n}"), timeout=60)).data
            )
            assert (answer["req_id"], answer.get("finish_reason")) == (f"r{n}", "length"), answer
            assert n_answers() - before <= AT_MOST
    assert n_answers() < END


async def test_what_is_put_into_the_queue_gets_in_though_the_line_is_full(node: Node, client: Client) -> None:
    answers = await client.subscribe("inference.reply.>")
    async with flood(node) as n_answers:
        before = n_answers()
        for n in range(N_CLIENTS * N_EACH):
            await client.jetstream().publish("inference.queue.tiny", body(f"q{n}"))
        for _ in range(N_EARLY + 3):
            answer = json.loads((await answers.next_msg(timeout=60)).data)
            assert answer.get("finish_reason") == "length", answer
            assert n_answers() - before <= AT_MOST
            before = n_answers()
    for _ in range(N_CLIENTS * N_EACH - N_EARLY - 3):
        assert "text" in json.loads((await answers.next_msg(timeout=60)).data)
