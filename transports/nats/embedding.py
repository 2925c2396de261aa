"""An embedding model's subject: a message in, OpenAI's list with its `req_id` out."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import ValidationError

from engine.embedding import EmbeddingRequest
from engine.service import InferenceService
from infsvc.embedding_types import EmbeddingBody
from infsvc.errors import BadRequest
from infsvc.wire_input import complaint
from transports.nats.messages import check_address


def validate_embedding(body: dict[str, Any], *, model: str, has_reply: bool) -> EmbeddingBody:
    """The request in a message on this model's subject; see `messages.validate`."""
    if "input" not in body:
        raise BadRequest("input: a text, a list of texts, or token ids", param="input")
    try:
        request = EmbeddingBody.model_validate(body)
    except ValidationError as error:
        raise complaint(error) from None
    check_address(request, model=model, has_reply=has_reply)
    return request


async def embed(service: InferenceService, request: EmbeddingRequest) -> dict[str, Any]:
    """The answer to a request; leaving early cancels it."""
    async with await service.embed(request) as embedding:
        result = await embedding.result()
    loop = asyncio.get_running_loop()
    return {"req_id": request.req_id} | await loop.run_in_executor(None, result.wire)
