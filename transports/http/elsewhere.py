"""The gateway's answer to a request for a model that another node runs: sent there, and answered as if it ran here.

A wrapper around the routes that run a model, because whether another node is asked shows only when the body is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from infsvc.errors import ClientGone, NodeLost
from infsvc.subjects import CLIENT_HEADER
from transports.forwarder import Forwarded, Forwarder, Outgoing, Refusal
from transports.http.callers import caller
from transports.http.choice import ServedElsewhere
from transports.http.native import QUIET_S, TRACE_HEADER
from transports.http.streams import EventStream, Presence, comment, data, present

if TYPE_CHECKING:
    from transports.node import Node

NODE_HEADER = "Infsvc-Node"
"""On every answer: the node that gave it."""

Result = TypeVar("Result")
Handler = Callable[[Request], Awaitable[Response]]

_SENT_ALONG = ("content-type", TRACE_HEADER.lower())
_OUR_OWN = frozenset({"content-length", "transfer-encoding", "connection", "date", "server"})


def node_header(node: str) -> tuple[bytes, bytes]:
    """`Infsvc-Node` as ASGI has it; what a header cannot carry is percent-encoded."""
    return NODE_HEADER.lower().encode(), quote(node, safe="!#$&'()*+,/:;=?@[]~ |^`{}\"<>\\").encode()


def fleet_wide(node: Node, handler: Handler) -> Handler:
    """The handler, with the models of other nodes."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except ServedElsewhere as found:
            return await _forward(node.forwarder, request, found)

    return handle


async def _forward(forwarder: Forwarder, request: Request, found: ServedElsewhere) -> Response:
    outgoing = Outgoing(
        method=request.method,
        path=request.scope["path"],
        headers=[(name, request.headers[name]) for name in _SENT_ALONG if name in request.headers]
        # Whose it is, as this node knows it: to the owner all would otherwise be one client's.
        + [(CLIENT_HEADER.lower(), caller(request).removeprefix("id "))],
        body=await request.body(),
    )
    async with present(request.receive) as client:
        taken = await _while_here(client, forwarder.send(outgoing, found.nodes))
        if isinstance(taken, Refusal):
            return _answer(taken.status, taken.headers, taken.body)
        if _streams(taken):
            return _passed_on(forwarder, taken, request)
        try:
            # Whole before it begins, so that a node that is lost is an error and no half answer.
            body = await _while_here(client, taken.body())
        finally:
            await forwarder.done(taken)
        return _answer(taken.status, taken.headers, body)


async def _while_here(client: Presence, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes: `ClientGone`."""
    task = asyncio.ensure_future(work)

    def leave() -> None:
        task.cancel()

    client.when_gone(leave)
    try:
        return await task
    except asyncio.CancelledError:
        if client.gone and task.cancelled():
            raise ClientGone("the client went away before its answer was ready") from None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


def _answer(status: int, headers: list[tuple[str, str]], body: bytes) -> Response:
    response = Response(body, status_code=status)
    for name, value in headers:
        if name not in _OUR_OWN:
            response.raw_headers.append((name.encode("latin-1"), value.encode("latin-1")))
    return response


def _streams(forwarded: Forwarded) -> bool:
    kinds = [value for name, value in forwarded.headers if name == "content-type"]
    return any(kind.startswith("text/event-stream") for kind in kinds)


def _passed_on(forwarder: Forwarder, forwarded: Forwarded, request: Request) -> EventStream:
    told = dict(forwarded.headers)
    req_id = getattr(request.state, "req_id", None) or told.get("x-req-id")
    native = request.url.path == "/v1/completions" and not getattr(request.state, "openai_shaped", False)

    def last_words(error: NodeLost) -> bytes:
        return data(error.native(req_id) | {"done": True}) if native else data(error.openai())

    return EventStream(
        _frames(forwarded, last_words),
        stop=lambda: forwarder.drop(forwarded),
        quiet=comment("waiting"),
        # The owner sends such a line itself; this one is for a connection that brings nothing at all.
        quiet_s=2 * QUIET_S,
        headers={name: value for name, value in told.items() if name not in (*_OUR_OWN, "content-type")},
    )


async def _frames(forwarded: Forwarded, last_words: Callable[[NodeLost], bytes]) -> AsyncGenerator[bytes, None]:
    """What the owner sends, as it comes; the loss of it is the stream's last event."""
    whole = True
    try:
        async with aclosing(forwarded.pieces()) as pieces:
            async for piece in pieces:
                whole = piece.endswith(b"\n\n")
                yield piece
    except NodeLost as error:
        yield (b"" if whole else b"\n\n") + last_words(error)
