"""Many streams at once on the demo model, a third of which leave at a random moment: `python -m tests.torture.streams`.

Half go over HTTP in the native shape, a quarter as OpenAI's chats, a quarter over NATS. What must hold:

- every stream that stays gets all its tokens, in order, and a last word that agrees with its pieces;
- afterwards the node has no task, file descriptor or sequence more than before, and the same memory;
- the audit log says `cancelled` of those that left, and of no other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from infsvc import Client
from tests.nodes import add_worker, free_port, node_environ

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data/models/demo/model.gguf"
WARM_S = 10.0
SETTLE_S = 15.0
SLACK_BYTES = 8 * 2**20
"""How far memory may drift: pages that the allocator keeps."""


def left_behind(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What a load has left in a node, by its facts while it rested and when it rests again."""
    faults = [
        f"{key}: {before[key]} before, {after[key]} after ({after.get('names')})"
        for key in ("tasks", "fds", "threads")
        if after[key] > before[key]
    ]
    return faults + [f"{after[key]} {key} are left" for key in ("sequences", "slots") if after[key]]


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        n_streams: at any moment.
        leave: the share of streams that go before their end.
        warm_s: load before anything is measured, until pools and caches have their size.
    """

    n_streams: int = 200
    seconds: float = 120.0
    leave: float = 1 / 3
    warm_s: float = WARM_S
    seed: int = 1


@dataclass
class Outcome:
    """What came of it; `faults` are sentences about what should not be. `before` is after the warm-up; RSS in bytes."""

    n_kept: int = 0
    n_left: int = 0
    n_chunks: int = 0
    by_door: Counter[str] = field(default_factory=Counter)
    rows: dict[str, int] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    rss_loaded: list[int] = field(default_factory=list)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        doors = ", ".join(f"{n} {door}" for door, n in sorted(self.by_door.items()))
        mib = [f"{each / 2**20:.0f}" for each in self.rss_loaded[:: max(1, len(self.rss_loaded) // 8)]]
        return "\n".join(
            [
                f"{self.n_kept + self.n_left} streams in {self.seconds:.0f} s ({doors}); {self.n_left} left, "
                f"{self.n_kept} had all their tokens; {self.n_chunks} pieces",
                f"audit rows: {self.rows}",
                *(
                    f"{key}: {self.before.get(key)} before, {self.after.get(key)} after"
                    for key in ("tasks", "fds", "threads", "sequences", "slots")
                ),
                f"memory: {self.before.get('rss', 0) / 2**20:.1f} MiB before, {self.after.get('rss', 0) / 2**20:.1f} "
                f"after; under load {', '.join(mib)}",
                *(f"FAULT: {fault}" for fault in self.faults),
            ]
        )


class Streams:
    """One run in one folder."""

    def __init__(self, folder: Path, plan: Plan, say: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.plan, self._say = folder, plan, say
        self.outcome = Outcome()
        self._random = random.Random(plan.seed)
        add_worker(
            folder, "demo", DEMO, WORKER_CONCURRENCY=64, CTX_SIZE=512, QUEUE_MAX_MSGS=plan.n_streams * 2,
            PREFIX_CACHE_MB=8,
        )  # fmt: skip
        self.port = free_port()
        self.environ = node_environ(folder, gateway=f":{self.port}", embedded_nats="auto")
        self.url = f"http://127.0.0.1:{self.port}"
        self.nats_url = self.environ["INFSVC_NATS_URL"]

    async def run(self) -> Outcome:
        told = self.folder / "told.json"
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.torture.streams", "--node", str(told), cwd=ROOT,
            env=dict(os.environ) | self.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        begun = time.monotonic()
        try:
            await self._until_healthy()
            self._process = psutil.Process(child.pid)
            await self._load(self.plan.warm_s, Outcome())
            self.outcome.before = await self._settled(told, None)
            self._say(f"  warm: {self.outcome.before}")
            rows_before = self._rows()
            await self._load(self.plan.seconds, self.outcome)
            self.outcome.after = await self._settled(told, self.outcome.before)
            self.outcome.rows = {
                status: n - rows_before.get(status, 0)
                for status, n in self._rows().items()
                if n - rows_before.get(status, 0)
            }
        finally:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
            ended = await asyncio.wait_for(child.wait(), 20)
        if ended != 0:
            self.outcome.faults.append(f"the node ended with {ended}")
        self._check()
        self.outcome.seconds = time.monotonic() - begun
        return self.outcome

    async def _until_healthy(self) -> None:
        async with asyncio.timeout(60), httpx2.AsyncClient(base_url=self.url, trust_env=False) as http:
            while True:
                with suppress(httpx2.HTTPError):
                    if (await http.get("/healthz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    async def _load(self, seconds: float, outcome: Outcome) -> None:
        """Streams one after another in `n_streams` lanes until the time is over; what runs then goes on to its end."""
        until = time.monotonic() + seconds
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx2.AsyncClient(base_url=self.url, timeout=120, trust_env=False, limits=limits) as http,
            Client(self.nats_url) as bus,
            asyncio.TaskGroup() as tasks,
        ):
            watching = asyncio.create_task(self._watch(outcome))
            lanes = [tasks.create_task(self._lane(n, http, bus, until, outcome)) for n in range(self.plan.n_streams)]
            await asyncio.wait(lanes)
            watching.cancel()

    async def _watch(self, outcome: Outcome) -> None:
        while True:
            outcome.rss_loaded.append(self._process.memory_info().rss)
            await asyncio.sleep(1.0)

    async def _lane(self, lane: int, http: httpx2.AsyncClient, bus: Client, until: float, outcome: Outcome) -> None:
        chance = random.Random(self.plan.seed * 1000 + lane)
        door = ("native", "chat", "native", "nats")[lane % 4]
        while time.monotonic() < until:
            n_tokens = chance.randint(10, 120)
            leaves = chance.random() < self.plan.leave
            # While it waits or is read, or after some of its pieces.
            after_s = chance.uniform(0.0, 0.3) if leaves and chance.random() < 0.5 else None
            n_pieces = chance.randint(1, max(1, n_tokens // 2)) if leaves and after_s is None else None
            question = f"Tell me about number {chance.randint(0, 40)}, please."
            pieces = self._pieces(door, http, bus, question, n_tokens)
            try:
                if after_s is not None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(after_s):
                            await self._read(pieces, None, n_tokens, outcome)
                            leaves = False
                else:
                    leaves = not await self._read(pieces, n_pieces, n_tokens, outcome)
            except Exception as error:
                outcome.faults.append(f"{door}, {'leaving' if leaves else 'staying'}: {error!r}")
            outcome.by_door[door] += 1
            outcome.n_left += leaves
            outcome.n_kept += not leaves

    async def _read(
        self, pieces: AsyncIterator[str | dict[str, Any]], n_pieces: int | None, n_tokens: int, outcome: Outcome
    ) -> bool:
        """Reads to the end, or `n_pieces` of it; whether the end was reached."""
        texts: list[str] = []
        last: dict[str, Any] | None = None
        try:
            async for piece in pieces:
                if isinstance(piece, dict):
                    last = piece
                    continue
                texts.append(piece)
                outcome.n_chunks += 1
                if n_pieces is not None and len(texts) >= n_pieces:
                    return False
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        if last is None:
            outcome.faults.append(f"a stream was cut after {len(texts)} pieces")
        elif (last["finish_reason"], last["tokens_out"]) != ("length", n_tokens):
            outcome.faults.append(f"a stream of {n_tokens} tokens ended so: {last}")
        elif last.get("text") is not None and last["text"] != "".join(texts):
            outcome.faults.append(f"pieces {''.join(texts)!r} and the whole {last['text']!r} differ")
        return True

    async def _pieces(
        self, door: str, http: httpx2.AsyncClient, bus: Client, question: str, n_tokens: int
    ) -> AsyncIterator[str | dict[str, Any]]:
        """A stream's texts, then `{finish_reason, tokens_out, text?}`."""
        params: dict[str, Any] = {"max_tokens": n_tokens, "ignore_eos": True, "temperature": 1.0}
        if door == "nats":
            stream = bus.stream(question, model="demo", **params)
            async with stream:
                async for chunk in stream:
                    yield chunk.text
            reply = stream.reply
            assert reply is not None
            yield {"finish_reason": reply.finish_reason, "tokens_out": reply.tokens_out, "text": reply.text}
            return
        if door == "native":
            path, body = "/v1/completions", {"model": "demo", "input": question, "stream": True, "params": params}
        else:
            messages = [{"role": "user", "content": question}]
            path = "/v1/chat/completions"
            body = {"model": "demo", "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
            body |= params
        index, reason = 0, None
        async with http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                raise AssertionError((await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise AssertionError(event)
                if door == "native":
                    if event.get("done"):
                        yield event
                    else:
                        assert event["index"] == index, f"piece {event['index']} in place of {index}"
                        index += 1
                        yield event["text"]
                elif event["choices"]:
                    reason = event["choices"][0]["finish_reason"] or reason
                    if event["choices"][0]["delta"].get("content"):
                        yield event["choices"][0]["delta"]["content"]
                else:
                    yield {"finish_reason": reason, "tokens_out": event["usage"]["completion_tokens"]}

    async def _settled(self, told: Path, before: dict[str, Any] | None) -> dict[str, Any]:
        """What the node says of itself once it rests: until it is as before, or the patience is over."""
        until = time.monotonic() + SETTLE_S
        now: dict[str, Any] = {}
        while time.monotonic() < until:
            told.unlink(missing_ok=True)
            self._process.send_signal(signal.SIGUSR1)
            while not told.exists():
                await asyncio.sleep(0.05)
            now = json.loads(told.read_text())
            now |= {"fds": self._process.num_fds(), "rss": self._process.memory_info().rss}
            now["threads"] = self._process.num_threads()
            if not now["sequences"] and not now["slots"]:
                if before is None:
                    await asyncio.sleep(3.0 if self.plan.warm_s >= WARM_S else 0.5)
                    before = now
                    continue
                if now["tasks"] <= before["tasks"] and now["fds"] <= before["fds"]:
                    break
            await asyncio.sleep(0.3)
        return now

    def _rows(self) -> dict[str, int]:
        with sqlite3.connect(f"file:{self.folder}/data/logs/demo.sqlite?mode=ro", uri=True) as db:
            rows = dict(db.execute("SELECT status, count(*) FROM requests GROUP BY status").fetchall())
        db.close()
        return rows

    def _check(self) -> None:
        before, after, outcome = self.outcome.before, self.outcome.after, self.outcome
        outcome.faults += left_behind(before, after)
        if after["rss"] > before["rss"] * 1.05 + SLACK_BYTES:
            outcome.faults.append(f"memory grew from {before['rss']} to {after['rss']} bytes")
        if unexpected := set(outcome.rows) - {"ok", "cancelled"}:
            outcome.faults.append(f"audit rows are {unexpected}")
        # Who leaves at the very end may find its stream finished.
        n_cancelled = outcome.rows.get("cancelled", 0)
        if not 0.8 * outcome.n_left <= n_cancelled <= outcome.n_left:
            outcome.faults.append(f"{n_cancelled} are cancelled and {outcome.n_left} left")


async def _node(told: Path) -> None:
    """The node, which writes what it holds to `told` at SIGUSR1."""
    from infsvc.cli.build import build_node, prepare_home
    from infsvc.cli.signals import on_stop

    node = build_node(prepare_home(), ["demo"], log_to_stdout=False)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        worker = node.fleet.get("demo")
        names = Counter(task.get_name().rstrip("0123456789") for task in asyncio.all_tasks())
        facts = {
            "tasks": names.total(), "names": names, "sequences": len(list(node.service.live())),
            "slots": worker.n_active + worker.n_waiting,
        }  # fmt: skip
        part = told.with_suffix(".part")
        part.write_text(json.dumps(facts))
        part.replace(told)

    loop.add_signal_handler(signal.SIGUSR1, tell)
    on_stop(loop, stop.set)
    async with node:
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=Plan.n_streams)
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--node", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node is not None:
        asyncio.run(_node(options.node))
        return
    folder = Path(tempfile.mkdtemp(prefix="infsvc-streams-"))
    plan = Plan(n_streams=options.streams, seconds=options.seconds, seed=options.seed)
    outcome = asyncio.run(Streams(folder, plan, print).run())
    print(outcome.text())
    if outcome.faults:
        sys.exit(f"see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
