"""A node whose engine does what the test says; service, workers, event bus, audit log, sockets and clients are real."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from engine.counters import EngineCounters
from engine.fleet import Fleet
from engine.sequence import Sequence, SequenceFinished, SequenceStarted, TokenEmitted
from engine.service import InferenceService
from engine.worker import Worker
from infsvc.events import EventBus
from infsvc.home import Home
from infsvc.settings import Address, NodeSettings, WorkerSettings
from infsvc.types import ModelState
from storage.audit_log import AuditLog, AuditReader
from storage.grammars import GrammarStore
from transports.forwarder import Forwarder
from transports.http.app import build_app
from transports.http.server import HttpServer
from transports.nats.registry import Registry


async def _nothing_queued(req_id: str) -> bool:
    return False


class ScriptedModel:
    """Tokenises by words."""

    bos = eos = 0
    adds_bos = False

    def token_text(self, token: int) -> str:
        return ""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [1] * len(text.split())


class ScriptedEngine:
    """Answers each sequence with `answer` at once, or, where that is None, only with what the test emits."""

    def __init__(self) -> None:
        self.answer: list[str] | None = ["Hello", " world"]
        self.counters = EngineCounters(n_steps=4, n_batch_sequences=10, max_batch_sequences=3)
        self.n_ctx = 1024
        self.model = ScriptedModel()
        self.submitted: asyncio.Queue[Sequence] = asyncio.Queue()
        self.cancelled: asyncio.Queue[Sequence] = asyncio.Queue()
        self.fault: Exception | None = None

    def submit(self, sequence: Sequence) -> None:
        if self.fault is not None:
            raise self.fault
        self.submitted.put_nowait(sequence)
        if self.answer is not None:
            self.start(sequence)
            for text in self.answer:
                self.emit(sequence, text)
            self.finish(sequence)

    def cancel(self, sequence: Sequence) -> None:
        if not sequence.cancelled:
            sequence.cancelled = True
            self.cancelled.put_nowait(sequence)
            asyncio.get_running_loop().call_soon(self.finish, sequence, "cancelled")

    def start(self, sequence: Sequence) -> None:
        sequence.listener(SequenceStarted(sequence, time.perf_counter(), slot=0))

    def emit(self, sequence: Sequence, text: str) -> None:
        sequence.listener(TokenEmitted(sequence, time.perf_counter(), text))

    def finish(self, sequence: Sequence, reason: str = "stop", error: str | None = None) -> None:
        sequence.listener(SequenceFinished(sequence, time.perf_counter(), "", reason, error))

    async def until_submitted(self) -> Sequence:
        return await asyncio.wait_for(self.submitted.get(), 5)

    async def until_cancelled(self) -> Sequence:
        return await asyncio.wait_for(self.cancelled.get(), 5)


class ScriptedNode:
    """What the HTTP door needs of a node, with two models: `demo`, ready, and `nomic-embed-v1.5`, on no disk."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = NodeSettings(node="testnode", **settings)
        self.name = "testnode"
        self.start_time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.events = EventBus(self.name)
        self.stopping = asyncio.Event()
        self.queue_desk = SimpleNamespace(cancel=_nothing_queued)
        self.bus: Any = SimpleNamespace(
            state=SimpleNamespace(status="connected", url="nats://127.0.0.1:5700", reason=None),
            nc=None,
            on_connected=lambda callback: None,
        )
        self.registry = Registry(self.bus, self.events, node=self.name, start_time=self.start_time)
        self.forwarder = Forwarder(self.bus, self.registry)
        workers = {name: WorkerSettings(model_name=name, queue_max_msgs=3, worker_concurrency=2) for name in MODELS}
        self.audits = {name: AuditLog(folder / f"{name}.sqlite") for name in workers}
        self.logs = AuditReader(self.audits)
        self.fleet = Fleet(
            Home(folder, folder),
            workers,
            events=self.events,
            audit=lambda worker: self.audits[worker.model_name],
            endpoint=lambda worker: "",
            node=self.name,
            start_time=self.start_time,
        )
        self.grammars = GrammarStore(folder / "grammars", folder / "shipped")
        self.service = InferenceService(self.fleet, events=self.events, node=self.name, grammars=self.grammars)
        self.engine = ScriptedEngine()
        self.demo = self.make_ready("demo")
        self.loads: list[tuple[str, bool]] = []
        self.load_error: Exception | None = None
        self.on_unload: Callable[[], Awaitable[None]] | None = None

    def make_ready(self, name: str) -> Worker:
        worker = self.fleet.get(name)
        worker.engine = self.engine  # type: ignore[assignment]
        worker.format = SimpleNamespace(render=lambda turns, **_: turns[-1].content)  # type: ignore[assignment]
        worker.asked, worker.state = True, ModelState.READY
        return worker

    async def load(self, name: str, *, force: bool = False) -> Worker:
        worker = self.fleet.get(name)
        if self.load_error is not None:
            raise self.load_error
        self.loads.append((name, force))
        worker.move(ModelState.LOADING)
        return worker

    async def unload(self, name: str) -> None:
        worker = self.fleet.get(name)
        worker.move(ModelState.DRAINING)
        await asyncio.sleep(0)
        worker.engine = None
        worker.move(ModelState.ON_DISK)
        if self.on_unload is not None:
            await self.on_unload()

    async def logged(self) -> None:
        """Waits until every audit row is on disk."""
        for audit in self.audits.values():
            await audit.flush()

    async def close(self) -> None:
        self.stopping.set()
        for audit in self.audits.values():
            await audit.close()
        self.fleet.pool.shutdown(wait=True)


