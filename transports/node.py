"""The node: builds every part once, starts them in order, and ends them in the opposite one. `async with Node(...) as
node`.

Parts that can fail alone (a model, the broker) fail as states; what makes no sense without (the home, a port) raises
on the way in, and what had started by then is ended again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from engine.fleet import Fleet
from engine.service import InferenceService
from engine.worker import Worker
from infsvc import __version__
from infsvc.audit import EventRow
from infsvc.errors import ConfigError, UnknownModel
from infsvc.events import EventBus
from infsvc.home import Home, HomeLock
from infsvc.settings import Address, NodeSettings, WorkerSettings, check_open, check_ports
from infsvc.worker_file import read_again, read_new, write_worker
from storage.audit_log import AuditLog, AuditReader
from storage.grammars import GrammarStore
from storage.node_state import NodeState
from transports.far_chat import FarChat
from transports.forwarder import Forwarder
from transports.logs import NodeLog
from transports.metrics import Metrics
from transports.nats.bus import Bus, bounded
from transports.nats.durable import Durable
from transports.nats.exchange import Exchanges
from transports.nats.forward_door import ForwardDoor
from transports.nats.front_door import FrontDoor
from transports.nats.heartbeat import Heartbeats
from transports.nats.micro import MicroService
from transports.nats.queue_desk import QueueDesk
from transports.nats.registry import Registry

if TYPE_CHECKING:
    from transports.http.server import HttpServer

log = logging.getLogger("infsvc.node")

GRACE_S = 3.0
"""How long running work has at the end of a node."""

_SAMPLE_S = 1.0
_CLOSE_S = 4.0
"""How long one part has to end. Each bounds its own steps; this is for the step that nobody thought of."""


@dataclass(frozen=True)
class SystemUsage:
    """Memory in bytes: of the machine, and of this node with its models' own processes."""

    ram_used_bytes: int
    ram_total_bytes: int
    node_rss_bytes: int


