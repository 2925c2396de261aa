"""The whole way with nothing faked: a client, a broker, the doors, the service and an engine on a tiny model."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing

import pytest
from nats.aio.client import Client

from engine.fleet import Fleet
from engine.service import InferenceService
from infsvc.events import EventBus, ModelStateChanged
from infsvc.home import Home
from infsvc.settings import WorkerSettings
from infsvc.types import CompletionReply, HealthDocument, ModelState
from storage.audit_log import AuditLog, AuditReader
from tests.tiny_models import write_tiny_model
from transports.nats.bus import Bus
from transports.nats.durable import Durable
from transports.nats.exchange import Exchanges
from transports.nats.front_door import FrontDoor
from transports.nats.heartbeat import Heartbeats
from transports.nats.queue_desk import QueueDesk

from .conftest import asked, broker_is, client_of, happened, told

SUBJECT = "inference.request.tiny-v1.5"
N_CTX = 16_384
LONG = {"max_tokens": N_CTX, "ignore_eos": True}


@pytest.fixture
async def fleet(home: Home, events: EventBus) -> AsyncIterator[Fleet]:
    settings = WorkerSettings(
        model_name="tiny-v1.5", ctx_size=N_CTX, worker_concurrency=2, queue_max_msgs=4, model_threads=1
    )
    write_tiny_model(home.own(settings.model_path), n_ctx=N_CTX)
    audit = AuditLog(home.root / settings.db_path)
    events.bind(asyncio.get_running_loop())
    fleet = Fleet(
        home,
        {settings.model_name: settings},
        events=events,
        audit=lambda worker: audit,
        endpoint=lambda worker: "",
        node="test",
        start_time="2026-01-01T00:00:00.000Z",
    )
    fleet.load(settings.model_name)
    await happened(events, lambda event: isinstance(event, ModelStateChanged) and event.state is ModelState.READY)
    yield fleet
    await fleet.close()
    await audit.close()


@pytest.fixture
async def client(url: str, home: Home, events: EventBus, fleet: Fleet) -> AsyncIterator[Client]:
    """A client of a node that serves the fleet."""
    service = InferenceService(fleet, events=events, node="test")
    bus = Bus(url, embedded="auto", home=home, events=events, node="test")
    async with AsyncExitStack() as exits:
        exchanges = Exchanges(bus, service)
        durable = Durable(bus, fleet, service, exchanges, "test")
        desk = QueueDesk(durable, fleet, service, exchanges)
        door = FrontDoor(bus, fleet, service, exchanges, durable, desk, asyncio.Event())
        for part in (bus, durable, door, Heartbeats(bus, fleet, events, "test")):
            await part.start()
            exits.push_async_callback(part.close)
        await broker_is(events, "connected")
        yield await exits.enter_async_context(client_of(url))


async def test_the_reply_is_the_answer_and_a_row(client: Client, fleet: Fleet) -> None:
    body = {"req_id": "r1", "input": "hello", "params": {"max_tokens": 8, "temperature": 0, "ignore_eos": True}}
    reply = CompletionReply.model_validate(await asked(client, SUBJECT, body))
    assert (reply.req_id, reply.finish_reason, reply.tokens_out) == ("r1", "length", 8)
    again = await asked(client, SUBJECT, body | {"req_id": "r2"})
    assert again["text"] == reply.text
    audit = fleet.get("tiny-v1.5").audit
    assert isinstance(audit, AuditLog)
    await audit.flush()
    rows = await AuditReader({"m": audit}).rows("m", limit=10)
    assert {(row["req_id"], row["source"], row["status"]) for row in rows} == {
        ("r1", "nats", "ok"),
        ("r2", "nats", "ok"),
    }


async def test_who_has_a_durable_answer_finds_its_row(client: Client, fleet: Fleet) -> None:
    """Read past this process, as after its kill: only what is in the file counts, and nothing is waited for."""
    audit = fleet.get("tiny-v1.5").audit
    assert isinstance(audit, AuditLog)
    for n in range(20):
        body = {"req_id": f"r{n}", "input": "hello", "params": {"max_tokens": 2, "temperature": 0, "ignore_eos": True}}
        answer = await asked(client, SUBJECT, body)
        with closing(sqlite3.connect(f"{audit.path.absolute().as_uri()}?mode=ro", uri=True)) as file:
            rows = file.execute("SELECT status, response_text FROM requests WHERE req_id=?", (f"r{n}",)).fetchall()
        assert rows == [("ok", answer["text"])]


async def test_a_stream_is_the_reply_in_pieces(client: Client) -> None:
    answers = await client.subscribe("answers.here")
    body = {"req_id": "s", "input": "hi", "stream": True, "params": {"max_tokens": 40, "ignore_eos": True, "seed": 1}}
    await client.publish(SUBJECT, json.dumps(body).encode(), reply="answers.here")
    got = [await told(answers)]
    while not got[-1].get("done"):
        got.append(await told(answers))
    assert len(got) > 5
    assert "".join(chunk["text"] for chunk in got[:-1]) == got[-1]["text"]


async def test_a_full_queue_says_so_and_cancel_frees_it(client: Client, fleet: Fleet, events: EventBus) -> None:
    running = [
        asyncio.create_task(asked(client, SUBJECT, {"req_id": f"{n}", "input": "x", "params": LONG})) for n in range(4)
    ]
    worker = fleet.get("tiny-v1.5")
    started = events.subscribe(replay=True)
    async for _ in started:
        if len(worker.requests) == 3:
            break
    # Two run, one is on its way to a slot, and one waits in the broker; those that run take no place.
    while worker.n_queued_durable != 1:
        await client.flush()
    assert (worker.n_active, worker.n_waiting) == (2, 2)
    running += [
        asyncio.create_task(asked(client, SUBJECT, {"req_id": f"{n}", "input": "x", "params": LONG})) for n in (4, 5)
    ]
    while worker.n_queued_durable != 3:
        await client.flush()
    full = await asked(client, SUBJECT, {"req_id": "seventh", "input": "x"})
    assert (full["status"], full["code"], full["queue_depth"]) == (429, "queue_full", 4)
    for _ in range(6):
        while not worker.requests:
            await client.flush()
        req_id = next(iter(worker.requests))
        assert (await asked(client, "inference.cancel", {"req_id": req_id}))["cancelled"]
        while req_id in worker.requests:
            await client.flush()
    assert {reply["finish_reason"] for reply in await asyncio.gather(*running)} == {"cancelled"}


async def test_a_prompt_over_the_context_is_refused_with_both_counts(client: Client) -> None:
    answer = await asked(client, SUBJECT, {"req_id": "big", "input": "x" * 20_000})
    assert (answer["status"], answer["code"]) == (400, "context_length_exceeded")
    assert str(N_CTX) in answer["error"]


async def test_health_is_the_models_own(client: Client) -> None:
    document = HealthDocument.model_validate(await asked(client, "models.tiny-v1.5.health", b""))
    assert document.status == "online"
    assert document.model_info is not None
    assert document.model_info.architecture == "llama"
    assert document.nats_topic == SUBJECT


async def test_a_model_goes_and_comes_back(client: Client, fleet: Fleet) -> None:
    beats = await client.subscribe("models.tiny-v1_5.heartbeat")
    await client.flush()
    await fleet.unload("tiny-v1.5")
    while (await told(beats))["status"] != "offline":
        pass
    fleet.load("tiny-v1.5")
    while (status := (await told(beats))["status"]) != "online":
        assert status == "loading"
    assert (await asked(client, SUBJECT, {"input": "x", "params": {"max_tokens": 1}}))["tokens_out"] == 1