MODELS = ("demo", "nomic-embed-v1.5")
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Plain HTTP only: the usual context reads all certificates of the machine, 60 ms a client."""

MakeNode = Callable[..., ScriptedNode]
Serve = Callable[..., Awaitable[httpx2.AsyncClient]]


@pytest.fixture
async def make_node(tmp_path: Path) -> AsyncIterator[MakeNode]:
    nodes: list[ScriptedNode] = []

    def make(**settings: Any) -> ScriptedNode:
        nodes.append(ScriptedNode(tmp_path, **settings))
        return nodes[-1]

    yield make
    for node in nodes:
        await node.close()


@pytest.fixture
def node(make_node: MakeNode) -> ScriptedNode:
    return make_node()


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves a node's port (`model=None`: the gateway) on a real socket; `client.server` is the server."""
    servers: list[HttpServer] = []
    clients: list[httpx2.AsyncClient] = []

    async def start(node: ScriptedNode, model: str | None = None) -> httpx2.AsyncClient:
        server = HttpServer(build_app(node, model), Address("127.0.0.1", 0))  # type: ignore[arg-type]
        await server.start()
        servers.append(server)
        client = httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{server.port}", timeout=5, trust_env=False, verify=NO_TLS
        )
        client.server, client.raws = server, []  # type: ignore[attr-defined]
        clients.append(client)
        return client

    yield start
    for client in clients:
        await client.aclose()
        for raw in client.raws:  # type: ignore[attr-defined]
            raw.writer.transport.abort()
    for server in servers:
        await server.close()


@pytest.fixture
async def gateway(node: ScriptedNode, serve: Serve) -> httpx2.AsyncClient:
    return await serve(node)


@pytest.fixture
async def port(node: ScriptedNode, serve: Serve) -> httpx2.AsyncClient:
    """`demo`'s own port."""
    return await serve(node, "demo")


class RawClient:
    """A connection that sends exactly these bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, client: httpx2.AsyncClient) -> RawClient:
        raw = cls(*await asyncio.open_connection("127.0.0.1", client.base_url.port))
        client.raws.append(raw)  # type: ignore[attr-defined]
        return raw

    def send(self, head: str, body: bytes = b"") -> None:
        self.writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)

    def post(self, body: bytes) -> None:
        self.send(f"POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: {len(body)}", body)

    async def head(self) -> str:
        return (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)).decode()

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), 5)

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()
