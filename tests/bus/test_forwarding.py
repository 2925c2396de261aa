"""A node's gateway answers for the whole bus: what another node runs is sent there, and the answer is the same as if it
ran here. `alpha` is asked for `only-v1.5`, which `beta` alone has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from infsvc.events import RequestFinished
from transports.forwarder import Outgoing
from transports.node import Node

from .conftest import Pair
from .test_registry import says, until

MODEL = "only-v1.5"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
ENDLESS: dict[str, Any] = {"temperature": 0, "max_tokens": 10_000, "ignore_eos": True}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **GREEDY}
NATIVE: dict[str, Any] = {"model": MODEL, "input": "hello", "params": GREEDY}


@pytest.fixture
async def gateway(pair: Pair) -> AsyncIterator[httpx2.AsyncClient]:
    """alpha's, once it has heard of beta's models."""
    await until(pair.alpha, says("beta", MODEL, "online"))
    await until(pair.alpha, says("beta", "tiny", "online"))
    async with httpx2.AsyncClient(base_url=pair.alpha.gateway_url, trust_env=False, timeout=30) as http:
        yield http


@pytest.fixture
async def owner(pair: Pair) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=pair.beta.gateway_url, trust_env=False, timeout=30) as http:
        yield http


async def runs(req_id: str, node: Node) -> None:
    async with asyncio.timeout(10):
        while node.service.find(req_id) is None:
            await asyncio.sleep(0.01)


async def cancelled(node: Node, n: int = 1) -> None:
    """Waits until that many requests of a node have ended, and looks that they were cancelled."""
    events = node.events.subscribe(replay=True)
    ends: list[str] = []
    try:
        async with asyncio.timeout(10):
            async for event in events:
                if isinstance(event, RequestFinished):
                    ends.append(event.finish_reason)
                    if len(ends) == n:
                        break
    finally:
        events.close()
    assert ends == ["cancelled"] * n
    assert not any(node.service.live())


def steady(body: Any) -> Any:
    """An answer without what differs between two runs of one request."""
    if isinstance(body, dict):
        passing = ("duration_ms", "ms", "created", "id", "req_id", "tokens_cached", "prompt_tokens_details")
        return {key: steady(value) for key, value in body.items() if key not in passing}
    return [steady(each) for each in body] if isinstance(body, list) else body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", NATIVE),
        ("/v1/completions", {"model": MODEL, "prompt": ["hello", "you"], "n": 2, "logprobs": 2, **GREEDY}),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
        ("/v1/embeddings", {"model": MODEL, "input": ["hello", "you"]}),
        ("/v1/embeddings", {"model": MODEL, "input": "hello", "encoding_format": "base64", "dimensions": 8}),
    ],
)
async def test_the_answer_is_the_owners(
    gateway: httpx2.AsyncClient, owner: httpx2.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    there = await owner.post(path, json=body)
    here = await gateway.post(path, json=body)
    assert (here.status_code, there.status_code) == (200, 200)
    assert steady(here.json()) == steady(there.json())
    assert here.headers["infsvc-node"] == there.headers["infsvc-node"] == "beta"
    assert here.headers["content-type"] == there.headers["content-type"]
    assert (await gateway.get("/healthz")).headers["infsvc-node"] == "alpha"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", NATIVE), ("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}})],
)
async def test_a_stream_comes_in_order(
    gateway: httpx2.AsyncClient, owner: httpx2.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    async def events(http: httpx2.AsyncClient) -> list[Any]:
        async with http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["infsvc-node"] == "beta"
            lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else steady(json.loads(line)) for line in lines]

    there = await events(owner)
    here = await events(gateway)
    assert here == there
    assert len(here) > 3


async def test_it_is_audited_once_by_the_owner(gateway: httpx2.AsyncClient, pair: Pair) -> None:
    answer = await gateway.post("/v1/completions", json=NATIVE | {"req_id": "far"}, headers={"X-Trace-ID": "trace-7"})
    assert answer.headers["x-req-id"] == answer.json()["req_id"] == "far"
    await pair.beta.fleet.get(MODEL).audit.flush()
    (row,) = await pair.beta.logs.rows(MODEL, limit=10)
    assert (row["req_id"], row["trace_id"], row["status"], row["source"]) == ("far", "trace-7", "ok", "http")
    assert await pair.alpha.logs.rows("tiny", limit=10) == []


async def test_errors_are_the_owners(gateway: httpx2.AsyncClient, owner: httpx2.AsyncClient) -> None:
    wrong = [
        ("/v1/completions", NATIVE | {"input": "x y " * 20_000, "req_id": "long"}, 400, "context_length_exceeded"),
        ("/v1/chat/completions", CHAT | {"logit_bias": {"999999": 1}}, 400, "bad_request"),
        ("/v1/completions", NATIVE | {"params": {"grammar": "root ::= nobody"}}, 422, "grammar_invalid"),
        ("/v1/embeddings", {"model": MODEL, "input": "x", "dimensions": 100_000}, 400, "bad_request"),
    ]
    for path, body, status, code in wrong:
        here, there = await gateway.post(path, json=body), await owner.post(path, json=body)
        assert here.status_code == there.status_code == status
        assert steady(here.json()) == steady(there.json())
        told = here.json()
        assert (told if "code" in told else told["error"])["code"] == code
        assert here.headers["infsvc-node"] == "beta"
    nobody = await gateway.post("/v1/completions", json=NATIVE | {"model": "nobody"})
    assert (nobody.status_code, nobody.json()["code"]) == (404, "model_not_found")
    assert MODEL in nobody.json()["error"]
    assert nobody.headers["infsvc-node"] == "alpha"


async def test_a_full_queue_says_when_to_come_again(
    gateway: httpx2.AsyncClient, owner: httpx2.AsyncClient, pair: Pair
) -> None:
    n = 4 + 16  # its slots, and its queue
    long = [
        asyncio.create_task(owner.post("/v1/completions", json=NATIVE | {"req_id": f"b{k}", "params": ENDLESS}))
        for k in range(n)
    ]
    for k in range(n):
        await runs(f"b{k}", pair.beta)
    full = await gateway.post("/v1/completions", json=NATIVE)
    assert (full.status_code, full.json()["code"], full.json()["queue_depth"]) == (429, "queue_full", 16)
    assert int(full.headers["retry-after"]) >= 1
    assert full.headers["x-queue-depth"] == "16"
    for k in range(n):
        assert (await gateway.delete(f"/api/requests/b{k}")).json() == {"req_id": f"b{k}", "cancelled": True}
    await asyncio.gather(*long)
    gone = await gateway.delete("/api/requests/b0")
    assert gone.status_code == 404


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_its_generation(gateway: httpx2.AsyncClient, pair: Pair, stream: bool) -> None:
    body = NATIVE | {"params": ENDLESS, "req_id": "left", "stream": stream}
    if stream:
        async with gateway.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                break
    else:
        asking = asyncio.create_task(gateway.post("/v1/completions", json=body))
        await runs("left", pair.beta)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await cancelled(pair.beta)
    async with asyncio.timeout(5):
        while pair.alpha.forwarder._open or pair.alpha.forwarder._closing:
            await asyncio.sleep(0.01)


async def test_a_node_that_is_lost_before_its_answer_is_a_502(gateway: httpx2.AsyncClient, pair: Pair) -> None:
    body = NATIVE | {"params": ENDLESS, "req_id": "doomed"}
    asking = asyncio.create_task(gateway.post("/v1/completions", json=body))
    await runs("doomed", pair.beta)
    await pair.beta.bus._drop()  # as a cut cable: nothing more is said
    answer = await asking
    assert (answer.status_code, answer.json()["code"], answer.json()["req_id"]) == (502, "node_lost", "doomed")
    assert answer.json()["error"].startswith("beta, which serves the model, ")
    assert answer.headers["retry-after"] == "1"
    await cancelled(pair.beta)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_node_that_is_lost_in_mid_stream_ends_it_with_an_error(
    gateway: httpx2.AsyncClient, pair: Pair, path: str
) -> None:
    native = path == "/v1/completions"
    body = NATIVE | {"params": ENDLESS} if native else CHAT | ENDLESS
    events: list[dict[str, Any]] = []
    async with gateway.stream("POST", path, json=body | {"stream": True, "req_id": "doomed"}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 3:
                    await pair.beta.bus._drop()
    last = events[-1]
    if native:
        assert (last["code"], last["status"], last["done"], last["req_id"]) == ("node_lost", 502, True, "doomed")
        assert [event["index"] for event in events[:-1]] == list(range(len(events) - 1))
    else:
        assert (last["error"]["code"], last["error"]["type"]) == ("node_lost", "server_error")
    await cancelled(pair.beta)


async def test_models_of_all_nodes_are_listed(gateway: httpx2.AsyncClient, pair: Pair) -> None:
    listed = {each["id"]: each for each in (await gateway.get("/v1/models")).json()["data"]}
    assert {name: (each["status"], each["nodes"]) for name, each in listed.items()} == {
        "tiny": ("ready", ["alpha", "beta"]),
        MODEL: ("ready", ["beta"]),
    }
    assert listed[MODEL]["context_length"] == 16384
    assert (await gateway.get(f"/v1/models/{MODEL}")).json() == listed[MODEL]
    assert (await gateway.get("/v1/models/nobody")).status_code == 404
    async with httpx2.AsyncClient(base_url=pair.alpha.fleet.get("tiny").endpoint, trust_env=False) as port:
        (own,) = (await port.get("/v1/models")).json()["data"]
        assert (own["id"], own["nodes"]) == ("tiny", ["alpha"])
        wrong = await port.post("/v1/completions", json=NATIVE)
        assert (wrong.status_code, wrong.json()["param"]) == (400, "model")


async def test_what_is_ready_here_is_run_here_and_else_elsewhere(gateway: httpx2.AsyncClient, pair: Pair) -> None:
    body = NATIVE | {"model": "tiny"}
    assert (await gateway.post("/v1/completions", json=body)).headers["infsvc-node"] == "alpha"
    await pair.alpha.unload("tiny")
    assert (await gateway.post("/v1/completions", json=body)).headers["infsvc-node"] == "beta"
    unnamed = await gateway.post("/v1/completions", json={"input": "hello"})
    assert (unnamed.status_code, unnamed.json()["param"]) == (400, "model")
    await pair.beta.unload("tiny")
    await until(pair.alpha, says("beta", "tiny", "offline"))
    gone = await gateway.post("/v1/completions", json=body)
    assert (gone.status_code, gone.json()["code"]) == (503, "model_not_loaded")
    assert (await gateway.post("/v1/completions", json={"input": "hello", "params": GREEDY})).headers[
        "infsvc-node"
    ] == "beta"


async def test_what_was_forwarded_is_not_forwarded_again(gateway: httpx2.AsyncClient, pair: Pair) -> None:
    await until(pair.beta, says("alpha", "tiny", "online"))
    target = pair.beta.registry.find("tiny", "alpha")
    assert target is not None
    request = Outgoing(method="POST", path="/v1/completions", headers=[], body=json.dumps(NATIVE).encode())
    answer = await pair.beta.forwarder.send(request, [target])
    assert answer.status == 404
    assert dict(answer.headers)["infsvc-node"] == "alpha"


async def test_bodies_larger_than_a_message_go_in_pieces(
    gateway: httpx2.AsyncClient, owner: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transports.forward_parts._PIECE_BYTES", 1024)
    body = {"model": MODEL, "input": ["hello you " * 50] * 30}
    here, there = await gateway.post("/v1/embeddings", json=body), await owner.post("/v1/embeddings", json=body)
    assert here.status_code == 200
    assert len(here.content) > 20 * 1024
    assert here.json() == there.json()
    too_large = await gateway.post("/v1/embeddings", content=b"x" * (8 * 2**20 + 1))
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "too_large")


async def test_a_node_that_was_killed_is_offline_until_it_is_heard_again(
    gateway: httpx2.AsyncClient, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its doors close without a farewell, as those of a process that was killed; what it said last still stands.
    await pair.beta._forward_door.close()
    lost = await gateway.post("/v1/completions", json=NATIVE)
    assert (lost.status_code, lost.json()["code"]) == (502, "node_lost")
    monkeypatch.setattr(pair.alpha.registry._watch, "_take_health", lambda *_: None)
    after = await gateway.post("/v1/completions", json=NATIVE)
    assert (after.status_code, after.json()["code"]) == (503, "model_not_loaded")
    assert "beta does not answer" in after.json()["error"]
    assert [each["id"] for each in (await gateway.get("/v1/models")).json()["data"]] == ["tiny"]
    pair.alpha.registry.roster.hear_health(pair.beta.fleet.get(MODEL).health().model_dump_json().encode())
    again = await gateway.post("/v1/completions", json=NATIVE)
    assert again.status_code == 502


async def test_a_node_that_cannot_be_found_is_passed_over(gateway: httpx2.AsyncClient, pair: Pair) -> None:
    (target,) = pair.alpha.forwarder.nodes(MODEL)
    ghost = target.model_copy(update={"node": "ghost"})
    request = Outgoing(method="POST", path="/v1/completions", headers=[], body=json.dumps(NATIVE).encode())
    answer = await pair.alpha.forwarder.send(request, [ghost, target])
    assert (answer.status, answer.node) == (200, "beta")
    await pair.alpha.forwarder.done(answer)  # type: ignore[arg-type]
