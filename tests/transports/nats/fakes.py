"""A fleet and a service that do as a test says, to force what a real engine would do only by chance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from engine.answer import Chunk
from engine.service import InferenceRequest
from engine.stats import ModelStats
from infsvc.errors import EngineFailed, RequestError
from infsvc.events import EventBus, LogLine, ModelStateChanged
from infsvc.settings import WorkerSettings
from infsvc.types import (
    BackpressureReport,
    BackpressureStatus,
    CompletionReply,
    HealthDocument,
    ModelState,
    QueueMetrics,
    backpressure_level,
)


class FakeAudit:
    """A log whose rows are on disk as soon as they are taken."""

    async def written(self) -> None:
        pass

    async def flush(self) -> None:
        pass


class FakeWorker:
    """A model whose state and queue are set by hand."""

    def __init__(self, name: str, events: EventBus, **settings: Any) -> None:
        self.settings = WorkerSettings(model_name=name, **settings)
        self.name = name
        self.state = ModelState.READY
        self.reason: str | None = None
        self.asked = True
        self.embeds_only = False
        self.n_active = self.n_in_line = self.n_queued_durable = self.n_in_flight = 0
        self.audit = FakeAudit()
        self.n_slots = self.settings.worker_concurrency
        self.stats = ModelStats()
        self._events = events

    @property
    def n_waiting(self) -> int:
        return self.n_in_line + self.n_queued_durable

    def note(self, level: str, code: str, msg: str, **meta: Any) -> None:
        self._events.publish(LogLine(model=self.name, level=level, code=code, msg=msg, meta=meta or None))

    def move(self, state: ModelState, reason: str | None = None) -> None:
        self.state, self.reason = state, reason
        self._events.publish(ModelStateChanged(model=self.name, state=state, reason=reason))

    def health(self) -> HealthDocument:
        return HealthDocument(
            model_name=self.name,
            status=self.state.health_status,
            reason=self.reason,
            last_activity=None,
            capabilities=["text-generation"],
            endpoint="",
            nats_topic=self.settings.subject,
            version="0",
            model_info=None,
            queue_metrics=QueueMetrics(
                pending_messages=self.n_waiting,
                active_processing=self.n_active,
                total_processed=0,
                queue_capacity=self.settings.queue_max_msgs,
                last_processed_time=None,
            ),
            backpressure_status=BackpressureStatus(level="healthy", utilization=0, threshold=5),
            node="test",
            start_time="2026-01-01T00:00:00.000Z",
        )

    def report(self) -> BackpressureReport:
        return BackpressureReport(
            model_name=self.name,
            pending_messages=self.n_waiting,
            active_processing=self.n_active,
            timestamp="2026-01-01T00:00:00.000Z",
            worker_count=self.n_slots,
            queue_capacity=self.settings.queue_max_msgs,
            status=backpressure_level(
                self.n_waiting, threshold=self.settings.backpressure_threshold, capacity=self.settings.queue_max_msgs
            ),
        )


class FakeFleet:
    def __init__(self, *workers: FakeWorker) -> None:
        self.workers = {worker.name: worker for worker in workers}

    def get(self, name: str) -> FakeWorker:
        return self.workers[name]


class FakeGeneration:
    """Yields the given texts; with `hold` it then waits until it is cancelled or `let_go` is called."""

    def __init__(self, request: InferenceRequest, texts: list[str], *, hold: bool = False, dies: bool = False) -> None:
        self.req_id = request.req_id
        self.reply: CompletionReply | None = None
        self.running = True
        self.cancelled = False
        self._texts, self._dies = texts, dies
        self._free = asyncio.Event()
        if not hold:
            self._free.set()

    async def __aenter__(self) -> FakeGeneration:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.reply is None:
            self.cancel()

    def let_go(self) -> None:
        self._free.set()

    def cancel(self) -> None:
        self.cancelled = True
        self._free.set()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        for index, text in enumerate(self._texts):
            if self.cancelled:
                break
            yield Chunk(index, text, "")
            await asyncio.sleep(0)
        await self.result()

    async def result(self) -> CompletionReply:
        await self._free.wait()
        if self._dies:
            raise EngineFailed("the engine died")
        self.reply = CompletionReply(
            req_id=self.req_id,
            text="".join(self._texts),
            tokens_in=1,
            tokens_out=len(self._texts),
            finish_reason="cancelled" if self.cancelled else "stop",
            duration_ms=1,
            ms=1,
        )
        return self.reply


class FakeService:
    """Answers each request with what `script` makes of it, or raises what it raises."""

    def __init__(self) -> None:
        self.script: Callable[[InferenceRequest], FakeGeneration] = lambda request: FakeGeneration(
            request, [f"echo: {request.input}"]
        )
        self.requests: list[InferenceRequest] = []
        self.live: dict[str, FakeGeneration] = {}
        self.submitted = asyncio.Event()
        self.draining = False
        self.repeats: list[tuple[InferenceRequest, dict[str, Any]]] = []
        self.withdrawals: list[InferenceRequest] = []
        self.refusals: list[tuple[InferenceRequest, RequestError]] = []

    def answered_again(self, request: InferenceRequest, answer: dict[str, Any]) -> None:
        self.repeats.append((request, answer))

    def withdrawn(self, request: InferenceRequest) -> None:
        self.withdrawals.append(request)

    def refused(self, request: InferenceRequest, error: RequestError) -> None:
        self.refusals.append((request, error))

    async def submit(self, request: InferenceRequest) -> FakeGeneration:
        self.requests.append(request)
        generation = self.script(request)
        self.live[request.req_id] = generation
        self.submitted.set()
        return generation

    def find(self, req_id: str) -> FakeGeneration | None:
        return self.live.get(req_id)
