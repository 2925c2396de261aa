"""A three-server cluster: streams of three copies, and a server killed under load, the one that leads the queue."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client as Connection
from nats.aio.msg import Msg

from infsvc import Client
from infsvc.events import BrokerStateChanged, EventBus, RequestFinished
from infsvc.home import Home
from infsvc.nats_login import NatsLogin
from infsvc.settings import WorkerSettings
from tests.nats_cluster import Cluster, ask, until_it_keeps
from tests.nodes import add_worker, build
from transports.nats.bus import Bus
from transports.nats.jetstream import JetStream
from transports.nats.streams import queue_consumer, queue_stream
from transports.node import Node

from .conftest import Doors, asked, broker_is, client_of, happened
from .fakes import FakeWorker

STREAM = "INFERENCE_TINY"
N_DURABLE, N_ASKED = 60, 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.start()
    try:
        asyncio.run(until_it_keeps(cluster.url, 3))
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
async def onlooker(cluster: Cluster) -> AsyncIterator[Connection]:
    """A plain connection to whichever server is up."""
    client = Connection()
    await client.connect(cluster.url.split(","), max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=_quiet)
    yield client
    await client.close()


async def _quiet(error: Exception) -> None:
    pass


async def test_a_stream_gets_the_copies_that_are_asked_for_and_keeps_them(
    cluster: Cluster, onlooker: Connection, home: Home, events: EventBus
) -> None:
    bus = Bus(NatsLogin.of(cluster.url), embedded="auto", home=home, events=events, node="test")
    await bus.start()
    await broker_is(events, "connected")
    assert bus.state.url == cluster.url
    js, kept = JetStream(bus), []
    for n in (1, 3, 1):
        settings = WorkerSettings(model_name="copied", stream_replicas=n)
        await js.have_stream(queue_stream(settings))
        await js.have_consumer(settings.stream_name, queue_consumer(settings))
        kept.append((await ask(onlooker, "STREAM.INFO.INFERENCE_COPIED"))["config"]["num_replicas"])
    assert kept == [1, 3, 3]  # what has three keeps them
    await ask(onlooker, "STREAM.DELETE.INFERENCE_COPIED")
    await bus.close()


async def test_a_broker_that_is_no_cluster_is_said_and_callers_are_answered(
    url: str, home: Home, events: EventBus
) -> None:
    async with Doors(url, home, events, FakeWorker("demo", events, stream_replicas=3)) as doors, client_of(url) as nc:
        await happened(events, lambda event: isinstance(event, BrokerStateChanged) and bool(event.reason))
        assert doors.bus.state.reason is not None
        assert "STREAM_REPLICAS=3 needs as many servers with JetStream in the broker's cluster: " in (
            doors.bus.state.reason
        )
        assert "text" in await asked(nc, "inference.request.demo", {"req_id": "r", "input": "x"})
        refused = nc.new_inbox()
        answers = await nc.subscribe(refused)
        await nc.publish("inference.request.demo", f'{{"req_id": "q", "input": "x", "reply_to": "{refused}"}}'.encode())
        answer = (await answers.next_msg(timeout=5)).data
        assert b"queue_unavailable" in answer
        assert b"STREAM_REPLICAS=3" in answer


@pytest.mark.timeout(90)
async def test_a_server_is_killed_under_load_and_nothing_is_lost_or_run_twice_that_had_not_begun(
    cluster: Cluster, onlooker: Connection, tmp_path: Path, tiny_model: Path
) -> None:
    nodes = [_node(tmp_path / name, tiny_model, cluster.url, name) for name in ("alpha", "beta")]
    runs: Counter[str] = Counter()
    copies: dict[str, set[str]] = {}

    async def copied(message: Msg) -> None:
        copies.setdefault(message.subject.rpartition(".")[2], set()).add(json.loads(message.data)["text"])

    async with AsyncExitStack() as exits:
        for node in nodes:
            await exits.enter_async_context(node)
            await broker_is(node.events, "connected")
            await node.fleet.settled("tiny")
        for call in (f"STREAM.INFO.{STREAM}", f"CONSUMER.INFO.{STREAM}.tiny_workers", "STREAM.INFO.INFSVC_DEAD"):
            assert await _copies(onlooker, call) == 3
        # The server of one node and of the client leads the queue: then all three have to find another.
        victim = cluster.seat_at(_port(nodes[0]))
        await _lead(onlooker, victim.name)
        survivor = next(seat for seat in cluster.seats if seat is not victim)
        watcher = await exits.enter_async_context(client_of(survivor.url))
        await watcher.subscribe("inference.reply.>", cb=copied)
        await watcher.flush()
        client = await exits.enter_async_context(Client(victim.url, timeout_s=40))
        load = [asyncio.create_task(_durable(client, n)) for n in range(N_DURABLE)]
        load += [asyncio.create_task(_asked(client, n)) for n in range(N_ASKED)]
        async with asyncio.timeout(10):
            while len(copies) < N_DURABLE // 6:
                await asyncio.sleep(0.01)
        assert not all(task.done() for task in load)
        running = {generation.req_id for node in nodes for generation in node.service.live()}
        cluster.kill(victim.name)
        answers = dict(await asyncio.gather(*load))
        async with asyncio.timeout(10):
            while nodes[0].bus.state.status != "connected" or await _depth(onlooker):
                await asyncio.sleep(0.1)
        assert _port(nodes[0]) != victim.port
        await watcher.flush()
        for node in nodes:
            for event in node.events.subscribe(replay=True).drain():
                if isinstance(event, RequestFinished) and event.req_id in answers:
                    runs[event.req_id] += 1
    assert answers.keys() == {*(f"d{n}" for n in range(N_DURABLE)), *(f"a{n}" for n in range(N_ASKED))}
    # Only what ran when its node lost its server may have been taken for lost with it.
    assert {req_id for req_id, n in runs.items() if n != 1} <= running
    assert runs.keys() == answers.keys()
    # One that was asked with a reply subject may have gone through the spool when its server died; the answer is one.
    assert {req_id for req_id in answers if req_id.startswith("d")} <= copies.keys()
    assert copies == {req_id: {answers[req_id]} for req_id in copies}
    cluster.start(victim.name)


def _node(folder: Path, model: Path, url: str, name: str) -> Node:
    add_worker(folder, "tiny", model, STREAM_REPLICAS=3, ACK_WAIT="2s", CTX_SIZE=256)
    return build(folder, "tiny", nats_url=url, node=name)


def _port(node: Node) -> int | None:
    where = node.bus.nc.connected_url if node.bus.nc is not None else None
    return None if where is None else where.port


async def _lead(client: Connection, name: str) -> None:
    """Makes a server the leader of the queue's stream and of its consumer."""
    calls = (f"STREAM.LEADER.STEPDOWN.{STREAM}", f"CONSUMER.LEADER.STEPDOWN.{STREAM}.tiny_workers")
    looks = (f"STREAM.INFO.{STREAM}", f"CONSUMER.INFO.{STREAM}.tiny_workers")
    for call, look in zip(calls, looks, strict=True):
        async with asyncio.timeout(15):
            while (await ask(client, look)).get("cluster", {}).get("leader") != name:
                with suppress(TimeoutError):
                    await ask(client, call, {"placement": {"preferred": name}})
                await asyncio.sleep(0.2)


async def _copies(client: Connection, call: str) -> int:
    told = (await ask(client, call)).get("cluster") or {}
    return ("leader" in told) + len(told.get("replicas") or [])


async def _depth(client: Connection) -> int:
    with suppress(TimeoutError):
        state = (await ask(client, f"STREAM.INFO.{STREAM}")).get("state", {"messages": -1})
        return int(state["messages"])
    return -1


def _params(n: int) -> dict[str, Any]:
    return {"max_tokens": 1 + n % 12, "temperature": 0, "ignore_eos": True}


async def _durable(client: Client, n: int) -> tuple[str, str]:
    job = await client.submit(f"request {n}", model="tiny", req_id=f"d{n}", **_params(n))
    return job.id, (await job.result()).text


async def _asked(client: Client, n: int) -> tuple[str, str]:
    return f"a{n}", (await client.infer(f"request {n}", model="tiny", req_id=f"a{n}", **_params(n))).text
