"""A model's own process, run as `python -m engine.child PARENT_PID SOCKET PULSE_S`: the engine and the embedder that
are a thread of the node otherwise, moved here whole, and told what to do over a `Link`.

The main thread's loop is where they deliver; what they told in one turn goes out as one frame. Tokenising and
compiling have threads of their own, so that a long text holds up no token. The process ends when it is told to, when
its parent is gone, and by whatever llama.cpp does to it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from operator import attrgetter
from typing import Any

import psutil

from engine.constraint import Constraints, Matcher
from engine.embedder import Embedder
from engine.embedding_job import EmbeddingEvent, EmbeddingJob
from engine.engine import Engine
from engine.isolated import EVENTS
from engine.link import Link, packed
from engine.llama import LlamaModel
from engine.options import EmbedderOptions, EngineOptions
from engine.remote_model import FACTS, RemoteMatcher
from engine.sequence import Sequence, SequenceEvent, SequenceFinished
from infsvc import parent_death

_JOIN_S = 60.0
_LOGGED = frozenset({"name", "levelno", "levelname", "created", "code", "model", "meta"})
_VALUES: tuple[Callable[[Any], tuple[Any, ...]], ...] = tuple(
    attrgetter(*[name for name in kind.__match_args__ if name != "sequence"]) for kind in EVENTS
)


class _ToParent(logging.Handler):
    """Log records go where the node's own go."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        fields = {name: value for name, value in vars(record).items() if name in _LOGGED}
        said = record.getMessage()
        if record.exc_info:
            said += "\n" + logging.Formatter().formatException(record.exc_info)
        self._link.send("log", fields | {"msg": said})


