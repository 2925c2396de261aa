"""The durable queue of a whole node: an engine on a tiny model, a broker, SQLite, HTTP and the command line."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import nats
import pytest
from click.testing import CliRunner
from nats.aio.client import Client

from infsvc.cli.queue import queue as queue_command
from infsvc.events import Alert
from tests.nodes import ENDLESS, add_worker, build, connected
from transports.node import Node

SUBJECT = "inference.request.tiny"
QUEUE = "inference.queue.tiny"
SHORT = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
async def node(tmp_path: Path, long_model: Path) -> AsyncIterator[Node]:
    add_worker(tmp_path, "tiny", long_model, CTX_SIZE=16384, QUEUE_MAX_MSGS=16, WORKER_CONCURRENCY=2)
    async with build(tmp_path, "tiny") as started:
        await started.fleet.settled("tiny")
        await connected(started.events)
        yield started


@pytest.fixture
async def client(node: Node) -> AsyncIterator[Client]:
    client = await nats.connect(node.settings.nats_url)
    yield client
    await client.close()


@pytest.fixture
async def http(node: Node) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=node.gateway_url, timeout=30, trust_env=False) as client:
        yield client


def body(req_id: str, **more: Any) -> bytes:
    return json.dumps({"req_id": req_id, "input": "hello", "params": SHORT} | more).encode()


async def test_a_repeat_is_one_execution_and_two_rows(node: Node, client: Client) -> None:
    first = json.loads((await client.request(SUBJECT, body("r"), timeout=20)).data)
    again = json.loads((await client.request(SUBJECT, body("r"), timeout=20)).data)
    assert first == again
    other = json.loads((await client.request(SUBJECT, body("r", input="other"), timeout=20)).data)
    assert other["status"] == 409
    rows = (await node.logs.rows("tiny", limit=10))[::-1]
    assert [(row["req_id"], row["status"]) for row in rows] == [("r", "ok"), ("r", "replayed"), ("r", "rejected")]
    assert rows[0]["response_text"] == rows[1]["response_text"] == first["text"]
    assert (rows[1]["tokens_out"], rows[1]["source"]) == (4, "nats")


async def test_http_and_nats_share_one_depth(node: Node, client: Client, http: httpx2.AsyncClient) -> None:
    worker = node.fleet.get("tiny")
    js = client.jetstream()
    for n in range(10):
        await js.publish(QUEUE, body(f"r{n}", params=ENDLESS))
    while worker.n_waiting != 8:
        await client.flush()
    health = (await http.get("/api/services/tiny")).json()
    assert health["queue_metrics"]["pending_messages"] == 8
    assert health["backpressure_status"] == {"level": "warning", "utilization": 0.5, "threshold": 5}
    many = asyncio.gather(
        *(http.post("/v1/completions", json={"input": "x", "params": SHORT}, timeout=30) for _ in range(12))
    )
    while len(worker.requests) < 11:
        await client.flush()
    assert worker.n_waiting == 16
    assert worker.report().status == "critical"
    [shown] = (await http.get("/api/queue")).json()["queues"]
    assert (shown["model"], shown["waiting"], shown["taken"]) == ("tiny", 7, 3)
    assert (await http.delete("/api/queue/tiny")).json() == {"model": "tiny", "removed": 7}
    for _ in range(3):
        while not any(generation.source == "nats" for generation in worker.requests.values()):
            await client.flush()
        req_id = next(each.req_id for each in worker.requests.values() if each.source == "nats")
        assert (await http.delete(f"/api/requests/{req_id}")).is_success
        while any(each.req_id == req_id for each in worker.requests.values()):
            await client.flush()
    codes = sorted(answer.status_code for answer in await many)
    assert codes == [200] * 8 + [429] * 4
    while worker.n_waiting:
        await client.flush()


async def test_dead_letters_over_http_and_on_the_command_line(
    node: Node, client: Client, http: httpx2.AsyncClient
) -> None:
    events = node.events.subscribe()
    for data in (b"nonsense", b'{"input": "nobody"}'):
        await client.jetstream().publish(QUEUE, data)
    alerts: list[Alert] = []
    async for event in events:
        if isinstance(event, Alert):
            alerts.append(event)
        if len(alerts) == 2:
            break
    events.close()
    listed = (await http.get("/api/dead", params={"model": "tiny"})).json()
    assert listed["total"] == 2
    bodies = {letter["id"]: letter["body"] for letter in listed["dead"]}
    assert sorted(map(str, bodies.values())) == ["nonsense", "{'input': 'nobody'}"]
    assert [letter["id"] for letter in (await http.get("/api/dead?limit=1&after=1")).json()["dead"]] == [2]

    async def infsvc_queue(*arguments: str) -> tuple[int, str]:
        result = await asyncio.to_thread(
            CliRunner().invoke, queue_command, [*arguments, "--url", node.gateway_url], catch_exceptions=False
        )
        return result.exit_code, result.output

    code, table = await infsvc_queue("list")
    assert (code, table.splitlines()[1].split()) == (0, ["tiny", "0", "0", "16", QUEUE])
    assert [line.split()[0] for line in (await infsvc_queue("dead"))[1].splitlines()] == ["ID", "1", "2"]
    assert len(json.loads((await infsvc_queue("dead", "--json", "-m", "tiny"))[1])) == 2
    assert (await infsvc_queue("dead", "-m", "nobody"))[0] == 1
    # What was unreadable is so again.
    assert (await infsvc_queue("replay", "1")) == (0, "dead letter 1 waits for tiny again\n")
    assert (await infsvc_queue("purge", "--dead", "2")) == (0, "dead letter 2 is forgotten\n")
    assert (await infsvc_queue("purge", "tiny")) == (0, "0 requests for tiny were removed\n")
    assert (await infsvc_queue("purge"))[0] == 2
    code, told = await infsvc_queue("replay", "2")
    assert (code, "there is no dead letter 2" in told) == (1, True)
    while (await http.get("/api/dead")).json()["total"] != 1:
        pass


@pytest.mark.parametrize(
    ("method", "path", "status", "param"),
    [
        ("GET", "/api/dead?limit=0", 400, "limit"),
        ("GET", "/api/dead?after=-1", 400, "after"),
        ("GET", "/api/dead?model=nobody", 404, "model"),
        ("GET", "/api/dead?surprise=1", 400, "surprise"),
        ("POST", "/api/dead/x/replay", 400, "id"),
        ("POST", "/api/dead/99/replay", 404, "id"),
        ("DELETE", "/api/dead/99", 404, "id"),
        ("DELETE", "/api/queue/nobody", 404, "model"),
    ],
)
async def test_bad_questions_about_dead_letters(
    http: httpx2.AsyncClient, method: str, path: str, status: int, param: str
) -> None:
    answer = await http.request(method, path)
    assert (answer.status_code, answer.json()["param"]) == (status, param), answer.text


async def test_without_a_broker_the_queue_says_so(tmp_path: Path, long_model: Path) -> None:
    add_worker(tmp_path, "tiny", long_model)
    async with build(tmp_path, "tiny", embedded_nats="off") as node:
        await node.fleet.settled("tiny")
        async with httpx2.AsyncClient(base_url=node.gateway_url, timeout=30, trust_env=False) as http:
            answer = await http.get("/api/dead")
            assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable")


async def test_work_that_runs_at_the_end_of_a_node_is_done_by_its_next_start(
    tmp_path: Path, long_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transports.node.GRACE_S", 0.05)
    add_worker(tmp_path, "tiny", long_model, WORKER_CONCURRENCY=1, CTX_SIZE=4096)
    bodies = {
        req_id: body(req_id, params=ENDLESS | {"max_tokens": n}) for req_id, n in (("first", 1500), ("second", 4))
    }
    url = ""
    for start in range(2):
        settings = {"nats_url": url} if url else {}
        async with build(tmp_path, "tiny", **settings) as node:
            url = node.settings.nats_url
            await node.fleet.settled("tiny")
            await connected(node.events)
            client = await nats.connect(url)
            try:
                if start == 0:
                    for asked in bodies.values():
                        await client.jetstream().publish(QUEUE, asked)
                    while not any(generation.running for generation in node.service.live()):
                        await client.flush()
                else:
                    # It may be done before anybody can listen; who asks again is given the answer, now or soon.
                    for req_id, asked in bodies.items():
                        answer = json.loads((await client.request(SUBJECT, asked, timeout=30)).data)
                        assert (answer["req_id"], answer["finish_reason"]) == (req_id, "length")
            finally:
                await client.close()
    with sqlite3.connect(tmp_path / "data/logs/tiny.sqlite") as db:
        rows = db.execute("SELECT req_id, status FROM requests WHERE status='ok' ORDER BY req_id").fetchall()
    db.close()
    assert rows == [("first", "ok"), ("second", "ok")]
