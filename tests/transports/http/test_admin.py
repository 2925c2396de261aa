"""Logs, services, live requests, events, load and unload."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from engine.capabilities import CapabilityClaim
from infsvc.errors import StartError
from infsvc.events import Alert, ModelStateChanged
from infsvc.types import Capability, ModelState
from tests.transports.http.conftest import RawClient, ScriptedNode
from transports.http import admin


async def test_logs_are_audit_rows_newest_first(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    for req_id in ("a", "b", "c"):
        await port.post("/v1/completions", json={"input": "x", "req_id": req_id})
    await port.post("/v1/completions", json={"input": "x " * 2000, "req_id": "refused"})
    await node.logged()

    async def ids(query: str) -> list[str]:
        response = await port.get(f"/logs{query}")
        assert response.status_code == 200
        return [row["req_id"] for row in response.json()["rows"]]

    assert await ids("") == ["refused", "c", "b", "a"]
    assert await ids("?limit=2&model=demo") == ["refused", "c"]
    assert await ids("?status=ok&limit=1") == ["c"]
    assert await ids(f"?since={time.time() + 60}") == []
    assert len(await ids("?since=2020-01-01T00:00:00Z")) == 4
    assert len(await ids("?since=2020-01-01T00:00:00%2B02:00")) == 4
    assert await ids("?since=2120-01-01T00:00:00+02:00") == []
    (row,) = (await port.get("/logs?status=rejected")).json()["rows"]
    assert row["error"].startswith("context_length_exceeded")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("limit=-1", "limit"),
        ("limit=%D9%A1", "limit"),
        ("status=fine", "status"),
        ("since=yesterday", "since"),
        ("since=nan", "since"),
        ("since=inf", "since"),
        ("since=2020-01-01T00:00:00", "since"),
        ("since=", "since"),
        ("what=1", "what"),
        ("limit=1&limit=2", "limit"),
        ("model=nomic-embed-v1.5", "model"),
    ],
)
async def test_a_wrong_question_to_the_logs_is_named(port: httpx2.AsyncClient, query: str, param: str) -> None:
    response = await port.get(f"/logs?{query}")
    assert (response.status_code, response.json()["param"]) == (400, param)


async def test_the_gateways_logs_need_a_model_unless_one_is_ready(
    node: ScriptedNode, gateway: httpx2.AsyncClient
) -> None:
    assert (await gateway.get("/logs")).json() == {"rows": []}
    assert (await gateway.get("/logs?model=nomic-embed-v1.5")).json() == {"rows": []}
    assert (await gateway.get("/logs?model=nope")).status_code == 404
    node.make_ready("nomic-embed-v1.5")
    assert (await gateway.get("/logs")).json()["param"] == "model"


async def test_services_are_health_documents_with_evidence(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    node.demo.claims = (CapabilityClaim(Capability.TEXT_GENERATION, True, "causal"),)
    services = (await gateway.get("/api/services")).json()["services"]
    assert [service["model_name"] for service in services] == ["demo", "nomic-embed-v1.5"]
    demo = services[0]
    assert (demo["status"], demo["capabilities"], demo["node"]) == ("online", ["text-generation"], "testnode")
    assert demo["claims"] == [{"capability": "text-generation", "present": True, "evidence": "causal"}]
    assert (demo["engine"]["max_batch_sequences"], demo["engine"]["mean_batch_sequences"]) == (3, 2.5)
    assert demo["first_seen"] == node.start_time <= demo["last_seen"]
    assert 0 <= demo["uptime"] < 60e9
    assert 0 <= demo["response_time_ms"] < 1000


async def test_one_service_is_found_by_a_name_with_dots(gateway: httpx2.AsyncClient) -> None:
    assert (await gateway.get("/api/services/nomic-embed-v1.5")).json()["status"] == "offline"
    missing = await gateway.get("/api/services/nope")
    assert (missing.status_code, missing.json()["code"]) == (404, "model_not_found")
    assert (await gateway.get("/api/services?x=1")).status_code == 400


async def test_requests_show_what_runs_and_waits_and_can_be_cancelled(
    node: ScriptedNode, gateway: httpx2.AsyncClient
) -> None:
    node.engine.answer = None
    replies = []
    for req_id in ("runs", "waits/1", "waits2"):
        body = {"input": "x y", "req_id": req_id}
        replies.append(asyncio.create_task(gateway.post("/v1/completions", json=body)))
        sequence = await node.engine.until_submitted()
        if req_id == "runs":
            node.engine.start(sequence)
            node.engine.emit(sequence, "a")
    live = (await gateway.get("/api/requests")).json()["requests"]
    assert all(0 <= entry.pop("age_ms") < 60_000 for entry in live)
    shown = [(each["req_id"], each["state"], each["position"], each["tokens_out"]) for each in live]
    assert shown == [("runs", "running", 0, 1), ("waits/1", "waiting", 1, 0), ("waits2", "waiting", 2, 0)]
    assert {(each["model"], each["source"]) for each in live} == {("demo", "http")}
    for entry in live:
        response = await gateway.delete(f"/api/requests/{entry['req_id']}")
        assert response.json() == {"req_id": entry["req_id"], "cancelled": True}
    assert [(await reply).json()["finish_reason"] for reply in replies] == ["cancelled"] * 3
    assert (await gateway.get("/api/requests")).json() == {"requests": []}
    missing = await gateway.delete("/api/requests/runs")
    assert (missing.status_code, missing.json()["code"]) == (404, "request_not_found")


async def test_a_load_begins_and_answers_at_once(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    for content, force in ((b"", False), (b"{}", False), (b'{"force": true}', True)):
        response = await gateway.post("/api/models/nomic-embed-v1.5/load", content=content)
        assert response.status_code == 202
        assert response.json() == {"model": "nomic-embed-v1.5", "state": "loading"}
        assert node.loads.pop() == ("nomic-embed-v1.5", force)
    assert (await gateway.post("/api/models/nope/load")).status_code == 404


@pytest.mark.parametrize(("content", "param"), [(b'{"force": 1}', "force"), (b'{"x": 1}', "x"), (b"[]", None)])
async def test_a_wrong_load_is_named(gateway: httpx2.AsyncClient, content: bytes, param: str | None) -> None:
    response = await gateway.post("/api/models/demo/load", content=content)
    assert (response.status_code, response.json().get("param")) == (400, param)


async def test_a_load_whose_port_is_taken_says_so(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    node.load_error = StartError("127.0.0.1:5778 is taken")
    response = await gateway.post("/api/models/demo/load")
    assert (response.status_code, response.json()["error"]) == (409, "127.0.0.1:5778 is taken")


async def test_an_unload_answers_when_it_is_done(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    response = await gateway.post("/api/models/demo/unload")
    assert (response.status_code, response.json()) == (200, {"model": "demo", "state": "on_disk"})
    assert (await gateway.post("/api/models/nope/unload")).status_code == 404


async def test_an_unload_over_the_models_own_port_answers_before_it_closes(
    node: ScriptedNode, port: httpx2.AsyncClient
) -> None:
    closed = asyncio.Event()

    async def close() -> None:
        await port.server.close()  # type: ignore[attr-defined]
        closed.set()

    node.on_unload = close
    response = await port.post("/api/models/demo/unload")
    assert (response.status_code, response.json()) == (200, {"model": "demo", "state": "on_disk"})
    await asyncio.wait_for(closed.wait(), 5)


@asynccontextmanager
async def watching(client: httpx2.AsyncClient) -> AsyncIterator[AsyncIterator[str]]:
    async with client.stream("GET", "/api/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield response.aiter_lines()


async def next_event(lines: AsyncIterator[str]) -> tuple[str, Any]:
    kind, data, empty = [await anext(lines) for _ in range(3)]
    assert empty == ""
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_events_are_sent_as_they_happen(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    async with watching(gateway) as lines:
        node.demo.move(ModelState.DRAINING, "asked")
        kind, event = await next_event(lines)
        assert kind == event["type"] == "model.state"
        assert (event["state"], event["model"], event["reason"], event["node"]) == (
            "draining",
            "demo",
            "asked",
            "testnode",
        )
        assert (await next_event(lines))[0] == "log"


async def test_events_that_were_lost_are_told_of(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    async with watching(gateway) as lines:
        # One turn of the loop's: the reader cannot keep up.
        for _ in range(1003):
            node.events.publish(ModelStateChanged(model="demo", state=ModelState.READY))
        assert await anext(lines) == ": 3 events lost: read faster"


async def test_quiet_events_send_a_comment(gateway: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "QUIET_S", 0.01)
    async with watching(gateway) as lines:
        assert await anext(lines) == ": quiet"


async def test_events_end_when_the_node_stops(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    async with watching(gateway) as lines:
        node.events.publish(Alert(level="critical", msg="goodbye"))
        node.stopping.set()
        assert (await next_event(lines))[1]["msg"] == "goodbye"
        async with asyncio.timeout(2):
            assert [line async for line in lines] == []


async def test_a_watcher_that_goes_leaves_the_bus(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    left = asyncio.Event()
    subscribe = node.events.subscribe

    def noting(**options: Any) -> Any:
        subscription = subscribe(**options)
        close = subscription.close
        subscription.close = lambda: (close(), left.set())  # type: ignore[method-assign, assignment]
        return subscription

    node.events.subscribe = noting  # type: ignore[method-assign]
    client = await RawClient.connect(gateway)
    client.send("GET /api/events HTTP/1.1\nHost: localhost")
    await client.head()
    await client.close()
    await asyncio.wait_for(left.wait(), 5)
    assert node.events._subscriptions == []


async def test_a_head_of_the_events_does_not_stay(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    assert (await gateway.head("/api/events")).status_code == 200
    assert node.events._subscriptions == []
