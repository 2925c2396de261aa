"""The socket: ports, TLS, limits of the head, and closing in time."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
from pathlib import Path

import httpx2
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from infsvc.errors import StartError
from infsvc.settings import Address
from tests.transports.http.conftest import RawClient, ScriptedNode, Serve
from transports.http import server as server_module
from transports.http.server import MAX_HEAD_BYTES, HttpServer


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("hello")(scope, receive, send)


async def test_port_0_takes_a_free_one_and_is_free_again_after_close() -> None:
    server = HttpServer(hello, Address("127.0.0.1", 0))
    assert server.port == 0
    await server.start()
    async with httpx2.AsyncClient(trust_env=False) as client:
        response = await client.get(f"http://127.0.0.1:{server.port}/")
    assert response.text == "hello"
    assert "server" not in response.headers
    assert "date" in response.headers
    await server.close()
    await server.close()
    again = HttpServer(hello, Address("127.0.0.1", server.port))
    await again.start()
    await again.close()


async def test_a_server_that_never_started_closes() -> None:
    await HttpServer(hello, Address("127.0.0.1", 0)).close()


@pytest.mark.parametrize("listening", [True, False])
async def test_a_taken_port_names_the_address_its_owner_and_the_mend(listening: bool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listening:
            other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StartError) as caught:
            await HttpServer(hello, Address("127.0.0.1", port)).start()
    sentence = str(caught.value)
    assert f"127.0.0.1:{port} is taken by" in sentence
    assert (f"pid {os.getpid()}" in sentence) == listening
    assert "HTTP_ADDR" in sentence
    assert "INFSVC_GATEWAY" in sentence


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_an_address_of_another_machine_is_a_start_error(host: str) -> None:
    with pytest.raises(StartError, match=host.replace(".", r"\.")):
        await HttpServer(hello, Address(host, 0), setting="HTTP_ADDR").start()


async def test_two_servers_do_not_share_a_port() -> None:
    server = HttpServer(hello, Address("127.0.0.1", 0))
    await server.start()
    with pytest.raises(StartError):
        await HttpServer(hello, Address("127.0.0.1", server.port)).start()
    await server.close()


async def test_tls_is_served(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program to make a certificate with")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    process = await asyncio.create_subprocess_exec(
        openssl,
        "req",
        *options.split(),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    server = HttpServer(hello, Address("127.0.0.1", 0), tls=(cert, key))
    await server.start()
    async with httpx2.AsyncClient(trust_env=False, verify=ssl.create_default_context(cafile=cert)) as client:
        assert (await client.get(f"https://127.0.0.1:{server.port}/")).text == "hello"
    await server.close()


async def test_a_bad_certificate_names_files_and_settings(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    for tls in ((str(bad), str(bad)), (str(tmp_path / "none.pem"), str(bad))):
        with pytest.raises(StartError, match="INFSVC_TLS_CERT"):
            await HttpServer(hello, Address("127.0.0.1", 0), tls=tls).start()


@pytest.mark.parametrize("parser", ["installed", "h11"])
async def test_a_head_without_end_is_cut_off(
    node: ScriptedNode, serve: Serve, monkeypatch: pytest.MonkeyPatch, parser: str
) -> None:
    if parser == "h11":
        monkeypatch.setattr(server_module, "_protocol", lambda: H11Protocol)
    client = await RawClient.connect(await serve(node))
    start = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: "
    client.writer.write(start + b"x" * (MAX_HEAD_BYTES + 1 - len(start)))
    answer = await client.rest()
    assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
    assert b"connection: close" in answer.lower()
    await client.close()


@pytest.mark.parametrize("parser", ["installed", "h11"])
async def test_either_parser_serves_and_notices_a_client_that_goes(
    node: ScriptedNode, serve: Serve, monkeypatch: pytest.MonkeyPatch, parser: str
) -> None:
    if parser == "h11":
        monkeypatch.setattr(server_module, "_protocol", lambda: H11Protocol)
    http = await serve(node)
    long = {"X-Padding": "x" * 30_000}
    for _ in range(3):
        assert (await http.post("/v1/completions", json={"input": "x"}, headers=long)).status_code == 200
    too_large = b" " * (9 * 2**20)
    assert (await http.post("/v1/completions", content=too_large)).status_code == 413
    assert (await http.get("/healthz")).status_code == 200
    while not node.engine.submitted.empty():
        node.engine.submitted.get_nowait()
    node.engine.answer = None
    client = await RawClient.connect(http)
    client.post(b'{"input": "x"}')
    sequence = await node.engine.until_submitted()
    await client.close()
    assert await node.engine.until_cancelled() is sequence


async def test_close_lets_an_answer_end(node: ScriptedNode, serve: Serve) -> None:
    http = await serve(node)
    node.engine.answer = None
    reply = asyncio.create_task(http.post("/v1/completions", json={"input": "x"}))
    sequence = await node.engine.until_submitted()
    closing = asyncio.create_task(http.server.close())  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    node.engine.emit(sequence, "late")
    node.engine.finish(sequence)
    assert (await reply).json()["text"] == "late"
    async with asyncio.timeout(1):
        await closing


async def test_close_drops_idle_connections_at_once(node: ScriptedNode, serve: Serve) -> None:
    http = await serve(node)
    await http.get("/healthz")
    async with asyncio.timeout(0.5):
        await http.server.close()  # type: ignore[attr-defined]


async def test_close_drops_a_client_that_reads_nothing(
    node: ScriptedNode, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "GRACE_S", 0.05)
    http = await serve(node)
    node.engine.answer = ["x" * 100_000] * 200
    client = await RawClient.connect(http)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.post(b'{"input": "x", "stream": true}')
    await node.engine.until_submitted()
    async with asyncio.timeout(2):
        await http.server.close()  # type: ignore[attr-defined]
    client.writer.transport.abort()


async def test_the_signals_stay_with_the_process() -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server = HttpServer(hello, Address("127.0.0.1", 0))
    await server.start()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    await server.close()
