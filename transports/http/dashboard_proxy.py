"""The dashboard on a port of its own: the page, and what it reads of a gateway, passed on.

Nothing but the page's own reads goes through: no load, no request. The reader's key is passed on and none is added, so
that this port opens no more than the gateway does.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from infsvc.errors import RequestError
from transports.http import dashboard
from transports.http.app import Boundary, unrouted
from transports.http.body import query
from transports.http.guards import LoopbackGuard

_READS = ("/api/services", "/api/services/{model}", "/api/events", "/healthz")
_PASSED_ON = ("authorization", "x-api-key", "accept")
_CONNECT_S = 5.0
_READ_S = 60.0
"""Longer than a gateway's event stream is ever silent."""


class GatewayAway(RequestError):
    """502: the node whose dashboard this is does not answer."""

    status = 502
    code = "gateway_unreachable"


def build_proxy(gateway: str, *, verify: Any = True) -> tuple[ASGIApp, httpx2.AsyncClient]:
    """The app, and the client that it reads through, which its owner closes.

    Args:
        gateway: the node's URL.
        verify: what to trust for https, as httpx takes it.
    """
    trust = verify if gateway.startswith("https://") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client = httpx2.AsyncClient(
        base_url=gateway, timeout=httpx2.Timeout(_READ_S, connect=_CONNECT_S), trust_env=False, verify=trust
    )

    async def index(request: Request) -> Response:
        query(request)
        return dashboard.page()

    async def passed_on(request: Request) -> Response:
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        asked = client.build_request("GET", request.url.path, params=request.query_params, headers=headers)
        try:
            answer = await client.send(asked, stream=True)
        except httpx2.HTTPError as error:
            raise GatewayAway(f"no node answers at {gateway}: {error or type(error).__name__}") from None
        return StreamingResponse(
            _body(answer), status_code=answer.status_code, headers={"Cache-Control": "no-store"},
            media_type=answer.headers.get("content-type"),
        )  # fmt: skip

    app = Starlette(
        routes=[Route("/", index), *dashboard.routes(), *(Route(path, passed_on) for path in _READS)],
        middleware=[Middleware(Boundary, model=None), Middleware(LoopbackGuard)],
        exception_handlers={HTTPException: unrouted},
    )
    app.router.redirect_slashes = False
    return app, client


async def _body(answer: httpx2.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_bytes():
            yield piece
    except httpx2.HTTPError:
        return  # the node has gone: the stream ends, and the page asks again
    finally:
        await answer.aclose()
