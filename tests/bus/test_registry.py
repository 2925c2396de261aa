"""What a node knows of other nodes, over a real broker: its services, events, micro service, and who has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import nats
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats

from infsvc.events import Event, QueueReported, ServiceHealth
from tests.nodes import ENDLESS, add_worker, build
from transports.node import Node

from .conftest import Pair


async def until(node: Node, wanted: Callable[[Event], bool], *, replay: bool = True) -> Event:
    events = node.events.subscribe(replay=replay)
    try:
        async with asyncio.timeout(20):
            async for event in events:
                if wanted(event):
                    return event
    finally:
        events.close()
    raise AssertionError("the bus of events closed")


def says(node: str, model: str, status: str) -> Callable[[Event], bool]:
    return lambda event: (
        isinstance(event, ServiceHealth)
        and (event.node, event.model, event.document["status"]) == (node, model, status)
    )


async def get(url: str, path: str) -> Any:
    async with httpx2.AsyncClient(base_url=url, trust_env=False) as http:
        return (await http.get(path)).json()


async def measured(node: Node, model: str) -> float:
    """Waits until another node's model has answered once."""
    await until(
        node,
        lambda event: (
            isinstance(event, ServiceHealth)
            and event.model == model
            and event.document.get("response_time_ms") is not None
        ),
    )
    found = node.registry.find(model)
    assert found is not None
    assert found.response_time_ms is not None
    return found.response_time_ms


async def test_each_node_shows_the_others_models_by_node(pair: Pair) -> None:
    await until(pair.alpha, says("beta", "tiny", "online"))
    await until(pair.alpha, says("beta", "only-v1.5", "online"))
    assert await measured(pair.alpha, "only-v1.5") > 0
    listed = (await get(pair.alpha.gateway_url, "/api/services"))["services"]
    assert [(each["model_name"], each["node"], each["local"]) for each in listed] == [
        ("tiny", "alpha", True),
        ("only-v1.5", "beta", False),
        ("tiny", "beta", False),
    ]
    for each in listed:
        assert each["status"] == "online"
        assert each["uptime"] > 0
        assert each["first_seen"] <= each["last_seen"]
        assert each["response_time_ms"] > 0
        assert {"model_info", "queue_metrics", "backpressure_status", "endpoint", "nats_topic"} <= set(each)


async def test_a_late_node_finds_those_who_were_there_before(pair: Pair) -> None:
    # beta started last: no heartbeat of alpha was due since, so it must have asked.
    assert await measured(pair.beta, "tiny") > 0
    found = pair.beta.registry.find("tiny")
    assert found is not None
    assert (found.node, found.status) == ("alpha", "online")


async def test_one_service_by_model_and_node(pair: Pair) -> None:
    await until(pair.alpha, says("beta", "only-v1.5", "online"))
    await until(pair.alpha, says("beta", "tiny", "online"))
    gateway = pair.alpha.gateway_url
    assert (await get(gateway, "/api/services/tiny"))["node"] == "alpha"
    assert (await get(gateway, "/api/services/tiny?node=beta"))["node"] == "beta"
    assert (await get(gateway, "/api/services/only-v1.5"))["node"] == "beta"
    nobody = await get(gateway, "/api/services/nobody")
    assert (nobody["status"], nobody["code"]) == (404, "model_not_found")
    assert "only-v1.5" in nobody["error"]
    wrong = await get(gateway, "/api/services/tiny?node=gamma")
    assert (wrong["status"], wrong["error"]) == (404, "gamma is no node on this broker that has tiny")


async def test_a_node_that_leaves_is_offline_for_the_others(pair: Pair) -> None:
    await until(pair.alpha, says("beta", "only-v1.5", "online"))
    await pair.beta.unload("only-v1.5")
    await until(pair.alpha, says("beta", "only-v1.5", "offline"))
    found = pair.alpha.registry.find("only-v1.5")
    assert found is not None
    assert found.status == "offline"


