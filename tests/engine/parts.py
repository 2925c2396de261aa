"""Real parts for the engine's tests: an engine on a tiny file, a listener that keeps what it hears, an audit sink that
keeps its rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.constraint import Grammars
from engine.engine import Engine
from engine.fleet import Fleet
from engine.options import EngineOptions
from engine.sampling import SamplerSpec
from engine.sequence import Sequence, SequenceEvent, SequenceFinished, SequenceStarted, TokenEmitted
from engine.service import InferenceService
from infsvc.audit import EventRow, RequestRow
from infsvc.events import Event, EventBus, ModelStateChanged
from infsvc.home import Home
from infsvc.settings import WorkerSettings
from infsvc.types import Params


class Heard:
    """A sequence's listener: keeps all events and says when the last has come."""

    def __init__(self) -> None:
        self.events: list[SequenceEvent] = []
        self.tokens = asyncio.Event()
        self.ended = asyncio.Event()

    def __call__(self, event: SequenceEvent) -> None:
        self.events.append(event)
        if isinstance(event, TokenEmitted):
            self.tokens.set()
        if isinstance(event, SequenceFinished):
            self.ended.set()

    async def finished(self) -> SequenceFinished:
        await self.ended.wait()
        last = self.events[-1]
        assert isinstance(last, SequenceFinished)
        assert [type(event) for event in self.events].count(SequenceFinished) == 1
        return last

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TokenEmitted | SequenceFinished))

    @property
    def n_tokens(self) -> int:
        return sum(isinstance(event, TokenEmitted) for event in self.events)

    @property
    def started(self) -> bool:
        return any(isinstance(event, SequenceStarted) for event in self.events)


def spec(*, n_ctx: int = 256, **params: Any) -> SamplerSpec:
    """A sampler; greedy unless a temperature is named."""
    return SamplerSpec.from_params(Params(**{"temperature": 0.0} | params), n_ctx=n_ctx)


def sequence(listener: Callable[[SequenceEvent], None] | None = None, *, n: int = 4, **fields: Any) -> Sequence:
    """A sequence of `n` made-up prompt tokens."""
    given: dict[str, Any] = {
        "prompt": [1 + (7 * i) % 200 for i in range(n)],
        "sampler": spec(),
        "max_tokens": 8,
        "n_ctx": 256,
        "listener": listener or Heard(),
        "ignore_eos": True,
    }
    return Sequence(**given | fields)


@asynccontextmanager
async def running_engine(path: Path, *, n_ctx: int = 256, n_slots: int = 4, **arguments: Any) -> AsyncIterator[Engine]:
    """A loaded engine of one thread; closed and joined at the end."""
    options = EngineOptions(path=path, n_ctx=n_ctx, n_slots=n_slots, n_threads=1)
    engine = Engine("tiny", options, asyncio.get_running_loop(), **arguments)
    engine.start()
    await asyncio.wrap_future(engine.loaded)
    try:
        yield engine
    finally:
        engine.close()
        assert await asyncio.to_thread(engine.join, 20.0)


async def run(engine: Engine, each: Sequence) -> Heard:
    """Submits and waits for the end."""
    engine.submit(each)
    heard = each.listener
    assert isinstance(heard, Heard)
    await heard.finished()
    return heard


class RecordingSink:
    """An audit sink that keeps its rows in lists."""

    def __init__(self) -> None:
        self.rows: list[RequestRow] = []
        self.events: list[EventRow] = []
        self.unavailable: str | None = None

    def record(self, row: RequestRow) -> None:
        self.rows.append(row)

    def event(self, row: EventRow) -> None:
        self.events.append(row)


@dataclass
class Node:
    """A fleet and its service, with what they told."""

    fleet: Fleet
    service: InferenceService
    sinks: dict[str, RecordingSink]
    events: list[Event] = field(default_factory=list)

    def states(self, model: str) -> list[str]:
        """The states a model went through."""
        changes = (event for event in self.events if isinstance(event, ModelStateChanged))
        return [str(event.state) for event in changes if event.model == model]

    async def loaded(self, name: str) -> None:
        self.fleet.load(name)
        worker = await self.fleet.settled(name)
        assert worker.state == "ready", worker.reason


def worker_settings(name: str, **keys: Any) -> WorkerSettings:
    return WorkerSettings(**{"model_name": name, "ctx_size": 256, "model_threads": 1, "worker_concurrency": 2} | keys)


@asynccontextmanager
async def running_node(
    root: Path, *settings: WorkerSettings, memory_limit_bytes: int | None = None, grammars: Grammars | None = None
) -> AsyncIterator[Node]:
    """A node's engine rooms over a home folder of their own, without doors."""
    bus = EventBus("here")
    bus.bind(asyncio.get_running_loop())
    sinks = {each.model_name: RecordingSink() for each in settings}
    fleet = Fleet(
        Home(root, root),
        {each.model_name: each for each in settings},
        events=bus,
        audit=lambda worker: sinks[worker.model_name],
        endpoint=lambda worker: f"http://127.0.0.1/{worker.model_name}",
        node="here",
        start_time="2026-01-01T00:00:00Z",
        memory_limit_bytes=memory_limit_bytes,
    )
    node = Node(fleet, InferenceService(fleet, events=bus, node="here", grammars=grammars), sinks)
    bus.listen(node.events.append)
    try:
        yield node
    finally:
        await fleet.close()
