"""An engine and an embedder that live in a process of their own, with the interface of those that are a thread here.

Each hands over what a thread would be handed, and tells what the child's own tells, to the same listeners. What the
child cannot tell any more, because it died, is told here: every request in it hears of its end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from engine.counters import EngineCounters
from engine.embedding_job import EmbeddingEvent, EmbeddingJob
from engine.model_process import ModelProcess
from engine.options import EmbedderOptions, EngineOptions
from engine.remote_model import RemoteConstraints, RemoteModel
from engine.sequence import (
    Sequence,
    SequenceEvent,
    SequenceFinished,
    SequenceStarted,
    SequenceState,
    TokenEmitted,
)
from infsvc.errors import EngineLost, LlamaError, LoadError

if TYPE_CHECKING:
    from engine.link import Frame

log = logging.getLogger("infsvc.engine")

SENT = (
    "prompt",
    "sampler",
    "max_tokens",
    "n_ctx",
    "stop",
    "ignore_eos",
    "special",
    "shown",
    "priority",
    "client",
    "n_logprobs",
    "draft_max",
)
"""What of a sequence the child gets. Its listener stays here; of its constraint the child gets the text; the rest is
the engine's own."""

JOB_SENT = ("texts", "priority")
"""What of a job for the embedder the child gets."""

EVENTS: tuple[type[SequenceEvent], ...] = (SequenceStarted, TokenEmitted, SequenceFinished)

Work = TypeVar("Work", Sequence, EmbeddingJob)


class _Isolated(Generic[Work]):
    """What both have in common: how they begin and end, and who is in them. Loop thread but where it says so."""

    part: str

    def __init__(
        self,
        process: ModelProcess,
        options: EngineOptions | EmbedderOptions,
        *,
        owns: bool,
        on_progress: Callable[[float], None] | None,
        on_died: Callable[[str], None] | None,
    ) -> None:
        self.name, self.process = process.name, process
        self.n_ctx = options.n_ctx
        self.counters = EngineCounters()
        self.loaded: Future[None] = Future()
        self._owns = owns
        self._options = options
        self._model: RemoteModel | None = None
        self._live: dict[int, Work] = {}
        self._ended = False
        self._lost: str | None = None
        self._on_progress, self._on_died = on_progress, on_died
        process.admit(self.part, self)

    @property
    def ended(self) -> bool:
        """Whether it takes nothing more."""
        return self._ended

    @property
    def died(self) -> str | None:
        """Why its process ended by itself, if it did."""
        return self._lost

    @property
    def model(self) -> RemoteModel:
        """The loaded model, for tokenising."""
        if self._model is None:
            raise LlamaError("the model is not loaded")
        return self._model

    def start(self) -> None:
        """Starts it, and the process if that is its own; `loaded` is done when it is ready, or holds the
        `LoadError`."""
        self.loaded.set_running_or_notify_cancel()
        if self._owns:
            try:
                self.process.start()
            except OSError as error:
                self._ended = True
                self.loaded.set_exception(LoadError(f"no process can be started: {error}"))
                return
        self.process.send(self.part, self.name, self._options)

    def close(self) -> None:
        """Tells it to end: what is in it ends as cancelled. `join` waits for it. Any thread."""
        if self._owns:
            self.process.close()

    def join(self, timeout_s: float) -> bool:
        """Waits for the end of the process; False when it still runs. Not on the loop's thread."""
        return not self._owns or self.process.join(timeout_s)

    def hear(self, kind: str, told: Frame) -> None:
        """Takes what the child tells of it."""
        match kind:
            case "progress":
                if self._on_progress is not None:
                    self._on_progress(*told)
            case "loaded":
                (facts,) = told
                self.n_ctx = facts["n_ctx"]
                self._model = RemoteModel(self.process, facts["model"])
                self._take_facts(facts)
                self.loaded.set_result(None)
            case "unloadable":
                (reason,) = told
                self._ended = True
                self.loaded.set_exception(LoadError(reason))
            case "died":
                (reason,) = told
                self.process.kill(reason)
            case "counters":
                self.counters = EngineCounters(*told)
            case "events":
                events, counters = told
                self.counters = EngineCounters(*counters)
                for event in events:
                    self._hand_out(*event)

    def bereave(self, reason: str | None) -> None:
        """The process has ended: so does everything in it. `reason` says why, None that it was closed."""
        ended, self._ended, self._lost = self._ended, True, reason
        if not self.loaded.done():
            self.loaded.set_exception(LoadError(f"its process did not live: {reason}" if reason else "it was closed"))
            return
        live, self._live = self._live, {}
        for work in live.values():
            self._tell(work, self._farewell(work))
        if reason is not None and not ended and self._on_died is not None:
            self._on_died(str(EngineLost(self.name, reason)))

    def _take_facts(self, facts: dict[str, Any]) -> None:
        """What only one of them learns when it is loaded."""

    def _hand_out(self, number: int, *told: Any) -> None:
        raise NotImplementedError

    def _farewell(self, work: Work) -> Any:
        raise NotImplementedError

    def _tell(self, work: Work, event: Any) -> None:
        """To the listener. One that fails costs the others nothing."""
        try:
            work.listener(event)
        except Exception:
            log.exception("an event could not be delivered", extra={"code": "engine.listener_failed"})


