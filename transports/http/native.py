"""`POST /v1/completions` in the native shape: validates, hands to the service, frames what comes back. Bodies with a
`prompt` go to `openai`.

What a request means is the service's; this file knows bodies, headers, status codes and server-sent events.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from engine.generation import Generation
from engine.service import InferenceRequest
from infsvc.errors import BadRequest, ClientGone, RequestError, Unsupported
from infsvc.openai_types import INERT
from infsvc.types import MAX_TRACE_CHARACTERS, CompletionChunk, CompletionRequest
from infsvc.wire_input import complaint
from transports.http.body import query, read_object
from transports.http.callers import caller
from transports.http.refusals import Internal, Json, req_id_header
from transports.http.streams import EventStream, comment, data, present

if TYPE_CHECKING:
    from transports.http.choice import ModelChoice
    from transports.http.openai import OpenAI
    from transports.node import Node

log = logging.getLogger("infsvc.http")

QUIET_S = 10.0
"""After how long without an event a stream says that it still waits."""

TRACE_HEADER = "X-Trace-ID"
_REQ_ID_CHARACTERS = 200


class Completions:
    """The native completion route.

    Args:
        choice: finds the model that a request is for.
        openai: takes bodies with a `prompt`.
    """

    def __init__(self, node: Node, choice: ModelChoice, openai: OpenAI) -> None:
        self._node, self._choice, self._openai = node, choice, openai

    async def create(self, request: Request) -> Response:
        """Answers with the reply, or with a stream of it."""
        query(request)
        body = await read_object(request)
        if "prompt" in body:
            if "input" in body:
                raise BadRequest("the body has both input and prompt: give one of them", param="input")
            request.state.openai_shaped = True
            return await self._openai.text(request, body)
        req_id = body.get("req_id")
        if isinstance(req_id, str) and 0 < len(req_id) <= _REQ_ID_CHARACTERS:
            request.state.req_id = req_id
        wire = _validated(body)
        inference = InferenceRequest.from_wire(
            wire,
            model=self._choice.of(wire.model),
            source="http",
            trace_id=trace_header(request),
            client=caller(request),
        )
        request.state.req_id = inference.req_id
        return await (self._stream(inference) if wire.stream else self._reply(inference, request))

    async def _reply(self, inference: InferenceRequest, request: Request) -> Response:
        async with present(request.receive) as client, await self._node.service.submit(inference) as generation:
            client.when_gone(generation.cancel)
            reply = await generation.result()
            gone = client.gone
        if gone:
            raise ClientGone("the client went away before its answer was ready")
        return Json(reply.wire(), headers=req_id_header(reply.req_id))

    async def _stream(self, inference: InferenceRequest) -> Response:
        generation = await self._node.service.submit(inference)
        return EventStream(
            _frames(generation),
            stop=generation.cancel,
            quiet=comment("waiting"),
            quiet_s=QUIET_S,
            headers=req_id_header(generation.req_id),
        )


async def _frames(generation: Generation) -> AsyncGenerator[bytes, None]:
    """An event for each step that yields text, then the reply, or the error in its place."""
    req_id, index = generation.req_id, 0
    try:
        async for chunk in generation:
            if chunk.text:
                yield data(CompletionChunk(req_id=req_id, index=index, text=chunk.text).model_dump())
                index += 1
        last = (await generation.result()).wire()
    except RequestError as error:
        last = error.native(req_id)
    except Exception:
        log.exception(
            "a stream failed", extra={"code": "http.failed", "meta": {"req_id": req_id}, "model": generation.model}
        )
        last = Internal().native(req_id)
    yield data(last | {"done": True})


def _validated(body: dict[str, Any]) -> CompletionRequest:
    if "input" not in body and "messages" not in body:
        raise BadRequest("the body has no input: send the text as input, or a chat as messages", param="input")
    if "reply_to" in body:
        raise Unsupported("reply_to", "over HTTP the response is the answer; over NATS a copy goes there")
    try:
        return CompletionRequest.model_validate({key: value for key, value in body.items() if key not in INERT})
    except ValidationError as error:
        raise complaint(error) from None


def trace_header(request: Request) -> str | None:
    """The trace id that the header names; raises `BadRequest` for one that is too long."""
    header = request.headers.get(TRACE_HEADER)
    if header is not None and len(header) > MAX_TRACE_CHARACTERS:
        raise BadRequest(
            f"{TRACE_HEADER} has {len(header)} characters: {MAX_TRACE_CHARACTERS} are allowed", param=TRACE_HEADER
        )
    return header or None
