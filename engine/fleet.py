"""All models of a node and their lifecycle: fetch, load beside the loop, drain, unload; one that cannot load fails
alone.

Loop thread. Headers, templates and the probe run in a small pool; a model's weights are read by its own engine thread,
and its missing file is fetched by a download's own thread.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import shutil
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine import memory_fit, restarts
from engine.capabilities import pooling_of
from engine.model_file import DEMO, remove_file
from engine.model_info import ModelInfo, read_model_info
from engine.model_source import describe
from engine.options import EmbedderOptions, EngineOptions
from engine.probe import ProbeResult, probe
from engine.prompt import load_prompt_format
from engine.scheduler import N_BATCH
from engine.worker import Worker
from infsvc.audit import AuditSink
from infsvc.errors import CannotEmbed, DownloadError, EngineLost, LoadError, ModelNotLoaded, NoSource, UnknownModel
from infsvc.events import EventBus
from infsvc.home import Home
from infsvc.settings import WorkerSettings
from infsvc.types import Capability, ModelState

if TYPE_CHECKING:
    from engine.download import Download
    from engine.engine import Engine
    from engine.isolated import IsolatedEngine
    from engine.worker import AnyEmbedder, AnyEngine

log = logging.getLogger("infsvc.fleet")

DRAIN_S = 30.0
"""How long an unload waits for running work before it ends it."""

_JOIN_S = 20.0
_PULLING = (ModelState.DOWNLOADING, ModelState.VERIFYING)
_AT_REST = (ModelState.ABSENT, ModelState.ON_DISK, ModelState.FAILED)


class Fleet:
    """Every worker file's model. Built by `transports.node`.

    Args:
        audit: gives each model its audit sink.
        endpoint: gives each model its HTTP endpoint, or "".
        memory_limit_bytes: for all models together, or None.
    """

    def __init__(
        self,
        home: Home,
        settings: Mapping[str, WorkerSettings],
        *,
        events: EventBus,
        audit: Callable[[WorkerSettings], AuditSink],
        endpoint: Callable[[WorkerSettings], str],
        node: str,
        start_time: str,
        memory_limit_bytes: int | None = None,
    ) -> None:
        self._home = home
        self._memory_limit_bytes = memory_limit_bytes
        self.pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="prompt")

        def make(worker: WorkerSettings) -> Worker:
            return Worker(
                worker,
                path=home.find(worker.model_path),
                events=events,
                audit=audit(worker),
                node=node,
                start_time=start_time,
                endpoint=endpoint(worker),
            )

        self._make = make
        self.workers: dict[str, Worker] = {name: make(worker) for name, worker in settings.items()}
        self._downloads: dict[str, Download] = {}
        self._forced: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._probe: asyncio.Task[ProbeResult] | None = None
        self._reserved_bytes: dict[str, int] = {}
        self._stopping: set[str] = set()
        self._lent: set[str] = set()
        self._store_bytes: dict[str, int] = {}
        self._pauses: dict[str, asyncio.Event] = {}

    def add(self, settings: WorkerSettings) -> Worker:
        """Takes a new worker file's model in, as if it had been there at the start."""
        worker = self.workers[settings.model_name] = self._make(settings)
        if worker.state is ModelState.ON_DISK:
            self._spawn(worker.name, self._look(worker))
        return worker

    def is_at_rest(self, name: str) -> bool:
        """Whether the model is neither in memory nor on its way in or out."""
        return self.get(name).state in _AT_REST and name not in self._stopping

    def renew(self, settings: WorkerSettings) -> None:
        """Takes a changed worker file over; the model must be at rest."""
        worker = self.get(settings.model_name)
        worker.settings = settings
        worker.path = self._file(worker)

    def get(self, name: str) -> Worker:
        """The model by its name, or `UnknownModel`."""
        worker = self.workers.get(name)
        if worker is None:
            raise UnknownModel(name, sorted(self.workers))
        return worker

    def scan(self) -> None:
        """Reads the headers of all files that are on disk, in the background, for the capability matrix."""
        for worker in self.workers.values():
            if worker.state is ModelState.ON_DISK and worker.name not in self._tasks:
                self._spawn(worker.name, self._look(worker))

    def load(self, name: str, *, force: bool = False) -> Worker:
        """Begins to load; returns at once. Does nothing for a model that is loading or ready; one on its way out is
        loaded again when it is out. A missing file is fetched first, if the worker file says from where.

        Raises:
            UnknownModel: no worker file has that name.
        """
        worker = self.get(name)
        asked, worker.asked = worker.asked, True
        before = self._tasks.get(name)
        if worker.state is ModelState.DRAINING or name in self._stopping:
            if not asked:
                self._spawn(name, self._load_again(worker, before, force=force))
        elif worker.state in _PULLING:
            # It goes on to load when the file is there.
            self._forced |= {name} if force else set()
        elif worker.state not in (ModelState.LOADING, ModelState.READY):
            worker.restarts.forget()
            worker.move(ModelState.DOWNLOADING if self._is_to_fetch(worker) else ModelState.LOADING)
            self._spawn(name, self._load(worker, before, force=force))
        return worker

    def pull(self, name: str) -> Worker:
        """Begins to fetch a model's missing file; returns at once. Does nothing where the file is there or on its way.

        Raises:
            UnknownModel: no worker file has that name.
            NoSource: the file is missing and the worker file does not say where it comes from.
        """
        worker = self.get(name)
        if worker.state in (ModelState.ABSENT, ModelState.ON_DISK, ModelState.FAILED):
            if self._is_to_fetch(worker):
                worker.asked = False
                worker.move(ModelState.DOWNLOADING)
                self._spawn(name, self._load(worker, self._tasks.get(name), force=False))
            elif not self._file(worker).is_file():
                raise NoSource(worker.settings.model_path)
            elif worker.state is not ModelState.ON_DISK:
                worker.asked = False
                self._rest(worker)
        return worker

    def remove_file(self, name: str) -> int:
        """Removes the file of a model that is not in memory, with what has come of an unfinished download.

        Returns:
            The bytes that were freed.

        Raises:
            UnknownModel: no worker file has that name.
            LoadError: the file is in use, is not there, ships with infsvc, or is a user's own.
        """
        worker = self.get(name)
        if worker.state not in (ModelState.ABSENT, ModelState.ON_DISK, ModelState.FAILED):
            raise LoadError(f"{name} is {worker.state.replace('_', ' ')}: unload it before its file is removed")
        path = self._file(worker)
        n_bytes = remove_file(self._home, worker.settings)
        shutil.rmtree(self.state_folder(worker), ignore_errors=True)  # of no use without the file
        worker.asked, worker.info, worker.claims = False, None, ()
        worker.path = self._file(worker)
        self._rest(worker)
        worker.note("info", "model.removed", f"{path} was removed", bytes=n_bytes)
        return n_bytes

    def _file(self, worker: Worker) -> Path:
        """Where the model's file is, or would be."""
        return self._home.find(worker.settings.model_path)

    def state_folder(self, worker: Worker) -> Path:
        """Where the states of a model's prompts lie, if they are kept on disk."""
        return self._home.root / worker.settings.data_dir / "prefixes" / worker.name

    def _is_to_fetch(self, worker: Worker) -> bool:
        return bool(describe(worker.settings)) and not self._file(worker).exists()

    async def settled(self, name: str) -> Worker:
        """Waits until what was begun with the model has ended, well or not."""
        while (task := self._tasks.get(name)) is not None and not task.done():
            await asyncio.wait([task])
        return self.get(name)

    async def unload(self, name: str, *, grace_s: float = DRAIN_S) -> None:
        """Refuses new work, waits `grace_s` for what runs, ends the rest and frees the memory. A second call ends it at
        once. A download is stopped; what has come of it is kept."""
        worker = self.get(name)
        worker.asked = False
        if worker.state is ModelState.DRAINING:
            for generation in tuple(worker.requests.values()):
                generation.cancel()
            await self.settled(name)
        elif worker.state is ModelState.LOADING:
            self._stopping.add(name)
            if (pause := self._pauses.get(name)) is not None:
                pause.set()
            for running in (worker.engine, worker.embedder):
                if running is not None:
                    running.close()
            await self.settled(name)
        elif worker.state in _PULLING:
            self._stopping.add(name)
            if (download := self._downloads.get(name)) is not None:
                download.stop()
            await self.settled(name)
        elif worker.state is ModelState.READY:
            worker.move(ModelState.DRAINING)
            self._spawn(name, self._drain(worker, grace_s))
            await self.settled(name)
        elif worker.state is ModelState.FAILED:
            self._rest(worker)

    async def close(self) -> None:
        """Ends all engines at once; what still runs is cancelled."""
        await asyncio.gather(*(self.unload(name, grace_s=0) for name in self.workers), return_exceptions=True)
        tasks = [task for task in (*self._tasks.values(), self._probe) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[name] = asyncio.create_task(work, name=f"model-{name}")

    @staticmethod
    def _rest(worker: Worker) -> None:
        """Back to where a model is that nobody runs."""
        worker.move(ModelState.ON_DISK if worker.path.is_file() else ModelState.ABSENT)

    async def _look(self, worker: Worker) -> None:
        try:
            worker.learn(await self._header(worker))
        except LoadError as error:
            worker.note("warning", "model.unreadable", str(error))

    async def _header(self, worker: Worker) -> ModelInfo:
        return await asyncio.get_running_loop().run_in_executor(self.pool, read_model_info, worker.path)

    async def _load_again(self, worker: Worker, before: asyncio.Task[None] | None, *, force: bool) -> None:
        """Loads a model that was on its way out, if it is still wanted when it is out."""
        if before is not None:
            await asyncio.wait([before])
        if worker.asked and worker.state not in (ModelState.LOADING, ModelState.READY, ModelState.DRAINING):
            worker.move(ModelState.LOADING)
            await self._load(worker, None, force=force)

    async def _load(self, worker: Worker, before: asyncio.Task[None] | None, *, force: bool) -> None:
        try:
            if before is not None:
                await asyncio.wait([before])
            if worker.state in _PULLING:
                await self._fetch(worker)
                if not worker.asked:
                    self._rest(worker)
                    await self._look(worker)
                    return
                worker.move(ModelState.ON_DISK)
                worker.move(ModelState.LOADING)
            worker.path = self._file(worker)
            if not worker.path.exists() and not describe(worker.settings):
                raise NoSource(worker.settings.model_path)
            info = await self._header(worker)
            worker.learn(info)
            build = await self._build()
            self._store_bytes[worker.name] = self._check(
                worker, info, build, force=force or worker.name in self._forced
            )
            await self._start(worker, info)
        except LoadError as error:
            self._not_loaded(worker, str(error))
        except Exception as error:
            log.exception("a load failed", extra={"code": "model.load_error", "model": worker.name})
            self._not_loaded(worker, f"the load failed: {error}")
        finally:
            self._stopping.discard(worker.name)
            self._forced.discard(worker.name)

    async def _fetch(self, worker: Worker) -> None:
        """Fetches the model's file in a thread of its own. Raises `DownloadError`."""
        # Imports an HTTP client, which only a download needs.
        room = await asyncio.get_running_loop().run_in_executor(self.pool, importlib.import_module, "engine.download")
        if worker.name in self._stopping:
            raise DownloadError("the download was stopped")
        loop = asyncio.get_running_loop()

        def tell(call: Callable[..., None], *values: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended, and the download hears so in a moment
                loop.call_soon_threadsafe(call, *values)

        target = self._home.root / worker.settings.model_path
        download = room.Download(
            worker.settings,
            target,
            on_progress=lambda progress: tell(worker.pulling, progress),
            on_note=lambda *note: tell(worker.note, *note),
        )
        self._downloads[worker.name] = download
        worker.note("info", "model.download", f"{target} is fetched from {describe(worker.settings)}")
        download.start()
        try:
            fetched = await asyncio.wrap_future(download.done)
        except asyncio.CancelledError:
            download.stop()
            raise
        finally:
            del self._downloads[worker.name]
            await loop.run_in_executor(None, download.join, _JOIN_S)
        worker.path = fetched.path
        by = {"sha256": "its SHA-256", "size": "its size alone, as no MODEL_SHA256 is set"}.get(fetched.verified)
        worker.note(
            "info" if fetched.verified == "sha256" else "warning",
            "model.fetched",
            f"{fetched.path} is there, {f'verified by {by}' if by else 'not verified'}",
            bytes=fetched.total_bytes,
            resumed_bytes=fetched.resumed_bytes,
            sha256=fetched.sha256,
        )

    def _not_loaded(self, worker: Worker, reason: str) -> None:
        if worker.name in self._stopping:
            self._forget(worker)
            self._rest(worker)
        else:
            self._failed(worker, reason)

    def _check(self, worker: Worker, info: ModelInfo, build: ProbeResult, *, force: bool) -> int:
        """Sets the memory aside; returns how much of it the store of states may have."""
        if not worker.embeds_only:
            need = memory_fit.estimate(
                info,
                n_ctx=worker.n_ctx,
                n_slots=worker.n_slots,
                n_batch=N_BATCH,
                flash_attention=build.flash_attention,
                repacks=build.use_extra_bufts,
            )
            return self._fits(worker, need, force=force, cache_mb=worker.settings.prefix_cache_mb)
        if worker.has(Capability.EMBEDDINGS) or worker.has(Capability.RERANKING):
            need = memory_fit.estimate_embedding(info, n_ctx=worker.n_ctx, weights=True)
            return self._fits(worker, need, force=force)
        raise LoadError(worker.evidence(Capability.EMBEDDINGS))

    def _fits(self, worker: Worker, need: memory_fit.MemoryEstimate, *, force: bool, cache_mb: int = 0) -> int:
        """Sets memory aside for the model, beside what it has; returns the bytes for the store of states. Raises
        `MemoryFitError`."""
        cache_bytes = cache_mb * 2**20
        if not force:
            pending = (n for name, n in self._reserved_bytes.items() if self.workers[name].state is ModelState.LOADING)
            left = memory_fit.check(
                need,
                limit_bytes=self._memory_limit_bytes,
                used_bytes=sum(self._reserved_bytes.values()),
                pending_bytes=sum(pending),
            )
            cache_bytes = memory_fit.prefix_cache_bytes(cache_mb, left)
        before = self._reserved_bytes.get(worker.name, 0)
        self._reserved_bytes[worker.name] = before + need.total_bytes + cache_bytes
        return cache_bytes

    async def _start(self, worker: Worker, info: ModelInfo) -> None:
        """Loads the model into memory that was set aside for it; it is ready then. Raises `LoadError`."""
        if worker.embeds_only:
            await self._start_embedder(worker, info)
        else:
            await self._start_engine(worker, info)

    async def _start_engine(self, worker: Worker, info: ModelInfo) -> None:
        loop = asyncio.get_running_loop()
        layers = worker.settings.gpu_layers

        def on_progress(fraction: float) -> None:
            loop.call_soon_threadsafe(worker.loading, fraction)

        def on_died(reason: str) -> None:
            if worker.engine is engine:
                self._died(worker, reason)

        build = await self._build()
        room = await self._room(worker, "engine.engine")
        options = EngineOptions(
            path=worker.path,
            n_ctx=worker.n_ctx,
            n_slots=worker.n_slots,
            n_threads=worker.settings.model_threads,
            n_gpu_layers=-1 if layers == "auto" else layers,
            use_extra_bufts=build.use_extra_bufts,
            flash_attention=build.flash_attention,
            share_prefixes=worker.settings.prefix_cache_mb > 0,
            prefix_cache_bytes=self._store_bytes[worker.name],
            state_folder=self.state_folder(worker),
            state_folder_bytes=worker.settings.prefix_cache_disk_mb * 2**20,
            draft_max=worker.settings.draft_max,
        )
        make = room.IsolatedEngine if worker.isolated else room.Engine
        engine: AnyEngine = make(worker.name, options, loop, on_progress=on_progress, on_died=on_died)
        worker.engine = engine
        engine.start()
        try:
            await asyncio.wrap_future(engine.loaded)
            model = engine.model
            worker.format = await loop.run_in_executor(
                self.pool,
                lambda: load_prompt_format(
                    worker.path,
                    info.chat_template,
                    bos=model.token_text(model.bos),
                    eos=model.token_text(model.eos),
                    settings=worker.settings,
                    vocabulary=info.special_tokens,
                ),
            )
            if worker.name in self._stopping:
                # It was loaded before it heard that it should stop.
                raise LoadError("the load was stopped")
            self._check_lives(engine)
        except EngineLost as error:
            await self._end_engine(worker)
            raise LoadError(str(error)) from None
        except BaseException:
            await self._end_engine(worker)
            raise
        if worker.engine is engine:  # else it died meanwhile, and `_failed` has said so
            worker.move(ModelState.READY)

    async def _start_embedder(self, worker: Worker, info: ModelInfo) -> None:
        """Loads a model that only embeds."""
        loop = asyncio.get_running_loop()
        build = await self._build()
        room = await self._room(worker, "engine.embedder")

        def on_progress(fraction: float) -> None:
            loop.call_soon_threadsafe(worker.loading, fraction)

        def on_died(reason: str) -> None:
            if worker.embedder is embedder:
                self._died(worker, reason)

        options = self._embedder_options(worker, info, use_extra_bufts=build.use_extra_bufts)
        make = room.IsolatedEmbedder if worker.isolated else room.Embedder
        embedder: AnyEmbedder = make(worker.name, options, loop, on_progress=on_progress, on_died=on_died)
        worker.embedder = embedder
        embedder.start()
        try:
            await asyncio.wrap_future(embedder.loaded)
            if worker.name in self._stopping:
                raise LoadError("the load was stopped")
            self._check_lives(embedder)
        except BaseException:
            await self._end_engine(worker)
            raise
        if worker.embedder is embedder:
            worker.move(ModelState.READY)

    @staticmethod
    def _embedder_options(worker: Worker, info: ModelInfo, *, use_extra_bufts: bool = True) -> EmbedderOptions:
        settings = worker.settings
        return EmbedderOptions(
            path=worker.path,
            n_ctx=worker.n_ctx,
            pooling=pooling_of(info, settings.pooling) or "none",
            causal=info.causal,
            n_threads=settings.model_threads,
            n_gpu_layers=-1 if settings.gpu_layers == "auto" else settings.gpu_layers,
            use_extra_bufts=use_extra_bufts,
        )

    async def _room(self, worker: Worker, name: str) -> Any:
        """The module of what runs the model. Raises `LoadError` when it is not wanted any more."""
        # A thread's imports llama.cpp, which takes half a second: off the loop, at the first load, so that the first
        # frame need not wait.
        name = "engine.isolated" if worker.isolated else name
        room = await asyncio.get_running_loop().run_in_executor(self.pool, importlib.import_module, name)
        if worker.name in self._stopping:
            raise LoadError("the load was stopped")
        return room

    @staticmethod
    def _check_lives(running: AnyEngine | AnyEmbedder) -> None:
        """Raises `LoadError` for a process that has ended right after the load."""
        if (process := getattr(running, "process", None)) is not None and running.died is not None:
            raise LoadError(str(EngineLost(process.name, running.died)))

    async def embedder(self, worker: Worker) -> AnyEmbedder:
        """What embeds for a ready model. One that generates gets it here, at the first request for embeddings, over the
        weights that it has; it stays until the model leaves.

        Raises:
            CannotEmbed: there is too little memory for its context, or llama.cpp cannot make it.
        """
        found = worker.embedder
        if found is None or found.ended:
            found = self._lend(worker)
        try:
            await asyncio.wrap_future(found.loaded)
        except LoadError as error:
            if worker.embedder is found:
                worker.embedder = None
            raise CannotEmbed(f"{worker.name} cannot embed now: {error}", param="model") from None
        return found

    def _lend(self, worker: Worker) -> AnyEmbedder:
        engine, info = worker.engine, worker.info
        if engine is None or info is None:
            raise ModelNotLoaded(worker.name, worker.state.replace("_", " "), worker.reason)
        # Memory that was set aside for an earlier one, which has ended, counts for this one.
        if worker.name not in self._lent:
            need = memory_fit.estimate_embedding(info, n_ctx=worker.n_ctx, weights=False)
            try:
                self._fits(worker, need, force=False)
            except LoadError as error:
                raise CannotEmbed(f"{worker.name} cannot embed now: {error}", param="model") from None
            self._lent.add(worker.name)
        embedder = worker.embedder = _lent(engine, self._embedder_options(worker, info), worker)
        embedder.start()
        return embedder

    async def _build(self) -> ProbeResult:
        """The probe's answer, asked once a node; the demo model is what it decodes with."""
        if self._probe is None or (
            self._probe.done() and (self._probe.cancelled() or self._probe.exception() is not None)
        ):
            demo = self._home.shipped / DEMO
            if not demo.is_file():
                return ProbeResult()
            self._probe = asyncio.create_task(probe(demo, self._home.own("data/run/probe.json")), name="probe")
        return await asyncio.shield(self._probe)

    def _died(self, worker: Worker, reason: str) -> None:
        """A running model has ended by itself, and so have its requests."""
        if not worker.isolated:
            self._failed(worker, reason)
        elif worker.state is ModelState.READY:  # else who loads or ends it sees to it
            worker.engine = worker.embedder = worker.format = worker.constraints = None
            if (pause_s := self._lost(worker, reason)) is not None:
                self._spawn(worker.name, self._restart(worker, pause_s))

    def _lost(self, worker: Worker, reason: str) -> float | None:
        """Says that a model's process was lost; returns the pause before the next start, None when it is given up."""
        pause_s, n = worker.restarts.lost(), worker.restarts.n
        if pause_s is None:
            self._failed(worker, f"lost {n} times in a short time, at last so: {reason}")
        else:
            worker.note("error", "model.lost", f"{reason} (start {n} of {restarts.N_MAX}, in {pause_s:g} s)")
            worker.move(ModelState.LOADING, reason)
        return pause_s

    async def _restart(self, worker: Worker, pause_s: float | None) -> None:
        """Starts the process of a lost model again, after pauses that grow, until it is ready or given up. Its memory
        stays set aside meanwhile."""
        name = worker.name
        set_aside, lent = self._reserved_bytes.get(name, 0), name in self._lent
        try:
            while pause_s is not None:
                try:
                    await self._paused(worker, pause_s)
                    info = await self._header(worker)
                    worker.learn(info)
                    await self._start(worker, info)
                    return
                except LoadError as error:
                    reason = str(error)
                if name in self._stopping:
                    self._not_loaded(worker, reason)
                    return
                self._reserved_bytes[name] = set_aside
                self._lent |= {name} if lent else set()
                pause_s = self._lost(worker, reason)
        except Exception as error:
            log.exception("a restart failed", extra={"code": "model.load_error", "model": name})
            self._not_loaded(worker, f"the restart failed: {error}")
        finally:
            self._stopping.discard(name)

    async def _paused(self, worker: Worker, seconds: float) -> None:
        """Waits; raises `LoadError` when the model is not wanted any more."""
        stopped = self._pauses[worker.name] = asyncio.Event()
        if worker.name in self._stopping:
            stopped.set()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await stopped.wait()
        finally:
            del self._pauses[worker.name]
        if worker.name in self._stopping:
            raise LoadError("the load was stopped")

    def _failed(self, worker: Worker, reason: str) -> None:
        self._forget(worker)
        worker.engine = worker.embedder = worker.constraints = None
        worker.move(ModelState.FAILED, reason)

    async def _drain(self, worker: Worker, grace_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + grace_s
        while (
            worker.requests
            and asyncio.get_running_loop().time() < deadline
            and (worker.engine is not None or worker.embedder is not None)
        ):
            waits = [asyncio.ensure_future(generation.ended()) for generation in worker.requests.values()]
            await asyncio.wait(waits, timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
            for wait in waits:
                wait.cancel()
        await self._end_engine(worker)
        # A failure on the way out has said so already.
        if worker.state is ModelState.DRAINING:
            self._rest(worker)

    async def _end_engine(self, worker: Worker) -> None:
        """Closes the engine and waits for its thread, off the loop. Prompts that are being rendered still use its
        vocabulary."""
        await worker.quiet()
        for running in (worker.embedder, worker.engine):
            if running is not None:
                running.close()
                ended = await asyncio.get_running_loop().run_in_executor(None, running.join, _JOIN_S)
                if not ended:
                    log.error("an engine does not end", extra={"code": "engine.stuck", "model": worker.name})
        self._forget(worker)
        worker.engine = worker.embedder = worker.format = worker.constraints = None

    def _forget(self, worker: Worker) -> None:
        """Gives back the memory that was set aside for a model."""
        self._reserved_bytes.pop(worker.name, None)
        self._lent.discard(worker.name)


def _lent(engine: AnyEngine, options: EmbedderOptions, worker: Worker) -> AnyEmbedder:
    """An embedder over the weights of an engine, where that runs."""
    loop = asyncio.get_running_loop()
    if worker.isolated:
        from engine.isolated import IsolatedEmbedder

        return IsolatedEmbedder(worker.name, options, loop, engine=cast("IsolatedEngine", engine))
    from engine.embedder import Embedder  # engine.engine has imported llama.cpp already

    thread = cast("Engine", engine)
    embedder = Embedder(
        worker.name,
        options,
        loop,
        model=thread.model,
        on_died=lambda reason: worker.note("error", "embedder.died", reason),
    )
    thread.attach(embedder)
    return embedder