class IsolatedEngine(_Isolated[Sequence]):
    """`engine.engine.Engine` in a process of its own. Loop thread, save for `join`.

    Args:
        on_progress: 0..1 while loading.
        on_died: called with a sentence when the process ended by itself, or hung and was killed.
    """

    part = "engine"

    def __init__(
        self,
        name: str,
        options: EngineOptions,
        loop: asyncio.AbstractEventLoop,
        *,
        on_progress: Callable[[float], None] | None = None,
        on_died: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(ModelProcess(name, loop), options, owns=True, on_progress=on_progress, on_died=on_died)
        self.options = options
        self._loop = loop

    def constraints(self) -> RemoteConstraints:
        """What compiles constraints for this vocabulary."""
        return RemoteConstraints(self.process)

    def submit(self, sequence: Sequence) -> None:
        """Hands a sequence over; its listener hears of all that follows, of its end in any case."""
        if self._ended:
            self._loop.call_soon(self._tell, sequence, self._farewell(sequence))
            return
        self._live[sequence.arrival] = sequence
        asked = {name: getattr(sequence, name) for name in SENT}
        self.process.send("submit", sequence.arrival, asked, sequence.constraint)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence soon."""
        sequence.cancelled = True
        self.process.send("cancel", sequence.arrival)

    def _hand_out(self, number: int, *told: Any) -> None:
        sequence = self._live.get(number)
        if sequence is None:
            return
        kind, *values = told
        event = EVENTS[kind](sequence, *values)
        if isinstance(event, SequenceFinished):
            del self._live[number]
            sequence.state = SequenceState.FINISHED
        self._tell(sequence, event)

    def _farewell(self, sequence: Sequence) -> SequenceFinished:
        sequence.state = SequenceState.FINISHED
        now = time.perf_counter()
        if self._lost is None:
            return SequenceFinished(sequence, now, "", "cancelled")
        return SequenceFinished(sequence, now, "", "error", self._lost, lost=True)


class IsolatedEmbedder(_Isolated[EmbeddingJob]):
    """`engine.embedder.Embedder` in a process of its own, or in that of the engine whose weights it reads. Loop thread,
    save for `join`.

    Args:
        engine: whose process and weights it shares; None for its own.
        on_progress, on_died: as those of an engine; the latter only where the process is its own.
    """

    part = "embedder"

    def __init__(
        self,
        name: str,
        options: EmbedderOptions,
        loop: asyncio.AbstractEventLoop,
        *,
        engine: IsolatedEngine | None = None,
        on_progress: Callable[[float], None] | None = None,
        on_died: Callable[[str], None] | None = None,
    ) -> None:
        process = ModelProcess(name, loop) if engine is None else engine.process
        super().__init__(
            process,
            options,
            owns=engine is None,
            on_progress=on_progress,
            on_died=on_died,
        )
        self.options = options
        self.n_embd = 0
        self._loop = loop

    def submit(self, job: EmbeddingJob) -> None:
        """Hands a job over; its listener hears of its end in any case."""
        if self._ended:
            self._loop.call_soon(self._tell, job, self._farewell(job))
            return
        self._live[job.arrival] = job
        self.process.send("embed", job.arrival, {name: getattr(job, name) for name in JOB_SENT})

    def cancel(self, job: EmbeddingJob) -> None:
        """Ends a job soon."""
        job.cancelled = True
        self.process.send("leave", job.arrival)

    def _take_facts(self, facts: dict[str, Any]) -> None:
        self.n_embd = facts["n_embd"]

    def _hand_out(self, number: int, *told: Any) -> None:
        job = self._live.get(number)
        if job is None:
            return
        at_s, kind, error, vectors = told
        if vectors is not None:
            job.vectors = vectors
        if kind != "started":
            del self._live[number]
        self._tell(job, EmbeddingEvent(job, at_s, kind, error))

    def _farewell(self, job: EmbeddingJob) -> EmbeddingEvent:
        now = time.perf_counter()
        if self._lost is None:
            return EmbeddingEvent(job, now, "cancelled")
        return EmbeddingEvent(job, now, "error", self._lost, lost=True)