class Node:
    """Owns models, doors and logs. Its parts may be read before it has started: models are then absent or on disk.

    Args:
        workers: every worker file's settings by model name.
        chosen: models to load at the start.
        log_to_stdout: whether the structured log also goes to standard output (a node without a screen).

    Raises:
        ConfigError: two chosen models want one port, or a door would be open without keys.
        UnknownModel: a chosen model has no worker file.
    """

    def __init__(
        self,
        home: Home,
        settings: NodeSettings,
        workers: dict[str, WorkerSettings],
        chosen: Sequence[str],
        *,
        log_to_stdout: bool = False,
    ) -> None:
        for name in chosen:
            if name not in workers:
                raise UnknownModel(name, sorted(workers))
        check_ports([workers[name] for name in chosen], settings)
        check_open(settings, settings.gateway_address.host, key="INFSVC_GATEWAY")
        for name in chosen:
            address = workers[name].address
            if address is not None:
                check_open(settings, address.bound(settings.bind).host, key="HTTP_ADDR")
        self.home, self.settings = home, settings
        self.name = settings.node
        self.start_time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.stopping = asyncio.Event()
        self.events = EventBus(self.name)
        self._chosen = tuple(dict.fromkeys(chosen))
        self._noted: list[EventRow] = []
        self._n_told: dict[str, int] = {}
        self._lock = HomeLock(home)
        self._log_to_stdout = log_to_stdout
        self._audits = {name: AuditLog(home.root / worker.db_path) for name, worker in workers.items()}
        self._state = NodeState(home.root / "data/run/state.json")
        self._scheme = "https" if settings.tls_cert else "http"
        self.logs = AuditReader(self._audits)
        self.fleet = Fleet(
            home,
            workers,
            events=self.events,
            audit=lambda worker: self._audits[worker.model_name],
            endpoint=self._endpoint,
            node=self.name,
            start_time=self.start_time,
            memory_limit_bytes=settings.memory_limit,
        )
        self.grammars = GrammarStore(home.root / "data/grammars/own", home.shipped / "data/grammars")
        self.service = InferenceService(self.fleet, events=self.events, node=self.name, grammars=self.grammars)
        self.bus = Bus(
            settings.nats_login, embedded=settings.embedded_nats, home=home, events=self.events, node=self.name
        )
        exchanges = Exchanges(self.bus, self.service)
        self.durable = Durable(self.bus, self.fleet, self.service, exchanges, self.name)
        self.queue_desk = QueueDesk(self.durable, self.fleet, self.service, exchanges)
        self._front_door = FrontDoor(
            self.bus,
            self.fleet,
            self.service,
            exchanges,
            self.durable,
            self.queue_desk,
            self.stopping,
            node=self.name,
            start_time=self.start_time,
        )
        self._heartbeats = Heartbeats(self.bus, self.fleet, self.events, self.name)
        self.micro = MicroService(self.bus, self.fleet, self.events, node=self.name, start_time=self.start_time)
        self.registry = Registry(self.bus, self.events, node=self.name, start_time=self.start_time)
        self.forwarder = Forwarder(self.bus, self.registry)
        self.far_chat = FarChat(self.forwarder, node=self.name)
        self._forward_door = ForwardDoor(self.bus, self._forwarded_app, node=self.name, start_time=self.start_time)
        self.metrics = Metrics(self.fleet, self.events)
        self._servers: dict[str, HttpServer] = {}
        self._gateway: HttpServer | None = None
        self._exits = contextlib.AsyncExitStack()

    @property
    def gateway_url(self) -> str:
        """Where programs reach every model of this node."""
        address = self.settings.gateway_address
        port = self._gateway.port if self._gateway is not None else address.port
        return f"{self._scheme}://{Address(_reachable(address.host), port)}"

    async def __aenter__(self) -> Node:
        exits = self._exits
        try:
            self._lock.acquire()
            exits.callback(self._lock.release)
            self.events.bind(asyncio.get_running_loop())
            node_log = NodeLog(self.home.logs, self.events, level=self.settings.log_level, stdout=self._log_to_stdout)
            exits.push_async_callback(node_log.close)
            node_log.start()
            exits.push_async_callback(self._close_audits)
            self._note("startup", f"infsvc {__version__} starts as {self.name} in {self.home.root}")
            exits.push_async_callback(self.fleet.close)
            # Ports first: a taken one ends the start before any model is read.
            self._gateway = await self._listen(None, self.settings.gateway_address)
            exits.push_async_callback(self._gateway.close)
            exits.push_async_callback(self._close_ports)
            for name in self._chosen:
                await self._open_port(self.fleet.get(name))
            self._note("services.init", f"HTTP on {self.gateway_url}", gateway=self.gateway_url)
            for name in self._chosen:
                self.fleet.load(name)
            self.fleet.scan()
            for part in (self.bus, self.durable, self._front_door, self._forward_door, self._heartbeats):
                await part.start()
                exits.push_async_callback(_closed, type(part).__name__, part.close)
            exits.push_async_callback(_closed, "Registry", self.registry.close)
            exits.push_async_callback(_closed, "Forwarder", self.forwarder.close)
            self._note("health.started", "heartbeats and health replies")
            self._note("monitoring.started", "backpressure reports")
            sampler = asyncio.create_task(self._sample(), name="sampler")
            exits.push_async_callback(_ended, sampler)
            self._lock.tell(node=self.name, gateway=self.gateway_url, started=self.start_time, version=__version__)
            self._remember()
            self._note("server.ready", f"ready on {self.gateway_url}")
        except BaseException:
            await exits.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._note("shutdown", f"{self.name} stops")
        # Other nodes take what comes and what waits, while this one ends what runs.
        await _closed("the front door", self._front_door.leave)
        await _closed("the hand-over", self.durable.hand_over)
        await self.service.drain(GRACE_S)
        self.stopping.set()
        await self._exits.aclose()

    async def load(self, name: str, *, force: bool = False) -> Worker:
        """Opens the model's port and begins to load it; returns at once with the state `loading`. Its worker file is
        read first, where it is new or the model is at rest.

        Raises:
            UnknownModel: no worker file has that name.
            StartError: its port is taken.
            ConfigError: the worker file is wrong, its port is another model's, or open without keys.
        """
        worker = self._as_written(name)
        await self._open_port(worker)
        self._tell(worker)
        self.fleet.load(name, force=force)
        self._remember()
        return worker

    async def unload(self, name: str) -> None:
        """Drains and frees the model and closes its port. Called again while it drains, it ends what still runs."""
        await self.fleet.unload(name)
        server = self._servers.pop(name, None)
        if server is not None:
            await server.close()
        self._remember()

    async def pull(self, name: str) -> Worker:
        """Begins to fetch the model's missing file; returns at once.

        Raises:
            UnknownModel: no worker file has that name.
            NoSource: its worker file does not say where the file comes from.
            ConfigError: the worker file is wrong.
        """
        worker = self._as_written(name)
        self._tell(worker)
        return self.fleet.pull(name)

    async def remove_file(self, name: str) -> int:
        """Removes the file of a model that is not in memory; the bytes that were freed.

        Raises:
            UnknownModel: no worker file has that name.
            LoadError: the file is in use, is not there, or is not infsvc's to remove.
        """
        return self.fleet.remove_file(name)

    async def add_worker(self, values: Mapping[str, str]) -> Worker:
        """Writes a worker file into the home and takes its model in.

        Args:
            values: the file's keys, MODEL_NAME among them.

        Raises:
            ConfigError: a value is wrong, the name or the port is another model's, or MODEL_PATH names no file.
        """
        path = values.get("MODEL_PATH")
        if path and not (values.get("MODEL_URL") or values.get("MODEL_REPO")) and not self.home.find(path).is_file():
            raise ConfigError(f"there is no file {self.home.find(path)}", key="MODEL_PATH")
        settings = write_worker(
            self.home, self.settings, values, [each.settings for each in self.fleet.workers.values()]
        )
        return self._take_in(settings)

    def _take_in(self, settings: WorkerSettings) -> Worker:
        self._audits[settings.model_name] = AuditLog(self.home.root / settings.db_path)
        return self.fleet.add(settings)

    def _as_written(self, name: str) -> Worker:
        """The model as its worker file says now, if it is at rest. Raises `UnknownModel`, `ConfigError`."""
        if name not in self.fleet.workers:
            settings = read_new(self.home, self.settings, name)
            if settings is not None:
                return self._take_in(settings)
        worker = self.fleet.get(name)
        if self.fleet.is_at_rest(name):
            before, now = worker.settings, read_again(self.home, self.settings, worker.settings)
            if now.http_addr != before.http_addr and name in self._servers:
                raise now.wrong("HTTP_ADDR", f"{name} still has port {self._servers[name].port} open: unload it first")
            self.fleet.renew(now)
            if now.http_addr != before.http_addr:
                worker.endpoint = self._endpoint(now)
        return worker

    def system(self) -> SystemUsage:
        """Memory, read now; some microseconds."""
        memory = psutil.virtual_memory()
        n_held = psutil.Process().memory_info().rss + sum(each.n_process_bytes for each in self.fleet.workers.values())
        return SystemUsage(memory.total - memory.available, memory.total, n_held)

    @property
    def _tls(self) -> tuple[str, str] | None:
        return (self.settings.tls_cert, self.settings.tls_key) if self.settings.tls_cert else None

    def _endpoint(self, worker: WorkerSettings) -> str:
        if worker.address is None:
            return ""
        address = worker.address.bound(self.settings.bind)
        return f"{self._scheme}://{Address(_reachable(address.host), address.port)}"

    async def _open_port(self, worker: Worker) -> None:
        address = worker.settings.address
        if address is None or worker.name in self._servers:
            return
        bound = address.bound(self.settings.bind)
        check_open(self.settings, bound.host, key="HTTP_ADDR")
        others = [self.fleet.get(name).settings for name in self._servers]
        check_ports([*others, worker.settings], self.settings)
        server = await self._listen(worker.name, bound)
        self._servers[worker.name] = server
        worker.endpoint = f"{self._scheme}://{Address(_reachable(bound.host), server.port)}"

    def _forwarded_app(self) -> Any:
        from transports.http.app import build_app

        return build_app(self, None, forwarded=True)

    async def _listen(self, model: str | None, address: Address) -> HttpServer:
        # Imported here so that the first frame need not wait for it.
        from transports.http.app import build_app
        from transports.http.server import HttpServer

        server = HttpServer(build_app(self, model), address, tls=self._tls)
        await server.start()
        return server

    async def _close_ports(self) -> None:
        servers, self._servers = list(self._servers.values()), {}
        await asyncio.gather(*(server.close() for server in servers))

    async def _close_audits(self) -> None:
        await asyncio.gather(*(audit.close() for audit in self._audits.values()))

    async def _sample(self) -> None:
        """Once a second, a point of each model's history."""
        while True:
            for worker in self.fleet.workers.values():
                worker.stats.sample(n_waiting=worker.n_waiting, n_active=worker.n_active)
            await asyncio.sleep(_SAMPLE_S)

    def _remember(self) -> None:
        names = [worker.name for worker in self.fleet.workers.values() if worker.asked]
        try:
            self._state.remember(names)
        except OSError as error:
            log.warning(f"which models run cannot be remembered: {error}", extra={"code": "node.state"})

    def _note(self, code: str, msg: str, **meta: str) -> None:
        """A node-wide event: in the log, and in the file of every model that was asked for, or will be."""
        log.info(msg, extra={"code": code, "meta": meta or None})
        self._noted.append(EventRow(level="info", code=code, msg=msg))
        for worker in self.fleet.workers.values():
            if worker.asked or worker.name in self._chosen or worker.name in self._n_told:
                self._tell(worker)

    def _tell(self, worker: Worker) -> None:
        """Writes the node-wide events that its file lacks: none is made for a model that nobody asks for."""
        for row in self._noted[self._n_told.get(worker.name, 0) :]:
            worker.audit.event(row)
        self._n_told[worker.name] = len(self._noted)


async def _closed(name: str, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Closes a part that talks to the broker; what does not end in time must not hold up the end of the node."""
    if not await bounded(close(), _CLOSE_S):
        log.error(f"{name} did not end within {_CLOSE_S:g} s", extra={"code": "node.stuck"})


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _reachable(host: str) -> str:
    """The name under which this machine reaches a bound host."""
    return "127.0.0.1" if host in ("0.0.0.0", "") else "[::1]" if host == "::" else host


def chosen_models(home: Home, named: Sequence[str], workers: dict[str, WorkerSettings]) -> list[str]:
    """The models to load: those named, else those that ran last, else `demo`."""
    if named:
        return list(named)
    last = NodeState(home.root / "data/run/state.json").models()
    if last is None:
        return [name for name in ("demo",) if name in workers]
    return [name for name in last if name in workers]
