"""A NATS cluster on loopback: nats-server processes with real routes and JetStream, each of which may be killed and
started again over its own store."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError

from tests.nodes import free_port
from transports.nats.broker import find_binary

READY_S = 30.0


@dataclass(frozen=True)
class Seat:
    """One server's place: where it listens, and how it is started."""

    name: str
    port: int
    command: tuple[str, ...]

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"


def seats(folder: Path, n: int = 3) -> list[Seat]:
    """Writes the configurations of `n` servers that are one cluster."""
    ports, routes = [free_port() for _ in range(n)], [free_port() for _ in range(n)]
    made = []
    for number, (port, route) in enumerate(zip(ports, routes, strict=True), 1):
        name = f"nats-{number}"
        config = {
            "server_name": name,
            "host": "127.0.0.1",
            "port": port,
            "max_payload": 8 * 2**20 + 2**16,
            "jetstream": {"store_dir": str(folder / name)},
            "cluster": {
                "name": "infsvc-tests",
                "listen": f"127.0.0.1:{route}",
                "routes": [f"nats://127.0.0.1:{each}" for each in routes],
            },
        }
        path = folder / f"{name}.conf"
        path.write_text(json.dumps(config))
        made.append(Seat(name, port, (str(find_binary()), "-c", str(path))))
    return made


async def ask(client: Client, call: str, body: Any = None, *, timeout_s: float = 2.0) -> dict[str, Any]:
    """One call of JetStream's administration, errors included."""
    data = b"" if body is None else json.dumps(body).encode()
    answer: dict[str, Any] = json.loads((await client.request(f"$JS.API.{call}", data, timeout=timeout_s)).data)
    return answer


async def until_it_keeps(url: str, n_copies: int) -> None:
    """Waits until the cluster takes a stream of so many copies, as it does once its servers have found each other."""
    probe = {"name": "READY", "subjects": ["ready"], "num_replicas": n_copies}
    async with asyncio.timeout(READY_S):
        while True:
            client = Client()
            with suppress(NatsError, OSError, TimeoutError):
                await client.connect(url.split(","), allow_reconnect=False, error_cb=_quiet, max_reconnect_attempts=1)
                while "error" in await ask(client, "STREAM.CREATE.READY", probe):
                    await asyncio.sleep(0.1)
                await ask(client, "STREAM.DELETE.READY")
                await client.close()
                return
            await client.close()
            await asyncio.sleep(0.1)


class Cluster:
    """Running servers; `kill` and `start` are at once, what they lead moves within seconds."""

    def __init__(self, folder: Path, n: int = 3) -> None:
        self.seats = seats(folder, n)
        self._log = folder / "cluster.log"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        """All servers, as NATS_URL takes them."""
        return ",".join(seat.url for seat in self.seats)

    def seat(self, name: str) -> Seat:
        return next(seat for seat in self.seats if seat.name == name)

    def seat_at(self, port: int | None) -> Seat:
        return next(seat for seat in self.seats if seat.port == port)

    def start(self, *names: str) -> None:
        """Starts these servers, all when none is named."""
        for seat in self.seats:
            if not names or seat.name in names:
                with self._log.open("ab") as log:
                    self._processes[seat.name] = subprocess.Popen(
                        seat.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(os.environ)
                    )

    def kill(self, name: str) -> None:
        process = self._processes[name]
        process.kill()
        process.wait()

    def stop(self) -> None:
        for name in self._processes:
            self.kill(name)


async def _quiet(error: Exception) -> None:
    pass
