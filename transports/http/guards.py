"""Who may come in, and with how much: API keys, the loopback guard and the body limit.

Pure ASGI, one class each, wrapped around the routes in `app`. What they refuse they raise; the boundary answers.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infsvc.errors import TooLarge
from infsvc.settings import is_loopback
from infsvc.types import MAX_BODY_BYTES
from transports.http.callers import name_key
from transports.http.dashboard import is_free
from transports.http.refusals import Forbidden, Unauthorized


class ApiKeys:
    """Asks for one of the keys, as `Authorization: Bearer …` or `X-API-Key`; `/healthz` stays free for probes, and the
    dashboard's page for browsers, which then asks for the key itself."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        free = scope["path"] == "/healthz" or is_free(scope["method"], scope["path"], headers)
        known = self._known(headers)
        if not free and known is None:
            raise Unauthorized("an API key is needed: send it as Authorization: Bearer <key> or X-API-Key: <key>")
        name_key(scope, known)
        await self._app(scope, receive, send)

    def _known(self, headers: Headers) -> int | None:
        """The number of the key that was sent."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        offered = [headers.get("x-api-key", "")]
        if scheme.lower() == "bearer":
            offered.append(token.strip())
        # Every key is compared, so that the time taken tells nothing about which one came close.
        matches = [
            number
            for number, key in enumerate(self._keys)
            for text in offered
            if hmac.compare_digest(key, text.encode("latin-1")) and text
        ]
        return matches[0] if matches else None


class LoopbackGuard:
    """Keeps the pages of other sites in the user's browser from a node that listens on loopback without keys.

    Two ways lead there: a cross-site request, which names its page in `Origin`, and DNS rebinding, where a foreign name
    resolves to 127.0.0.1 and stands in `Host`. Programs send no `Origin` and name an address or a local name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._hostname = socket.gethostname().lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        if server is not None and is_loopback(server[0]):
            headers = Headers(scope=scope)
            origin, host = headers.get("origin"), headers.get("host")
            if origin is not None and not _from_loopback(_host_of(origin)):
                raise Forbidden("a page of another site may not use this node: its Origin is not this machine")
            if host and not self._local(_host_of(f"//{host}")):
                raise Forbidden("the Host header is no name of this machine: use 127.0.0.1 or localhost")
        await self._app(scope, receive, send)

    def _local(self, host: str) -> bool:
        if _from_loopback(host) or host == self._hostname or host.endswith((".local", ".internal")):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _from_loopback(host: str) -> bool:
    return is_loopback(host) or host.endswith(".localhost")


class BodyLimit:
    """Refuses a body over the limit: at once when its length is declared, else as soon as it has grown past it.

    What is left of the body is read and dropped by uvicorn, so that the connection can be used again.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._limit_bytes:
            raise TooLarge(self._limit_bytes)
        n_bytes = 0

        async def counted() -> Message:
            nonlocal n_bytes
            message = await receive()
            if message["type"] == "http.request":
                n_bytes += len(message.get("body", b""))
                if n_bytes > self._limit_bytes:
                    raise TooLarge(self._limit_bytes)
            return message

        await self._app(scope, counted, send)