async def test_events_of_other_nodes_are_streamed(pair: Pair) -> None:
    await until(pair.alpha, says("beta", "only-v1.5", "online"))
    async with (
        httpx2.AsyncClient(base_url=pair.alpha.gateway_url, trust_env=False, timeout=20) as http,
        http.stream("GET", "/api/events") as response,
    ):
        await pair.beta.unload("only-v1.5")
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if says_wire(event) == ("service.health", "beta", "only-v1.5", "offline"):
                    return
    raise AssertionError("the stream ended")


def says_wire(event: dict[str, Any]) -> tuple[Any, ...]:
    return (event["type"], event["node"], event.get("model"), event.get("document", {}).get("status"))


async def test_nats_micro_lists_counts_and_answers_nothing_twice(pair: Pair) -> None:
    nc = await nats.connect(pair.url)
    try:
        inbox = nc.new_inbox()
        answers = await nc.subscribe(inbox)

        async def all_of(subject: str) -> list[dict[str, Any]]:
            await nc.publish(subject, reply=inbox)
            return [json.loads((await answers.next_msg(timeout=5)).data) for _ in range(2)]

        pings = [ServicePing.from_dict(each) for each in await all_of("$SRV.PING")]
        assert {ping.name for ping in pings} == {"infsvc"}
        infos = {each["metadata"]["node"]: ServiceInfo.from_dict(each) for each in await all_of("$SRV.INFO.infsvc")}
        assert {endpoint.name: endpoint.subject for endpoint in infos["beta"].endpoints} == {
            "tiny": "inference.request.tiny",
            "only-v1_5": "inference.request.only-v1.5",
        }
        await nc.publish("inference.request.only-v1.5", b'{"input": "hi", "params": {"max_tokens": 2}}', reply=inbox)
        reply = json.loads((await answers.next_msg(timeout=10)).data)
        assert reply["tokens_out"] > 0
        told = await nc.request(f"$SRV.STATS.infsvc.{pair.beta.micro.instance}", timeout=5)
        stats = {each.name: each for each in ServiceStats.from_dict(json.loads(told.data)).endpoints}
        assert (stats["only-v1_5"].num_requests, stats["only-v1_5"].num_errors) == (1, 0)
        assert stats["only-v1_5"].average_processing_time > 0
        assert stats["tiny"].num_requests == 0
        assert answers.pending_msgs == 0
    finally:
        await nc.close()


async def test_what_is_no_document_is_counted_and_passed_over(pair: Pair) -> None:
    await until(pair.alpha, says("beta", "tiny", "online"))
    before = pair.alpha.registry.roster.n_ignored
    nc = await nats.connect(pair.url)
    try:
        for data in (b"", b"[]", b"{}", b'{"model_name": 3}', b"\xff" * 100):
            await nc.publish("models.evil.heartbeat", data)
        for data in (b"[]", b'"x"', b'{"node": "evil", "msg": 3}'):
            await nc.publish("monitoring.alerts", data)
        await nc.flush()
        await until(pair.alpha, lambda event: event.type == "alert" and event.node == "evil")
    finally:
        await nc.close()
    assert pair.alpha.registry.roster.n_ignored == before + 5
    assert "evil" not in pair.alpha.registry.roster.models()


async def test_reports_on_a_topic_of_ones_own_are_heard(pair: Pair, tmp_path: Path, long_model: Path) -> None:
    add_worker(tmp_path / "c", "shop", long_model, MONITORING_TOPIC="shop.floor", CTX_SIZE=16384)
    async with build(tmp_path / "c", "shop", nats_url=pair.url, node="gamma", embedded_nats="off") as gamma:
        await until(pair.alpha, says("gamma", "shop", "online"))
        asking = asyncio.create_task(post(gamma.gateway_url, {"input": "x", "req_id": "long", "params": ENDLESS}))
        heard = await until(
            pair.alpha,
            lambda event: (
                isinstance(event, QueueReported) and event.node == "gamma" and event.report["active_processing"] == 1
            ),
        )
        assert heard.model == "shop"
        gamma.service.find("long").cancel()  # type: ignore[union-attr]
        await asking


async def post(url: str, body: dict[str, Any]) -> None:
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30) as http:
        await http.post("/v1/completions", json=body)
