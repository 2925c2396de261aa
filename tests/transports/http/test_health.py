"""`GET /healthz` in every state of a model, of the bus and of the node."""

from __future__ import annotations

import httpx2
import pytest

from infsvc.types import ModelState
from tests.transports.http.conftest import ScriptedNode

LONG_AGO = "2020-01-01T00:00:00.000Z"


async def test_a_models_port_is_ok_when_it_answers(port: httpx2.AsyncClient) -> None:
    response = await port.get("/healthz")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "model": "demo", "state": "ready"}
    assert (await port.head("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (ModelState.LOADING, "loading"),
        (ModelState.DRAINING, "draining"),
        (ModelState.FAILED, "failed"),
        (ModelState.ON_DISK, "offline"),
    ],
)
async def test_else_it_is_503_with_state_reason_and_progress(
    node: ScriptedNode, port: httpx2.AsyncClient, state: ModelState, status: str
) -> None:
    node.demo.state, node.demo.reason, node.demo.progress = state, "why", 0.5
    response = await port.get("/healthz")
    assert response.status_code == 503
    assert response.json() == {
        "status": status,
        "model": "demo",
        "state": state.value,
        "reason": "why",
        "progress": 0.5,
    }


async def test_the_gateway_shows_every_asked_model_and_the_bus(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    response = await gateway.get("/healthz")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "node": "testnode",
        "models": {"demo": {"state": "ready"}},
        "bus": {"status": "connected", "url": "nats://127.0.0.1:5700"},
    }


async def test_the_gateway_waits_for_every_asked_model(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    other = node.fleet.get("nomic-embed-v1.5")
    other.asked, other.state, other.progress = True, ModelState.LOADING, 0.25
    response = await gateway.get("/healthz")
    assert (response.status_code, response.json()["status"]) == (503, "loading")
    assert response.json()["models"]["nomic-embed-v1.5"] == {"state": "loading", "progress": 0.25}
    other.state, other.reason, other.progress = ModelState.FAILED, "no memory", None
    response = await gateway.get("/healthz")
    assert response.status_code == 200
    assert response.json()["models"]["nomic-embed-v1.5"] == {"state": "failed", "reason": "no memory"}


async def test_the_gateway_needs_one_model_that_is_ready(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    node.demo.state = ModelState.FAILED
    response = await gateway.get("/healthz")
    assert (response.status_code, response.json()["status"]) == (503, "failed")
    node.demo.asked = False
    response = await gateway.get("/healthz")
    assert (response.status_code, response.json()["models"]) == (503, {})


@pytest.mark.parametrize(
    ("status", "start_time", "expected"),
    [
        ("off", None, 200),
        ("starting", None, 503),
        ("down", None, 503),
        ("down", LONG_AGO, 200),
        ("connected", LONG_AGO, 200),
    ],
)
async def test_the_gateway_gives_the_bus_three_seconds(
    node: ScriptedNode, gateway: httpx2.AsyncClient, status: str, start_time: str | None, expected: int
) -> None:
    node.start_time = start_time or node.start_time
    node.bus.state.status, node.bus.state.reason = status, "refused"
    response = await gateway.get("/healthz")
    assert response.status_code == expected
    assert response.json()["bus"]["reason"] == "refused"


async def test_a_node_that_stops_is_not_healthy(node: ScriptedNode, gateway: httpx2.AsyncClient) -> None:
    await node.service.drain(0)
    response = await gateway.get("/healthz")
    assert (response.status_code, response.json()["status"]) == (503, "draining")
