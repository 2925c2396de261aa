"""API keys, pages of other sites, and bodies that are too large."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx2
import pytest

from tests.transports.http.conftest import MakeNode, RawClient, ScriptedNode, Serve


@pytest.fixture
async def keyed(make_node: MakeNode, serve: Serve) -> httpx2.AsyncClient:
    return await serve(make_node(api_keys="first, sécond"))


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first"},
        {"Authorization": "bearer  first"},
        {"X-API-Key": "first"},
        {"X-API-Key": "sécond".encode()},
        {"Authorization": "Bearer wrong", "X-API-Key": "first"},
    ],
)
async def test_a_key_opens_the_door(keyed: httpx2.AsyncClient, headers: dict[str, str]) -> None:
    assert (await keyed.get("/api/services", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic first"},
        {"Authorization": "first"},
        {"X-API-Key": ""},
        {"X-API-Key": "first,"},
        {"X-API-Key": b"\xff\xfe"},
    ],
)
async def test_without_one_it_stays_shut(keyed: httpx2.AsyncClient, headers: dict[str, str]) -> None:
    for path in ("/api/services", "/nothing"):
        response = await keyed.get(path, headers=headers)
        assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


async def test_health_needs_no_key(keyed: httpx2.AsyncClient) -> None:
    assert (await keyed.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://[::1]:80"},
        {"Host": "localhost:5780"},
        {"Host": "192.168.1.4"},
        {"Host": "[::1]:5780"},
        {"Host": "host.docker.internal:5780"},
    ],
)
async def test_programs_and_local_pages_may_come_in(gateway: httpx2.AsyncClient, headers: dict[str, str]) -> None:
    assert (await gateway.get("/healthz", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://[bad"},
        {"Host": "evil.example:5780"},
        {"Host": "[bad"},
    ],
)
async def test_pages_of_other_sites_may_not(gateway: httpx2.AsyncClient, headers: dict[str, str]) -> None:
    response = await gateway.post("/v1/completions", json={"input": "x"}, headers=headers)
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert "access-control-allow-origin" not in response.headers


async def test_with_keys_any_page_may_that_has_one(keyed: httpx2.AsyncClient) -> None:
    headers = {"Origin": "https://mine.example", "X-API-Key": "first"}
    assert (await keyed.get("/api/services", headers=headers)).status_code == 200


def body_of(n_bytes: int) -> bytes:
    """A valid request of that many bytes; its words are few."""
    start = b'{"raw": true, "input": "'
    return start + b"x" * (n_bytes - len(start) - 2) + b'"}'


async def test_five_megabytes_are_read(port: httpx2.AsyncClient) -> None:
    assert (await port.post("/v1/completions", content=body_of(5 * 2**20))).status_code == 200
    assert (await port.post("/v1/completions", content=body_of(8 * 2**20))).status_code == 200


async def in_pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 2**20):
        yield data[start : start + 2**20]


@pytest.mark.parametrize("chunked", [False, True])
async def test_nine_are_refused_and_the_connection_stays_usable(
    node: ScriptedNode, port: httpx2.AsyncClient, chunked: bool
) -> None:
    data = body_of(9 * 2**20)
    for _ in range(2):
        response = await port.post("/v1/completions", content=in_pieces(data) if chunked else data)
        assert (response.status_code, response.json()["code"]) == (413, "too_large")
        assert (await port.post("/v1/completions", json={"input": "x"})).status_code == 200
    assert node.engine.submitted.qsize() == 2


async def test_a_declared_length_is_refused_before_the_body_comes(port: httpx2.AsyncClient) -> None:
    client = await RawClient.connect(port)
    client.send(f"POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: {9 * 2**20}")
    assert "413 " in await client.head()
    await client.close()


async def test_an_announced_body_that_is_refused_closes_the_connection(port: httpx2.AsyncClient) -> None:
    client = await RawClient.connect(port)
    client.send(f"POST /v1/completions HTTP/1.1\nHost: localhost\nExpect: 100-continue\nContent-Length: {9 * 2**20}")
    head = await client.head()
    assert head.startswith("HTTP/1.1 413")
    assert "connection: close" in head
    assert json.loads(await client.rest())["status"] == 413
    await client.close()