class Child:
    """The engine, the embedder, and what is in them, by the numbers that the parent gave. Loop thread."""

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop, pulse_s: float) -> None:
        self._link, self._loop, self._pulse_s = link, loop, pulse_s
        self._engine: Engine | None = None
        self._embedder: Embedder | None = None
        self._constraints: Constraints | None = None
        self._sequences: dict[int, Sequence] = {}
        self._jobs: dict[int, EmbeddingJob] = {}
        self._told: dict[str, list[tuple[Any, ...]]] = {"engine": [], "embedder": []}
        self._left = asyncio.Event()
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")
        self._tasks: set[asyncio.Task[None]] = set()
        self._self = psutil.Process()

    async def run(self) -> None:
        """Does what it is told, until it is told to leave, or nobody is there to tell it anything."""
        self._pulse()
        following = self._loop.create_task(self._follow())
        leaving = self._loop.create_task(self._left.wait())
        await asyncio.wait([following, leaving], return_when=asyncio.FIRST_COMPLETED)
        for running in (self._embedder, self._engine):
            if running is not None:
                running.close()
                await asyncio.to_thread(running.join, _JOIN_S)
        self._flush("engine")
        self._flush("embedder")
        leaving.cancel()
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following  # raises what went wrong in it

    async def _follow(self) -> None:
        hear: dict[str, Callable[..., None]] = {
            "engine": self._start_engine,
            "embedder": self._start_embedder,
            "submit": self._submit,
            "cancel": self._cancel,
            "embed": self._embed,
            "leave": self._leave,
            "call": self._call,
            "close": self._left.set,
        }
        async for kind, *told in self._link.frames():
            hear[kind](*told)

    def _pulse(self) -> None:
        self._link.send("pulse", int(self._self.memory_info().rss))
        for part, running in (("engine", self._engine), ("embedder", self._embedder)):
            if running is not None:
                self._link.send("counters", part, *vars(running.counters).values())
        self._loop.call_later(self._pulse_s, self._pulse)

    # -- the engine -------------------------------------------------------------------------------------------------

    def _start_engine(self, name: str, options: EngineOptions) -> None:
        engine = self._engine = Engine(
            name,
            options,
            self._loop,
            on_progress=lambda fraction: self._link.send("progress", "engine", fraction),
            on_died=lambda reason: self._link.send("died", "engine", reason),
        )

        def facts() -> dict[str, Any]:
            self._constraints = engine.constraints()
            return {"n_ctx": engine.n_ctx, "model": _facts(engine.model)}

        engine.loaded.add_done_callback(lambda loaded: self._loaded("engine", loaded, facts))
        engine.start()

    def _loaded(self, part: str, loaded: Future[None], facts: Callable[[], dict[str, Any]]) -> None:
        """On the thread that has loaded, or has not."""
        error = loaded.exception()
        if error is None:
            self._link.send("loaded", part, facts())
        else:
            self._link.send("unloadable", part, str(error))
            if part == "engine" or self._engine is None:
                self._loop.call_soon_threadsafe(self._left.set)

    def _submit(self, number: int, asked: dict[str, Any], constraint: RemoteMatcher | None) -> None:
        assert self._engine is not None
        sequence = Sequence(**asked, listener=lambda event: self._heard(number, event))
        self._sequences[number] = sequence
        if constraint is None:
            self._engine.submit(sequence)
        else:
            self._spawn(self._submit_constrained(self._engine, sequence, constraint))

    async def _submit_constrained(self, engine: Engine, sequence: Sequence, constraint: RemoteMatcher) -> None:
        # Compiled a moment ago: it is in the cache, unless it was thrown away since.
        try:
            sequence.constraint = await self._loop.run_in_executor(self._pool, self._compiled, constraint)
        except Exception as error:
            sequence.listener(SequenceFinished(sequence, time.perf_counter(), "", "error", str(error)))
        else:
            engine.submit(sequence)

    def _cancel(self, number: int) -> None:
        sequence = self._sequences.get(number)
        if sequence is not None and self._engine is not None:
            self._engine.cancel(sequence)

    def _heard(self, number: int, event: SequenceEvent) -> None:
        if isinstance(event, SequenceFinished):
            del self._sequences[number]
            if self._engine is not None and self._engine.died is not None and event.reason == "error":
                return  # the parent says so itself, when this process is gone
        kind = EVENTS.index(type(event))
        self._tell("engine", (number, kind, *_VALUES[kind](event)))

    # -- the embedder -----------------------------------------------------------------------------------------------

    def _start_embedder(self, name: str, options: EmbedderOptions) -> None:
        engine = self._engine
        embedder = self._embedder = Embedder(
            name,
            options,
            self._loop,
            model=None if engine is None else engine.model,
            on_progress=lambda fraction: self._link.send("progress", "embedder", fraction),
            on_died=lambda reason: self._link.send("died", "embedder", reason),
        )
        if engine is not None:
            engine.attach(embedder)

        def facts() -> dict[str, Any]:
            return {"n_ctx": embedder.n_ctx, "n_embd": embedder.n_embd, "model": _facts(embedder.model)}

        embedder.loaded.add_done_callback(lambda loaded: self._loaded("embedder", loaded, facts))
        embedder.start()

    def _embed(self, number: int, asked: dict[str, Any]) -> None:
        assert self._embedder is not None
        job = EmbeddingJob(**asked, listener=lambda event: self._read(number, event))
        self._jobs[number] = job
        self._embedder.submit(job)

    def _leave(self, number: int) -> None:
        job = self._jobs.get(number)
        if job is not None and self._embedder is not None:
            self._embedder.cancel(job)

    def _read(self, number: int, event: EmbeddingEvent) -> None:
        if event.kind != "started":
            del self._jobs[number]
            if self._embedder is not None and self._embedder.died is not None and event.kind == "error":
                return
        vectors = event.job.vectors if event.kind == "done" else None
        self._tell("embedder", (number, event.at_s, event.kind, event.error, vectors))

    # -- what is told and asked -------------------------------------------------------------------------------------

    def _tell(self, part: str, event: tuple[Any, ...]) -> None:
        """All events of one turn are handed out in one callback: they go out together after it."""
        if not self._told[part]:
            self._loop.call_soon(self._flush, part)
        self._told[part].append(event)

    def _flush(self, part: str) -> None:
        running = self._engine if part == "engine" else self._embedder
        if self._told[part] and running is not None:
            events, self._told[part] = self._told[part], []
            self._link.send("events", part, events, tuple(vars(running.counters).values()))

    def _call(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        self._pool.submit(self._answer, number, method, arguments)

    def _answer(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        """On a thread of the pool."""
        try:
            self._link.send("answer", number, getattr(self, f"_ask_{method}")(*arguments))
        except Exception as error:
            self._link.send("error", number, packed(error))

    def _ask_tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return self._vocabulary.tokenize(text, add_special=add_special, parse_special=parse_special)

    def _ask_token_text(self, token: int) -> str:
        return self._vocabulary.token_text(token)

    def _ask_piece(self, token: int, special: bool) -> bytes:
        return self._vocabulary.piece(token, special=special)

    def _ask_compile(self, constraint: RemoteMatcher) -> None:
        self._compiled(constraint)

    def _compiled(self, constraint: RemoteMatcher) -> Matcher:
        assert self._constraints is not None
        compile_it = self._constraints.grammar if constraint.kind == "grammar" else self._constraints.schema
        return compile_it(constraint.content)

    @property
    def _vocabulary(self) -> LlamaModel:
        running = self._engine or self._embedder
        assert running is not None
        return running.model

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _facts(model: LlamaModel) -> dict[str, Any]:
    return {name: getattr(model, name) for name in FACTS}


async def _main(end: socket.socket, pulse_s: float) -> None:
    loop = asyncio.get_running_loop()
    link = Link(loop)
    log = logging.getLogger("infsvc")
    log.addHandler(_ToParent(link))
    log.setLevel(logging.DEBUG)  # the parent's level decides
    log.propagate = False
    await link.open(end)
    await Child(link, loop, pulse_s).run()
    await link.close()


def main(arguments: list[str]) -> int:
    parent, descriptor, pulse_s = int(arguments[0]), int(arguments[1]), float(arguments[2])
    parent_death.bind(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    asyncio.run(_main(socket.socket(fileno=descriptor), pulse_s))
    return 0


if __name__ == "__main__":
    # Whatever a thread still holds on to, in llama.cpp or elsewhere, is not waited for.
    status = main(sys.argv[1:])
    logging.shutdown()
    os._exit(status)
