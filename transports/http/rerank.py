"""`POST /v1/rerank`, Jina's shape: validates, hands to the service, frames the order. Its errors are OpenAI's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.requests import Request

from engine.rerank import RerankRequest
from infsvc.errors import BadRequest
from infsvc.rerank_types import RerankBody
from infsvc.wire_input import complaint
from transports.http.body import query, read_object
from transports.http.choice import ModelChoice
from transports.http.native import trace_header
from transports.http.refusals import Json, req_id_header
from transports.http.streams import while_present

if TYPE_CHECKING:
    from transports.node import Node


class Rerank:
    """The route.

    Args:
        choice: finds the model that a request is for.
    """

    def __init__(self, node: Node, choice: ModelChoice) -> None:
        self._node, self._choice = node, choice

    async def create(self, request: Request) -> Json:
        """Answers with the documents' scores, the best first."""
        query(request)
        wire = _validated(await read_object(request))
        asked = RerankRequest.from_wire(
            wire, model=self._choice.of(wire.model), source="http", trace_id=trace_header(request)
        )
        request.state.req_id = asked.req_id
        async with await self._node.service.rerank(asked) as reranking:
            await while_present(request.receive, reranking)
            result = await reranking.order()
        return Json(result.wire(), headers=req_id_header(asked.req_id))


def _validated(body: dict[str, Any]) -> RerankBody:
    for name, what in (("query", "a text"), ("documents", "a list of texts")):
        if name not in body:
            raise BadRequest(f"the body has no {name}: send {what}", param=name)
    try:
        return RerankBody.model_validate(body)
    except ValidationError as error:
        raise complaint(error) from None
