"""What operators and dashboards ask of a node: audit rows, services, live requests, events, load and unload.

Every route answers for the whole node on each of its ports; only `/logs` is a model's own on the model's port.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any, get_args

from starlette.requests import Request
from starlette.responses import Response

from engine.model_source import describe
from engine.worker import Worker
from infsvc.audit import AuditStatus
from infsvc.errors import (
    BadRequest,
    ConfigError,
    LoadError,
    NotFound,
    StartError,
    UnknownModel,
    UnknownRequest,
    shown,
)
from infsvc.events import Subscription
from infsvc.roster import iso, uptime_ns
from infsvc.types import ModelState
from transports.http.body import no_fields, query, read_object
from transports.http.refusals import CannotLoad, Json
from transports.http.streams import EventStream, beside, comment, data
from transports.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from transports.node import Node

QUIET_S = 15.0
"""After how long without an event `/api/events` sends a comment."""

MAX_ROWS = 1000
_DEFAULT_ROWS = 50
_STATUSES = get_args(AuditStatus)
_IN_MEMORY = (ModelState.LOADING, ModelState.READY, ModelState.DRAINING)


class Admin:
    """The routes under `/api`, and `/logs`.

    Args:
        model: the one model of this port, or None on the gateway.
    """

    def __init__(self, node: Node, model: str | None) -> None:
        self._node, self._model = node, model
        self._unloads: set[asyncio.Task[None]] = set()

    async def logs(self, request: Request) -> Json:
        """`GET /logs`: audit rows, newest first."""
        asked = query(request, {"model", "limit", "status", "since"})
        rows = await self._node.logs.rows(
            self._log_model(asked.get("model")),
            limit=_limit(asked.get("limit")),
            status=_status(asked.get("status")),
            since=_since(asked.get("since")),
        )
        return Json({"rows": rows})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: every model's figures, for Prometheus."""
        query(request)
        return Response(self._node.metrics.page(), media_type=CONTENT_TYPE)

    def _log_model(self, named: str | None) -> str:
        if self._model is not None:
            if named not in (None, self._model):
                raise BadRequest(
                    f"this is the port of {self._model}: ask {shown(named or '')}'s port, or the gateway", param="model"
                )
            return self._model
        if named is not None:
            return self._node.fleet.get(named).name
        return self._node.service.resolve(None).name

    async def services(self, request: Request) -> Json:
        """`GET /api/services`: every model of this node, then those of other nodes on its broker."""
        query(request)
        own = [self._service(worker) for worker in self._node.fleet.workers.values()]
        return Json({"services": own + [each.model_dump() for each in self._node.registry.services()]})

    async def service(self, request: Request) -> Json:
        """`GET /api/services/<m>`: this node's own model, else another node's; `?node=` picks."""
        model, node = request.path_params["model"], query(request, {"node"}).get("node")
        own = self._node.fleet.workers.get(model)
        if own is not None and node in (None, self._node.name):
            return Json(self._service(own))
        other = self._node.registry.find(model, node)
        if other is not None:
            return Json(other.model_dump())
        known = {*self._node.fleet.workers, *self._node.registry.roster.models()}
        if node is not None and model in known:
            raise NotFound(f"{shown(node)} is no node on this broker that has {model}")
        raise UnknownModel(model, sorted(known))

    def _service(self, worker: Worker) -> dict[str, Any]:
        begun_s = time.perf_counter()
        document = worker.health().model_dump()
        in_process_ms = round((time.perf_counter() - begun_s) * 1000, 3)
        now_s = time.time()
        return document | {
            "first_seen": self._node.start_time,
            "last_seen": iso(now_s),
            "uptime": uptime_ns(self._node.start_time, now_s),
            # Over the broker as others see it; without one, what the document itself takes.
            "response_time_ms": self._node.registry.own_response_time_ms.get(worker.name, in_process_ms),
            "tokens_per_s": round(worker.stats.tokens_per_s(), 1),
            "worker_count": worker.n_slots,
            "local": True,
            "state": worker.state.value,
            "file": self._file(worker),
            "claims": [
                {"capability": claim.capability.value, "present": claim.present, "evidence": claim.evidence}
                for claim in worker.claims
            ],
            "engine": asdict(worker.counters)
            | {"mean_batch_sequences": round(worker.counters.mean_batch_sequences, 3)},
        }

    @staticmethod
    def _file(worker: Worker) -> dict[str, Any]:
        """The model's file: where it is or would be, where it comes from, and how far a download of it is."""
        facts: dict[str, Any] = {
            "path": str(worker.path),
            "size_bytes": worker.path.stat().st_size if worker.path.is_file() else None,
            "source": describe(worker.settings) or None,
        }
        if worker.pull is not None:
            pull = worker.pull
            facts |= {
                "done_bytes": pull.done_bytes,
                "total_bytes": pull.total_bytes,
                "bytes_per_s": pull.bytes_per_s,
                "eta_s": pull.eta_s,
            }
        return facts

    async def requests(self, request: Request) -> Json:
        """`GET /api/requests`: what runs and waits, in order of arrival; `position` counts those that wait from 1."""
        query(request)
        live: list[dict[str, Any]] = []
        for worker in self._node.fleet.workers.values():
            position = 0
            for generation in worker.requests.values():
                facts = generation.facts()
                waits = facts["state"] == "waiting"
                position += waits
                live.append(facts | {"position": position if waits else 0})
        return Json({"requests": live})

    async def cancel(self, request: Request) -> Json:
        """`DELETE /api/requests/<req_id>`: ends it soon, as `cancelled`."""
        query(request)
        req_id = request.path_params["req_id"]
        generation = self._node.service.find(req_id)
        if generation is None and await self._node.queue_desk.cancel(req_id):
            return Json({"req_id": req_id, "cancelled": True})
        if generation is None and await self._node.forwarder.cancel(req_id):
            return Json({"req_id": req_id, "cancelled": True})
        if generation is None:
            raise UnknownRequest(f"no request {shown(req_id)} runs or waits here: it may have ended")
        generation.cancel()
        return Json({"req_id": req_id, "cancelled": True})

    async def load(self, request: Request) -> Json:
        """`POST /api/models/<m>/load`: begins to load; progress is on `/api/events`."""
        query(request)
        body = await read_object(request) if await request.body() else {}
        force = body.get("force", False)
        if not isinstance(force, bool):
            raise BadRequest("force: true or false", param="force")
        for key in body.keys() - {"force"}:
            raise BadRequest(f"{shown(key)}: there is no such field", param=shown(key))
        try:
            worker = await self._node.load(request.path_params["model"], force=force)
        except (StartError, ConfigError) as error:
            raise CannotLoad(str(error)) from error
        return Json({"model": worker.name, "state": worker.state.value}, status_code=202)

    async def pull(self, request: Request) -> Json:
        """`POST /api/models/<m>/pull`: begins to fetch the model's missing file; progress is on `/api/events`."""
        query(request)
        await no_fields(request)
        try:
            worker = await self._node.pull(request.path_params["model"])
        except (LoadError, ConfigError) as error:
            raise CannotLoad(str(error)) from error
        return Json({"model": worker.name, "state": worker.state.value}, status_code=202)

    async def remove_file(self, request: Request) -> Json:
        """`DELETE /api/models/<m>/file`: removes the file of a model that is not in memory."""
        query(request)
        name = request.path_params["model"]
        try:
            n_bytes = await self._node.remove_file(name)
        except LoadError as error:
            raise CannotLoad(str(error)) from error
        return Json({"model": name, "freed_bytes": n_bytes})

    async def unload(self, request: Request) -> Json:
        """`POST /api/models/<m>/unload`: answers when the memory is free."""
        query(request)
        await no_fields(request)
        worker = self._node.fleet.get(request.path_params["model"])
        subscription = self._node.events.subscribe()
        unload = asyncio.create_task(self._node.unload(worker.name), name=f"unload-{worker.name}")
        self._unloads.add(unload)
        unload.add_done_callback(self._unloads.discard)
        try:
            if worker.name == self._model:
                # An unload also closes the port that this answer goes through, and that waits for the answer.
                async with beside(_until_free(worker, subscription), "http-unload") as free:
                    await asyncio.wait({unload, free}, return_when=asyncio.FIRST_COMPLETED)
                    if unload.done():
                        await unload
            else:
                await asyncio.shield(unload)
        finally:
            subscription.close()
        return Json({"model": worker.name, "state": worker.state.value})

    async def events(self, request: Request) -> Response:
        """`GET /api/events`: what happens from now on, as server-sent events."""
        query(request)
        subscription = self._node.events.subscribe()
        return EventStream(
            _event_frames(subscription, self._node.stopping),
            stop=subscription.close,
            quiet=comment("quiet"),
            quiet_s=QUIET_S,
        )


