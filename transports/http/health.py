"""`GET /healthz`: whether this port can be sent work, in a status code that probes and scripts can wait for.

Apart from the rest because it must answer in every state, without a key, and because others start by it.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from engine.worker import Worker
from infsvc.types import ModelState
from transports.http.body import query
from transports.http.refusals import Json

if TYPE_CHECKING:
    from transports.node import Node

BUS_PATIENCE_S = 3.0
"""How long after its start a node's gateway waits for the bus before it is healthy without one."""


class Health:
    """The health route of one model's port, or of the gateway when `model` is None."""

    def __init__(self, node: Node, model: str | None) -> None:
        self._node, self._model = node, model

    async def show(self, request: Request) -> Json:
        """200 when work is welcome, else 503 with what is missing."""
        query(request)
        healthy, body = self._gateway() if self._model is None else self._worker(self._model)
        return Json(body, status_code=200 if healthy else 503, headers={"Cache-Control": "no-store"})

    def _worker(self, model: str) -> tuple[bool, dict[str, Any]]:
        worker = self._node.fleet.get(model)
        healthy = worker.state is ModelState.READY
        return healthy, {"status": "ok" if healthy else worker.state.health_status, "model": model} | _state(worker)

    def _gateway(self) -> tuple[bool, dict[str, Any]]:
        node = self._node
        asked = [worker for worker in node.fleet.workers.values() if worker.asked]
        settled = all(worker.state in (ModelState.READY, ModelState.FAILED) for worker in asked)
        ready = any(worker.state is ModelState.READY for worker in asked)
        stopping = node.stopping.is_set() or node.service.draining
        healthy = settled and ready and self._bus_decided() and not stopping
        if healthy:
            status = "ok"
        elif stopping:
            status = "draining"
        else:
            status = "failed" if asked and settled and not ready else "loading"
        bus = node.bus.state
        return healthy, {
            "status": status,
            "node": node.name,
            "models": {worker.name: _state(worker) for worker in asked},
            "bus": {"status": bus.status, "url": bus.url} | ({"reason": bus.reason} if bus.reason else {}),
        }

    def _bus_decided(self) -> bool:
        status = self._node.bus.state.status
        return status in ("connected", "off") or (status == "down" and self._uptime_s() >= BUS_PATIENCE_S)

    def _uptime_s(self) -> float:
        return time.time() - datetime.fromisoformat(self._node.start_time).timestamp()


def _state(worker: Worker) -> dict[str, Any]:
    state: dict[str, Any] = {"state": worker.state.value}
    if worker.reason is not None:
        state["reason"] = worker.reason
    if worker.progress is not None:
        state["progress"] = worker.progress
    return state
