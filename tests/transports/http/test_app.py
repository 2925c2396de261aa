"""Routing and the boundary: what has no route, what breaks, and what the log says of it."""

from __future__ import annotations

import logging

import httpx2
import pytest

from tests.transports.http.conftest import ScriptedNode


async def test_an_unknown_path_is_a_json_404(gateway: httpx2.AsyncClient) -> None:
    for path in ("/v1/nothing", "/healthz/", "/api/models/demo/nothing", "/%00%0a"):
        response = await gateway.get(path)
        assert response.status_code == 404
        assert response.json()["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/healthz", "GET, HEAD"),
        ("GET", "/api/requests/r", "DELETE"),
        ("OPTIONS", "/api/models/a.b/load", "POST"),
        ("GET", "/api/models/demo/pull", "POST"),
        ("POST", "/api/models/demo/file", "DELETE"),
    ],
)
async def test_a_wrong_method_is_a_json_405_with_those_allowed(
    gateway: httpx2.AsyncClient, method: str, path: str, allowed: str
) -> None:
    response = await gateway.request(method, path)
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == allowed


async def test_the_root_lists_the_routes(gateway: httpx2.AsyncClient, port: httpx2.AsyncClient) -> None:
    told = (await gateway.get("/")).json()
    assert (told["service"], told["node"], told["model"]) == ("infsvc", "testnode", None)
    assert "POST /v1/completions" in told["routes"]
    assert "DELETE /api/requests/{req_id:path}" not in told["routes"]
    assert "DELETE /api/requests/{req_id}" in told["routes"]
    assert (await port.get("/")).json()["model"] == "demo"


async def test_a_fault_is_a_500_without_internals_and_a_traceback_in_the_log(
    node: ScriptedNode, port: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    node.engine.fault = ZeroDivisionError("secret")
    response = await port.post("/v1/completions", json={"input": "x", "req_id": "r"})
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert response.json()["req_id"] == response.headers["x-req-id"] == "r"
    assert "secret" not in response.text
    assert "ZeroDivisionError: secret" in caplog.text
    (record,) = [record for record in caplog.records if record.exc_info]
    assert (record.name, record.code, record.model) == ("infsvc.http", "http.failed", "demo")  # type: ignore[attr-defined]
    node.engine.fault = None
    assert (await port.post("/v1/completions", json={"input": "x"})).status_code == 200


async def test_the_log_holds_neither_bodies_nor_queries(
    port: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await port.post("/v1/completions?token=hidden", json={"input": "hidden"}, headers={"X-API-Key": "hidden"})
    (record,) = [record for record in caplog.records if getattr(record, "code", "") == "http.request"]
    assert record.meta["status"] == 400  # type: ignore[attr-defined]
    assert record.meta["path"] == "/v1/completions"  # type: ignore[attr-defined]
    ours = [record for record in caplog.records if record.name.startswith(("infsvc", "uvicorn"))]
    assert not [record for record in ours if "hidden" in str(vars(record))]