async def _until_free(worker: Worker, subscription: Subscription) -> None:
    """Waits until the model has left memory, or is found never to have been in it."""
    if worker.state in _IN_MEMORY:
        async for _ in subscription:
            if worker.state not in _IN_MEMORY:
                return


async def _event_frames(subscription: Subscription, stopping: asyncio.Event) -> AsyncGenerator[bytes, None]:
    """Each event from now on, until the subscription is closed or the node stops."""
    n_lost = 0
    async with beside(_close_when(stopping, subscription), "http-events-stopping"):
        async for event in subscription:
            if subscription.n_lost > n_lost:
                yield comment(f"{subscription.n_lost - n_lost} events lost: read faster")
                n_lost = subscription.n_lost
            yield data(event.wire(), event=event.type)


async def _close_when(stopping: asyncio.Event, subscription: Subscription) -> None:
    await stopping.wait()
    subscription.close()


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_ROWS
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_ROWS):
        raise BadRequest(f"limit: a number from 1 to {MAX_ROWS}", param="limit")
    return int(text)


def _status(text: str | None) -> str | None:
    if text is not None and text not in _STATUSES:
        raise BadRequest(f"status: one of {', '.join(_STATUSES)}", param="status")
    return text


def _since(text: str | None) -> float | None:
    """Seconds since the epoch, from a number or an RFC 3339 time."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            # The + of an offset, sent unescaped, arrives as a space.
            moment = datetime.fromisoformat(text.replace(" ", "+"))
            seconds = moment.timestamp() if moment.tzinfo is not None else math.nan
        except (ValueError, OverflowError):
            seconds = math.nan
    if not math.isfinite(seconds):
        raise BadRequest("since: seconds since the epoch, or a time such as 2025-06-01T12:00:00Z", param="since")
    return seconds
