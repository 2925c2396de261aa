"""One thread that embeds: the texts of many requests in one batch, over a context of its own.

A model that only embeds is loaded and freed here. One that generates lends its weights: its embedder is made at the
first request, and the engine ends it before it frees them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Literal

import numpy as np

from engine.counters import EngineCounters
from engine.embedding_job import EmbeddingEvent, EmbeddingJob, take_pack
from engine.embedding_limits import PACK_TOKENS
from engine.llama import EmbeddingContext, LlamaModel, supports_gpu
from engine.options import EmbedderOptions
from engine.step_watch import StepWatch
from infsvc.errors import LlamaError, LoadError

log = logging.getLogger("infsvc.engine")


class Embedder:
    """`submit`, `cancel` and `close` may be called from any thread.

    What may wait is bounded by who submits: the service admits no more requests than the model's queue holds.

    Args:
        name: the model's name, for the thread and the log.
        loop: where events are delivered.
        model: a loaded model that someone else closes, after this; None to load one.
        on_progress: 0..1 while loading, on the embedder's thread.
        on_died: called on the loop with a sentence when the thread ended by a fault, or hangs in a step.
    """

    def __init__(
        self,
        name: str,
        options: EmbedderOptions,
        loop: asyncio.AbstractEventLoop,
        *,
        model: LlamaModel | None = None,
        on_progress: Callable[[float], None] | None = None,
        on_died: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self.options = options
        self.counters = EngineCounters()
        self.loaded: Future[None] = Future()
        self.n_ctx = options.n_ctx
        self.n_embd = 0
        self._loop = loop
        self._model, self._owns_model = model, model is None
        self._scores = options.pooling == "rank"
        self._on_progress, self._on_died = on_progress, on_died
        self._inbox: queue.SimpleQueue[EmbeddingJob | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._gate = threading.Lock()
        self._ended = False
        self._died: str | None = None
        self._context: EmbeddingContext | None = None
        self._jobs: list[EmbeddingJob] = []
        self._reading: tuple[EmbeddingJob, ...] = ()
        self._n_packs = 0
        self._live: dict[int, EmbeddingJob] = {}
        self._watch = StepWatch(loop, f"{name}'s embedder", self._give_up)
        self._hung = False
        self._outbox: list[EmbeddingEvent] = []
        self._thread = threading.Thread(target=self._run, name=f"embed-{name}", daemon=True)

    def start(self) -> None:
        """Starts the thread; `loaded` is done when it can embed, or holds the `LoadError`."""
        self.loaded.set_running_or_notify_cancel()
        self._thread.start()
        self._call(lambda _: self._watch.look(), None)

    @property
    def model(self) -> LlamaModel:
        """The loaded model, for tokenising."""
        if self._model is None:
            raise LlamaError("the model is not loaded")
        return self._model

    @property
    def ended(self) -> bool:
        """Whether it takes no more jobs."""
        return self._ended

    @property
    def died(self) -> str | None:
        """Why it ended by itself, if it did."""
        return self._died

    def submit(self, job: EmbeddingJob) -> None:
        """Hands a job over; its listener hears of its end in any case. After the embedder's end it ends at once."""
        with self._gate:
            if not self._ended:
                self._live[job.arrival] = job
                self._inbox.put(job)
                return
        self._call(_hand_out, [self._farewell(job)])

    def cancel(self, job: EmbeddingJob) -> None:
        """Ends a job between two packs, or in the middle of one that holds nobody else's texts."""
        job.cancelled = True
        context = self._context
        if context is not None and self._reading and all(each.cancelled for each in self._reading):
            context.abort()
        self._inbox.put(None)

    def close(self) -> None:
        """Tells the thread to end: what is here ends as cancelled, then the memory is freed. `join` waits for it."""
        self._closing.set()
        self._watch.stop()
        context = self._context
        if context is not None:
            context.abort()
        self._inbox.put(None)

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread's end; False when it still runs. Call it off the loop."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _give_up(self, reason: str) -> None:
        """Ends for everyone else what the thread does not end. When it comes back after all it frees the memory."""
        log.error(reason, extra={"code": "embedder.hung", "model": self.name})
        with self._gate:
            self._ended = self._hung = True
            self._died = reason
        self.close()
        now = time.perf_counter()
        # The thread may yet tell of them too: what comes after a job's last event is dropped.
        self._told([EmbeddingEvent(each, now, "error", reason) for each in self._live.values()])
        if self._on_died is not None:
            self._on_died(reason)

    def _told(self, events: list[EmbeddingEvent]) -> None:
        """Each event to its job's listener, up to its last."""
        live = [event for event in events if event.job.arrival in self._live]
        for event in live:
            if event.kind != "started":
                self._live.pop(event.job.arrival, None)
        _hand_out(live)

    # -- the embedder's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        ready = False
        try:
            try:
                context = self._load()
            except BaseException as error:
                known = isinstance(error, LoadError)
                self._died = str(error) if known else f"the load failed: {error}"
                self.loaded.set_exception(error if known else LoadError(self._died))
                return
            ready = True
            self.loaded.set_result(None)
            while not self._closing.is_set():
                self._step(context)
        except Exception as error:
            self._died = f"the embedder of {self.name} stopped: {error}"
            log.exception(self._died, extra={"code": "embedder.died", "model": self.name})
        finally:
            self._end_all()
            if self._context is not None:
                self._context.close()
            if self._owns_model and self._model is not None:
                self._model.close()
            if self._died is not None and ready and not self._hung and self._on_died is not None:
                self._call(self._on_died, self._died)

    def _load(self) -> EmbeddingContext:
        options = self.options
        if self._model is None:
            on_gpu = supports_gpu() and options.n_gpu_layers != 0
            self._model = LlamaModel(
                options.path,
                n_gpu_layers=options.n_gpu_layers if on_gpu else 0,
                use_extra_bufts=options.use_extra_bufts,
                on_progress=self._progress,
            )
        model = self._model
        n_ctx = options.n_ctx or model.n_ctx_train
        if model.n_ctx_train and n_ctx > model.n_ctx_train:
            if self._owns_model:
                log.warning(
                    f"CTX_SIZE {n_ctx} is more than the model was trained on: texts have at most {model.n_ctx_train} "
                    "tokens",
                    extra={"code": "model.context_capped", "model": self.name},
                )
            n_ctx = model.n_ctx_train
        self.n_ctx = n_ctx
        context = EmbeddingContext(
            model,
            pooling=options.pooling,
            n_ctx=n_ctx,
            causal=options.causal,
            n_threads=options.n_threads or os.cpu_count() or 1,
        )
        self.n_embd = context.n_embd
        self._context = context
        return context

    def _progress(self, fraction: float) -> bool:
        if self._on_progress is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                self._on_progress(fraction)
        return not self._closing.is_set()

    def _step(self, context: EmbeddingContext) -> None:
        """One turn: drain the inbox, drop the cancelled, read one pack, deliver."""
        context.rearm()
        self._drain()
        if self._closing.is_set():
            return
        for job in [job for job in self._jobs if job.cancelled]:
            self._finish(job, "cancelled")
        self._watch.begin()
        self._n_packs += 1
        pack = take_pack(self._jobs, number=self._n_packs, n_tokens=PACK_TOKENS, n_texts=context.n_pack_texts)
        if pack:
            self._read(context, pack)
        self._deliver()
        self._watch.end()

    def _drain(self) -> None:
        """Takes what came in; waits for something when there is nothing to do."""
        if not self._jobs:
            self._take(self._inbox.get())
        while True:
            try:
                self._take(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _take(self, job: EmbeddingJob | None) -> None:
        if job is None:
            return
        job.vectors = np.zeros((len(job.texts), self.n_embd), dtype=np.float32)
        self._jobs.append(job)
        n_vocab = self.model.n_vocab
        for text in job.texts:
            if not 0 < len(text) <= self.n_ctx or not 0 <= min(text) <= max(text) < n_vocab:
                # It would make the whole pack fail.
                self._finish(job, "error", f"a text of {len(text)} tokens, 1 to {self.n_ctx} of {n_vocab} can be read")
                return

    def _read(self, context: EmbeddingContext, pack: list[tuple[EmbeddingJob, int]]) -> None:
        now = time.perf_counter()
        self._outbox.extend(EmbeddingEvent(job, now, "started") for job, index in pack if index == 0)
        self._deliver()
        self._reading = tuple(job for job, _ in pack)
        texts = [job.texts[index] for job, index in pack]
        vectors = context.embed(texts)
        self._reading = ()
        if vectors is None:
            # Aborted. Whoever is not cancelled, for the abort came too late for the pack it was meant for, is read
            # again.
            for job, _ in pack:
                job.n_taken = job.n_done
            return
        self.counters.n_steps += 1
        self.counters.n_prefill_tokens += sum(map(len, texts))
        self.counters.n_batch_sequences += len(texts)
        self.counters.max_batch_sequences = max(self.counters.max_batch_sequences, len(texts))
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        for (job, index), vector, norm in zip(pack, vectors, norms, strict=True):
            if job.cancelled or job not in self._jobs:
                continue  # the next step tells the former
            # A score may well be 0, and is told as it is.
            if not np.isfinite(norm) or (norm == 0 and not self._scores):
                self._finish(job, "error", "the model computed no usable vector: its file is damaged")
                continue
            assert job.vectors is not None
            job.vectors[index] = vector if self._scores else vector / norm
            job.n_done += 1
            if job.n_done == len(job.texts):
                self._finish(job, "done")

    def _finish(self, job: EmbeddingJob, kind: Literal["done", "cancelled", "error"], error: str | None = None) -> None:
        self._jobs.remove(job)
        self.counters.n_finished += 1
        self.counters.n_cancelled += kind == "cancelled"
        self._outbox.append(EmbeddingEvent(job, time.perf_counter(), kind, error))

    def _end_all(self) -> None:
        """The last act: everyone still here hears of the end."""
        self._watch.stop()
        with self._gate:
            self._ended = True
        left, self._jobs = self._jobs, []
        while True:
            try:
                job = self._inbox.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                left.append(job)
        self._outbox.extend(self._farewell(job) for job in left)
        self._reading = ()
        self._deliver()

    def _farewell(self, job: EmbeddingJob) -> EmbeddingEvent:
        self.counters.n_finished += 1
        self.counters.n_cancelled += self._died is None
        return EmbeddingEvent(job, time.perf_counter(), "cancelled" if self._died is None else "error", self._died)

    def _deliver(self) -> None:
        if self._outbox:
            events, self._outbox = self._outbox, []
            self._call(self._told, events)

    def _call(self, function: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            # The loop is closed: nobody is left to hear it.
            log.debug("the loop is closed", extra={"code": "engine.loop_closed", "model": self.name})


def _hand_out(events: list[EmbeddingEvent]) -> None:
    """On the loop: each event to its job's listener. One that fails costs the others nothing."""
    for event in events:
        try:
            event.job.listener(event)
        except Exception:
            log.exception("an event could not be delivered", extra={"code": "engine.listener_failed"})
