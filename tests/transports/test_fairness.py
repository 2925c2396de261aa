"""One client floods a node; another's first token is waited for in admissions, not behind the whole flood."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import nats
import pytest

from engine.generation import Generation
from infsvc.events import RequestFinished
from infsvc.subjects import CLIENT_HEADER
from tests.nodes import ENDLESS, add_worker, build, connected
from transports.node import Node

KEYS = ("first-key", "second-key")
N_SLOTS, N_FLOOD = 4, 40


async def order_of_ends(node: Node, flood: dict[str, str], one: dict[str, str], **asked: Any) -> list[str]:
    """Who ended when: a flood of short answers, which all wait behind `N_SLOTS` endless ones, and one request after
    it."""
    ends: list[str] = []
    node.events.listen(lambda event: ends.append(event.req_id) if isinstance(event, RequestFinished) else None)
    service = node.service
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=node.gateway_url, timeout=60, trust_env=False, limits=limits) as http:

        def post(req_id: str, headers: dict[str, str], params: dict[str, Any], **more: Any) -> asyncio.Task[Any]:
            body = {"req_id": req_id, "input": "hello", "params": params, **more}
            return asyncio.create_task(http.post("/v1/completions", json=body, headers=headers))

        async def admitted(n: int) -> None:
            while sum(1 for _ in service.live()) < n:
                await asyncio.sleep(0.001)

        tasks = [post(f"endless {n}", flood, ENDLESS) for n in range(N_SLOTS)]
        await admitted(N_SLOTS)
        short = {"max_tokens": 4, "ignore_eos": True, "temperature": 0}
        tasks += [post(f"flood {n}", flood, short, **asked) for n in range(N_FLOOD)]
        await admitted(N_SLOTS + N_FLOOD)
        tasks.append(post("one", one, short))
        await admitted(N_SLOTS + N_FLOOD + 1)
        for n in range(N_SLOTS):
            endless = service.find(f"endless {n}")
            assert endless is not None
            endless.cancel()
        answers = await asyncio.gather(*tasks)
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    return [req_id for req_id in ends if not req_id.startswith("endless")]


@pytest.mark.parametrize(("header", "keys"), [("X-API-Key", ",".join(KEYS)), (CLIENT_HEADER, "")])
async def test_a_flood_does_not_hold_up_another_client(
    tmp_path: Path, long_model: Path, header: str, keys: str
) -> None:
    add_worker(tmp_path, "tiny", long_model, CTX_SIZE=16384)
    async with build(tmp_path, "tiny", embedded_nats="off", api_keys=keys) as node:
        await node.fleet.settled("tiny")
        ends = await order_of_ends(node, {header: KEYS[0]}, {header: KEYS[1]}, priority=9)
    assert len(ends) == N_FLOOD + 1
    # Of the slots that the endless leave it gets one; the others' answers are as long as its own.
    assert ends.index("one") < 2 * N_SLOTS


async def test_a_client_name_that_is_too_long_is_refused(node: Node, http: httpx2.AsyncClient) -> None:
    for path, body in (("/v1/completions", {"input": "hi"}), ("/v1/completions", {"prompt": "hi"})):
        answer = await http.post(path, json=body, headers={CLIENT_HEADER: "x" * 201})
        assert (answer.status_code, CLIENT_HEADER in answer.text) == (400, True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"input": "hi"}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/embeddings", {"input": "hi"}),
    ],
)
async def test_a_bad_priority_names_its_field(
    node: Node, http: httpx2.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    for bad in (10, -1, "9", 1.5):
        answer = await http.post(path, json=body | {"priority": bad})
        assert (answer.status_code, "priority" in answer.text) == (400, True)


async def test_a_client_of_the_broker_is_known_by_its_header(tmp_path: Path, long_model: Path) -> None:
    add_worker(tmp_path, "tiny", long_model, CTX_SIZE=16384)
    async with build(tmp_path, "tiny") as node:
        await node.fleet.settled("tiny")
        await connected(node.events)
        client = await nats.connect(node.settings.nats_url)
        subject, inbox = "inference.request.tiny", client.new_inbox()
        answers = await client.subscribe(inbox)
        # Straight to the engine, and with a req_id by way of the durable queue.
        for more in ({}, {"req_id": "durable"}):
            body = {"input": "hi", "params": ENDLESS, **more}
            await client.publish(subject, json.dumps(body).encode(), reply=inbox, headers={CLIENT_HEADER: "mine"})
        async with asyncio.timeout(20):
            while len(live := list(node.service.live())) < 2:
                await asyncio.sleep(0.01)
        assert [each.request.client for each in live if isinstance(each, Generation)] == ["mine", "mine"]
        refused = await client.request(subject, b'{"input": "hi"}', timeout=20, headers={CLIENT_HEADER: "x" * 201})
        assert json.loads(refused.data)["status"] == 400
        for each in live:
            each.cancel()
        for _ in live:
            await answers.next_msg(timeout=20)
        await client.close()
