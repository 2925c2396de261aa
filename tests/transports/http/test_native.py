"""`POST /v1/completions`, answered in one piece: what is accepted, what is refused and how."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from infsvc.events import RequestFinished
from infsvc.types import ModelState
from tests.transports.http.conftest import RawClient, ScriptedNode


async def post(client: httpx2.AsyncClient, body: Any, **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post("/v1/completions", content=content, headers=headers)


async def test_a_reply_has_text_counts_and_its_req_id(port: httpx2.AsyncClient) -> None:
    response = await post(port, {"input": "say hello world", "req_id": "r-1"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-req-id"] == "r-1"
    reply = response.json()
    assert reply.pop("ms") == reply.pop("duration_ms") >= 0
    assert reply == {
        "req_id": "r-1",
        "text": "Hello world",
        "tokens_in": 3,
        "tokens_out": 2,
        "tokens_cached": 0,
        "finish_reason": "stop",
    }


async def test_a_request_without_an_id_gets_one(port: httpx2.AsyncClient) -> None:
    response = await post(port, {"input": "x"})
    assert response.headers["x-req-id"] == response.json()["req_id"] != ""


async def test_an_id_that_no_header_can_carry_is_encoded_in_the_header(port: httpx2.AsyncClient) -> None:
    response = await post(port, {"input": "x", "req_id": "ü\r\nSet-Cookie: a"})
    assert response.json()["req_id"] == "ü\r\nSet-Cookie: a"
    assert response.headers["x-req-id"] == "%C3%BC%0D%0ASet-Cookie: a"
    assert "set-cookie" not in response.headers


async def test_text_outside_ascii_stays_as_it_is(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    node.engine.answer = ["Grüße ", "🙂"]
    response = await post(port, {"input": "ü"})
    assert "Grüße 🙂" in response.text


async def test_the_gateway_picks_the_model_of_the_body(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    assert (await post(gateway, {"input": "x", "model": "demo"})).status_code == 200
    missing = await post(gateway, {"input": "x", "model": "nope", "req_id": "r"})
    assert (missing.status_code, missing.json()["code"]) == (404, "model_not_found")
    absent = await post(gateway, {"input": "x", "model": "nomic-embed-v1.5"})
    assert (absent.status_code, absent.json()["code"]) == (503, "model_not_loaded")


async def test_the_gateway_takes_the_only_model_that_is_ready(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    assert (await post(gateway, {"input": "x"})).status_code == 200
    node.make_ready("nomic-embed-v1.5")
    refused = await post(gateway, {"input": "x"})
    assert (refused.status_code, refused.json()["param"]) == (400, "model")


async def test_a_models_port_serves_no_other_model(port: httpx2.AsyncClient) -> None:
    assert (await post(port, {"input": "x", "model": "demo"})).status_code == 200
    refused = await post(port, {"input": "x", "model": "nomic-embed-v1.5", "req_id": "r"})
    assert refused.status_code == 400
    assert refused.headers["x-req-id"] == "r"
    body = refused.json()
    assert "demo's port" in body.pop("error")
    assert body == {"req_id": "r", "code": "bad_request", "status": 400, "param": "model"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b'{"input": "x",\n  oops}', "line 2, column 3"),
        (b'{"input": "x"} {}', "column 16"),
        (b'\xef\xbb\xbf{"input": "x"}', "BOM"),
        (b'{"input": "\xff"}', "byte 11 is 0xff"),
        (b'{"input": "x", "params": {"temperature": NaN}}', "NaN"),
        (b'{"input": "x", "params": {"temperature": -Infinity}}', "-Infinity"),
        (b"[1]", "array"),
        (b"null", "null"),
        (b'"x"', "string"),
        (b"[" * 100_000, "nested"),
        (b'{"input": "x", "priority": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
async def test_what_is_no_json_object_is_refused(port: httpx2.AsyncClient, body: bytes, says: str) -> None:
    response = await post(port, body)
    assert response.status_code == 400
    told = response.json()
    assert (told["code"], told["status"], told["req_id"]) == ("bad_request", 400, None)
    assert says in told["error"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": 3}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": "x", "prompt": "y"}, "input"),
        ({"input": "x", "what": 1}, "what"),
        ({"input": "x", "params": 3}, "params"),
        ({"input": "x", "params": {"what": 1}}, "params.what"),
        ({"input": "x", "params": {"temperature": 2.1}}, "params.temperature"),
        ({"input": "x", "params": {"temperature": "hot"}}, "params.temperature"),
        ({"input": "x", "params": {"max_tokens": 0}}, "params.max_tokens"),
        ({"input": "x", "params": {"stop": ["a", 3]}}, "params.stop.1"),
        ({"input": "x", "params": {"stop": ["a"] * 17}}, "params.stop"),
        ({"input": "x", "params": {"json_schema": 1}}, "params.json_schema"),
        ({"input": "x", "params": {"grammar": "g", "ignore_eos": True}}, "params.ignore_eos"),
        ({"input": "x", "req_id": ""}, "req_id"),
        ({"input": "x", "trace_id": "t" * 201}, "trace_id"),
        ({"input": "x", "stream": "maybe"}, "stream"),
    ],
)
async def test_a_wrong_field_is_named(port: httpx2.AsyncClient, body: dict[str, Any], param: str) -> None:
    response = await post(port, body)
    assert response.status_code == 400
    told = response.json()
    assert told["param"] == param
    assert param.rpartition(".")[2] in told["error"]
    assert "\n" not in told["error"]


async def test_an_unknown_key_of_a_megabyte_does_not_come_back(port: httpx2.AsyncClient) -> None:
    response = await post(port, {"input": "x", "k" * 1_000_000: 1})
    assert response.status_code == 400
    assert len(response.content) < 1000


async def test_a_refusal_carries_the_bodys_req_id(port: httpx2.AsyncClient) -> None:
    response = await post(port, {"input": "x", "req_id": "mine", "what": 1})
    assert (response.json()["req_id"], response.headers["x-req-id"]) == ("mine", "mine")


async def test_a_key_that_comes_twice_is_refused_and_a_priority_accepted(port: httpx2.AsyncClient) -> None:
    assert (await post(port, b'{"input": "x", "priority": 5}')).status_code == 200
    refused = await post(port, b'{"input": "x", "input": "y"}')
    assert (refused.status_code, refused.json()["param"]) == (400, "input")


async def test_a_compressed_body_and_a_query_are_refused(port: httpx2.AsyncClient) -> None:
    assert "Content-Encoding" in (await post(port, b"x", **{"Content-Encoding": "gzip"})).json()["error"]
    response = await port.post("/v1/completions?model=demo", json={"input": "x"})
    assert (response.status_code, response.json()["param"]) == (400, "model")


@pytest.mark.parametrize(("body_id", "header", "kept"), [(None, "h", "h"), ("b", "h", "b"), (None, None, None)])
async def test_the_trace_id_is_the_bodys_else_the_headers(
    node: ScriptedNode, port: httpx2.AsyncClient, body_id: str | None, header: str | None, kept: str | None
) -> None:
    headers = {"X-Trace-ID": header} if header else {}
    assert (await post(port, {"input": "x", "trace_id": body_id}, **headers)).status_code == 200
    await node.logged()
    (row,) = await node.logs.rows("demo", limit=5)
    assert row["trace_id"] == kept


async def test_a_trace_header_that_is_too_long_is_refused(port: httpx2.AsyncClient) -> None:
    response = await post(port, {"input": "x"}, **{"X-Trace-ID": "t" * 201})
    assert (response.status_code, response.json()["param"]) == (400, "X-Trace-ID")


async def test_a_prompt_over_the_context_names_both_counts(port: httpx2.AsyncClient) -> None:
    response = await post(port, {"input": "x " * 1024})
    assert (response.status_code, response.json()["code"]) == (400, "context_length_exceeded")
    assert response.json()["error"].count("1024") == 2


async def test_a_full_queue_says_when_to_come_back(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    node.engine.answer = None
    waiting = [asyncio.create_task(post(port, {"input": "x"})) for _ in range(5)]
    for _ in waiting:
        await node.engine.until_submitted()
    response = await post(port, {"input": "x"})
    assert (response.status_code, response.json()["code"]) == (429, "queue_full")
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["queue_depth"] == 3 == int(response.headers["x-queue-depth"])
    for generation in list(node.service.live()):
        generation.cancel()
    assert {(await reply).json()["finish_reason"] for reply in waiting} == {"cancelled"}


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.DRAINING, ModelState.FAILED])
async def test_a_model_that_is_not_ready_is_503(
    node: ScriptedNode, port: httpx2.AsyncClient, state: ModelState
) -> None:
    node.demo.state, node.demo.reason = state, "out of memory"
    response = await post(port, {"input": "x"})
    assert response.status_code == 503
    assert response.json()["code"] == ("draining" if state is ModelState.DRAINING else "model_not_loaded")
    assert ("retry-after" in response.headers) == (state is not ModelState.FAILED)


async def test_a_dead_engine_is_a_500_with_its_reason(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    node.engine.answer = None
    reply = asyncio.create_task(post(port, {"input": "x"}))
    node.engine.finish(await node.engine.until_submitted(), "error", "the engine died")
    response = await reply
    assert (response.status_code, response.json()["code"]) == (500, "engine_failed")
    assert "the engine died" in response.json()["error"]


@pytest.mark.parametrize("phase", ["waiting", "decode"])
async def test_a_client_that_goes_away_cancels_its_generation(
    node: ScriptedNode, port: httpx2.AsyncClient, phase: str
) -> None:
    node.engine.answer = None
    other = asyncio.create_task(post(port, {"input": "stays"}))
    kept = await node.engine.until_submitted()
    events = node.events.subscribe()
    client = await RawClient.connect(port)
    client.post(b'{"input": "x", "req_id": "gone"}')
    sequence = await node.engine.until_submitted()
    if phase == "decode":
        node.engine.start(sequence)
        node.engine.emit(sequence, "Hel")
    await client.close()
    assert await node.engine.until_cancelled() is sequence
    async for event in events:
        if isinstance(event, RequestFinished):
            assert (event.req_id, event.finish_reason) == ("gone", "cancelled")
            break
    node.engine.start(kept)
    node.engine.finish(kept)
    assert (await other).json()["finish_reason"] == "stop"
    assert node.engine.cancelled.empty()


async def test_a_client_that_goes_away_in_mid_body_is_forgotten(
    node: ScriptedNode, port: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = await RawClient.connect(port)
    client.send("POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: 100", b'{"input"')
    await client.writer.drain()
    await client.close()
    await port.server.close()  # type: ignore[attr-defined]
    assert node.engine.submitted.empty()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
