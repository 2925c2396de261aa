"""`stream: true`: framing, keep-alive, clients that go, and what a stream ends with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from engine.capabilities import CapabilityClaim
from engine.sequence import Sequence
from infsvc.types import Capability
from tests.transports.http.conftest import RawClient, ScriptedNode
from transports.http import native

BODY = {"input": "x", "req_id": "r", "stream": True}


def events(text: str) -> list[Any]:
    frames = text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


@asynccontextmanager
async def streaming(
    node: ScriptedNode, client: httpx2.AsyncClient, **extra: Any
) -> AsyncIterator[tuple[httpx2.Response, AsyncIterator[str], Sequence]]:
    """A stream whose engine waits for the test."""
    node.engine.answer = None
    async with client.stream("POST", "/v1/completions", json=BODY | extra) as response:
        yield response, response.aiter_lines(), await node.engine.until_submitted()


async def next_event(lines: AsyncIterator[str]) -> Any:
    line = await anext(lines)
    assert await anext(lines) == ""
    return json.loads(line.removeprefix("data: "))


async def test_a_stream_is_chunks_in_order_and_then_the_reply(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    node.engine.answer = ["Hel", "", "lo\n\n", "ü"]
    response = await port.post("/v1/completions", json=BODY)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-req-id"] == "r"
    *chunks, last = events(response.text)
    assert chunks == [
        {"req_id": "r", "index": 0, "text": "Hel"},
        {"req_id": "r", "index": 1, "text": "lo\n\n"},
        {"req_id": "r", "index": 2, "text": "ü"},
    ]
    assert (last["done"], last["text"], last["finish_reason"], last["tokens_out"]) == (True, "Hello\n\nü", "stop", 4)


async def test_a_chunk_is_sent_when_it_is_decoded(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    async with streaming(node, port) as (response, lines, sequence):
        assert response.status_code == 200
        node.engine.start(sequence)
        for text in ("a", "b"):
            node.engine.emit(sequence, text)
            assert (await next_event(lines))["text"] == text
        node.engine.finish(sequence, "length")
        assert (await next_event(lines))["finish_reason"] == "length"


async def test_the_connection_is_used_again_after_a_stream(port: httpx2.AsyncClient) -> None:
    client = await RawClient.connect(port)
    for _ in range(2):
        client.post(json.dumps(BODY).encode())
        assert "200 OK" in await client.head()
        await asyncio.wait_for(client.reader.readuntil(b"0\r\n\r\n"), 5)
    await client.close()


async def test_a_refusal_before_the_first_byte_has_its_own_status(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    response = await port.post("/v1/completions", json=BODY | {"input": "x " * 2000})
    assert (response.status_code, response.json()["code"]) == (400, "context_length_exceeded")


async def test_a_stream_that_waits_says_so(
    node: ScriptedNode, port: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "QUIET_S", 0.01)
    async with streaming(node, port) as (_, lines, sequence):
        assert [await anext(lines) for _ in range(4)] == [": waiting", "", ": waiting", ""]
        node.engine.finish(sequence)
        frames = [line async for line in lines if line.startswith("data: ")]
    assert json.loads(frames[0].removeprefix("data: "))["done"] is True


@pytest.mark.parametrize("n_chunks", [0, 2])
async def test_a_client_that_goes_away_cancels_its_generation(
    node: ScriptedNode, port: httpx2.AsyncClient, n_chunks: int
) -> None:
    async with streaming(node, port) as (_, lines, sequence):
        for _ in range(n_chunks):
            node.engine.emit(sequence, "a")
            await next_event(lines)
    assert await node.engine.until_cancelled() is sequence


async def test_a_cancelled_stream_ends_with_its_reply(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    async with streaming(node, port) as (_, lines, sequence):
        node.engine.emit(sequence, "a")
        await next_event(lines)
        generation = node.service.find("r")
        assert generation is not None
        generation.cancel()
        last = await next_event(lines)
        assert (last["finish_reason"], last["text"], last["done"]) == ("cancelled", "a", True)


async def test_an_engine_that_dies_in_mid_stream_ends_it_with_the_error(
    node: ScriptedNode, port: httpx2.AsyncClient
) -> None:
    async with streaming(node, port) as (_, lines, sequence):
        node.engine.emit(sequence, "a")
        await next_event(lines)
        node.engine.finish(sequence, "error", "the engine died")
        last = await next_event(lines)
        assert (last["req_id"], last["code"], last["status"], last["done"]) == ("r", "engine_failed", 500, True)
        assert "the engine died" in last["error"]
        assert [line async for line in lines] == []


async def test_a_fault_in_mid_stream_ends_it_without_internals(
    node: ScriptedNode, port: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("engine.generation.Generation.result", broken)
    response = await port.post("/v1/completions", json=BODY)
    assert "secret" not in response.text
    assert events(response.text)[-1]["code"] == "internal"
    assert "ZeroDivisionError: secret" in caplog.text


async def test_thinking_stands_in_the_reply_and_in_no_chunk(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    node.demo.claims = (CapabilityClaim(Capability.REASONING, True, "the test says so"),)
    node.engine.answer = ["<think>", "hm", "</think>", "yes", "!"]
    response = await port.post("/v1/completions", json=BODY)
    *chunks, last = events(response.text)
    assert [(chunk["index"], chunk["text"]) for chunk in chunks] == [(0, "yes"), (1, "!")]
    assert (last["reasoning"], last["text"]) == ("hm", "yes!")


async def test_a_shutdown_in_mid_stream_ends_it_with_its_reply(node: ScriptedNode, port: httpx2.AsyncClient) -> None:
    async with streaming(node, port) as (_, lines, sequence):
        node.engine.emit(sequence, "a")
        await next_event(lines)
        await node.service.drain(0)
        node.stopping.set()
        async with asyncio.timeout(2):
            last = await next_event(lines)
            assert (last["finish_reason"], last["done"]) == ("cancelled", True)
            await port.server.close()  # type: ignore[attr-defined]


async def test_a_stream_that_nobody_ends_is_dropped_at_a_shutdown(
    node: ScriptedNode, port: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transports.http.server.GRACE_S", 0.05)
    async with streaming(node, port) as (_, lines, sequence):
        async with asyncio.timeout(2):
            await port.server.close()  # type: ignore[attr-defined]
            assert await node.engine.until_cancelled() is sequence
        with pytest.raises(httpx2.TransportError):
            await anext(lines)
    # It was told that its client is gone; a task that is cancelled instead leaves a traceback.
    assert caplog.records == []
