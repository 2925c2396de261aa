"""The durable queue over HTTP: what waits in it, and the dead letters: listed, replayed, deleted.

| route | answer |
|---|---|
| `GET /api/queue` | each model's queue: waiting, taken, capacity, or why requests are not kept |
| `DELETE /api/queue/<m>` | removes what waits; each caller is told |
| `GET /api/dead?model=&after=&limit=` | dead letters, oldest first |
| `POST /api/dead/<id>/replay` | back into its queue |
| `DELETE /api/dead/<id>` | forgotten |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request

from infsvc.errors import BadRequest
from transports.http.body import no_fields, query
from transports.http.refusals import Json

if TYPE_CHECKING:
    from transports.node import Node

MAX_PAGE = 1000
_DEFAULT_PAGE = 100


class DeadLetterRoutes:
    """The routes of the durable queue; the same on every port of the node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def queues(self, request: Request) -> Json:
        """`GET /api/queue`: each model's durable queue, or why requests are not kept."""
        query(request)
        return Json({"queues": await self._node.queue_desk.overview()})

    async def purge(self, request: Request) -> Json:
        """`DELETE /api/queue/<m>`: removes what waits in a model's queue; each caller is told."""
        query(request)
        model = request.path_params["model"]
        return Json({"model": model, "removed": await self._node.queue_desk.purge(model)})

    async def letters(self, request: Request) -> Json:
        """`GET /api/dead`: dead letters, oldest first; the next page begins behind the last id."""
        asked = query(request, {"model", "after", "limit"})
        model = asked.get("model")
        if model is not None:
            self._node.fleet.get(model)
        letters = await self._node.durable.dead.page(
            model=model,
            after=_number(asked.get("after"), "after", least=0, most=2**63, default=0),
            limit=_number(asked.get("limit"), "limit", least=1, most=MAX_PAGE, default=_DEFAULT_PAGE),
        )
        return Json({"dead": [letter.wire() for letter in letters], "total": await self._node.durable.dead.count()})

    async def replay(self, request: Request) -> Json:
        """`POST /api/dead/<id>/replay`: puts a dead letter back into its queue."""
        query(request)
        await no_fields(request)
        letter = await self._node.durable.dead.replay(_id(request))
        return Json({"id": letter.id, "model": letter.model, "req_id": letter.req_id, "replayed": True})

    async def delete(self, request: Request) -> Json:
        """`DELETE /api/dead/<id>`: forgets a dead letter."""
        query(request)
        number = _id(request)
        await self._node.durable.dead.delete(number)
        return Json({"id": number, "deleted": True})


def _id(request: Request) -> int:
    return _number(request.path_params["id"], "id", least=1, most=2**63, default=0)


def _number(text: str | None, param: str, *, least: int, most: int, default: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most):
        raise BadRequest(f"{param}: a whole number from {least} to {most}", param=param)
    return int(text)
