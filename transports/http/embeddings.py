"""`POST /v1/embeddings`, OpenAI's shape: validates, hands to the service, frames the vectors.

Its errors are OpenAI's too; see `openai_shaped` in the app's boundary.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.requests import Request

from engine.embedding import EmbeddingRequest, EmbeddingResult
from infsvc.embedding_types import EmbeddingBody
from infsvc.errors import BadRequest, Unsupported
from infsvc.wire_input import complaint
from transports.http.body import query, read_object
from transports.http.choice import ModelChoice
from transports.http.native import trace_header
from transports.http.refusals import Ready, dumps, req_id_header
from transports.http.streams import while_present

if TYPE_CHECKING:
    from transports.node import Node


class Embeddings:
    """The embeddings route.

    Args:
        choice: finds the model that a request is for.
    """

    def __init__(self, node: Node, choice: ModelChoice) -> None:
        self._node, self._choice = node, choice

    async def create(self, request: Request) -> Ready:
        """Answers with OpenAI's list of vectors."""
        query(request)
        wire = _validated(await read_object(request))
        asked = EmbeddingRequest.from_wire(
            wire, model=self._choice.of(wire.model), source="http", trace_id=trace_header(request)
        )
        request.state.req_id = asked.req_id
        async with await self._node.service.embed(asked) as embedding:
            await while_present(request.receive, embedding)
            result = await embedding.result()
        # Thousands of numbers become text: not on the loop.
        body = await asyncio.get_running_loop().run_in_executor(self._node.fleet.pool, _encoded, result)
        return Ready(body, headers=req_id_header(asked.req_id))


def _encoded(result: EmbeddingResult) -> bytes:
    return dumps(result.wire())


def _validated(body: dict[str, Any]) -> EmbeddingBody:
    if "input" not in body:
        raise BadRequest("the body has no input: send a text, a list of texts, or token ids", param="input")
    if "reply_to" in body:
        raise Unsupported("reply_to", "over HTTP the response is the answer; over NATS a copy goes there")
    try:
        return EmbeddingBody.model_validate(body)
    except ValidationError as error:
        raise complaint(error) from None
