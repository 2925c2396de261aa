"""One listening socket: binds it, runs uvicorn on it inside the node's loop, and closes it within seconds.

uvicorn as it comes owns the process: it takes the signals, configures logging, exits when a port is taken and waits for
ever for open streams. Here it is one task among others of a node, so those four are replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import psutil
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from infsvc.errors import StartError
from infsvc.settings import Address

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:
    HttpToolsProtocol = None  # type: ignore[assignment,misc]

log = logging.getLogger("infsvc.http")

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers together."""

KEEP_ALIVE_S = 75
GRACE_S = 1.5
"""How long `close()` lets answers and streams end by themselves before it drops their connections."""

_DROP_S = 0.4
_TICK_S = 1.0
_BACKLOG = 512


class HttpServer:
    """An app on an address.

    Args:
        app: the ASGI app.
        address: where to listen; port 0 takes any free one.
        tls: certificate and key file, or None for plain HTTP.
        setting: the setting that names the address, for the error when it cannot be had.
    """

    def __init__(
        self,
        app: ASGIApp,
        address: Address,
        *,
        tls: tuple[str, str] | None = None,
        setting: str = "HTTP_ADDR (a model's port) or INFSVC_GATEWAY (the gateway)",
    ) -> None:
        self._app, self._address, self._tls, self._setting = app, address, tls, setting
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._port = address.port

    @property
    def port(self) -> int:
        """The port listened on; before `start()` the one asked for."""
        return self._port

    async def start(self) -> None:
        """Listens. When this returns, requests are answered.

        Raises:
            StartError: the address is taken or not this machine's, or the certificate cannot be used.
        """
        config = self._configured()
        listener = await self._bound()
        self._port = listener.getsockname()[1]
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name=f"http-{self._port}")
        await self._server.listening.wait()
        log.debug(
            "listening on %s",
            Address(self._address.host, self._port),
            extra={"code": "http.listening", "meta": {"host": self._address.host, "port": self._port}},
        )

    async def close(self) -> None:
        """Stops listening, lets answers end for `GRACE_S`, then drops what is left. Safe to call twice."""
        task, server, self._task = self._task, self._server, None
        if task is not None and server is not None:
            server.stop()
            await task

    def _configured(self) -> uvicorn.Config:
        config = uvicorn.Config(
            self._app,
            http=_protocol(),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            backlog=_BACKLOG,
            ssl_certfile=self._tls[0] if self._tls else None,
            ssl_keyfile=self._tls[1] if self._tls else None,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise StartError(
                f"TLS cannot start with {' and '.join(self._tls or ())} ({error}): check INFSVC_TLS_CERT and "
                "INFSVC_TLS_KEY"
            ) from error
        return config

    async def _bound(self) -> socket.socket:
        host, port = self._address.host, self._address.port
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise StartError(f"{host} is no address of this machine ({error}): change {self._setting}") from error
        family, kind, protocol, _, where = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(where)
            # Two sockets with SO_REUSEADDR may both bind one address; only one of them can listen.
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise StartError(await self._sentence(error)) from error
        return listener

    async def _sentence(self, error: OSError) -> str:
        if error.errno == errno.EADDRINUSE:
            owner = await asyncio.to_thread(_owner, self._address.port)
            return f"{self._address} is taken by {owner}: stop it, or change {self._setting}"
        if error.errno == errno.EACCES:
            return (
                f"{self._address} may not be used ({error.strerror}): choose a port from 1024 up with {self._setting}"
            )
        return f"{self._address} cannot be listened on ({error.strerror}): change {self._setting}"


def _owner(port: int) -> str:
    """Who listens on the port, as far as this user may see."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another program"


class _Server(uvicorn.Server):
    """uvicorn as one task of a loop that others own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._stop = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stop.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        # A counter of 0 refreshes the Date header each time; uvicorn's own loop wakes ten times a second to do it once.
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        state = self.server_state
        for connection in list(state.connections):
            # Closes idle ones now and busy ones after their answer.
            connection.shutdown()
        await self._until_quiet(GRACE_S)
        for connection in list(state.connections):
            # The handler sees its client go and ends what it runs.
            connection.transport.abort()
        await self._until_quiet(_DROP_S)
        for task in list(state.tasks):
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)

    async def _until_quiet(self, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        state = self.server_state
        while (state.tasks or state.connections) and (left_s := deadline - loop.time()) > 0:
            if state.tasks:
                await asyncio.wait(set(state.tasks), timeout=left_s)
            else:
                # Connections that still flush tell nobody when they are done.
                await asyncio.sleep(min(0.01, left_s))


def _protocol() -> type[asyncio.Protocol]:
    """httptools where it is installed, else h11, which limits the head by itself."""
    return H11Protocol if HttpToolsProtocol is None else _limited(HttpToolsProtocol)


def _limited(base: Any) -> type[asyncio.Protocol]:
    """uvicorn's httptools protocol with a limit for the head, which httptools itself collects without end."""

    class LimitedHttpTools(base):  # type: ignore[misc]
        _head_bytes = 0
        _in_head = False

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self._in_head or self.transport.is_closing():
                return
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.write(_HEAD_TOO_LARGE)
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head, self._head_bytes = True, 0

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

    return LimitedHttpTools


_HEAD_TOO_LARGE_BODY = (
    b'{"req_id":null,"error":"the headers are larger than 64 KiB","code":"headers_too_large","status":431}'
)
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_HEAD_TOO_LARGE_BODY), _HEAD_TOO_LARGE_BODY)
)
