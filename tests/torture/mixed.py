"""Sixteen clients that each do all a node can, for ten minutes: `python -m tests.torture.mixed [--seconds 600]`.

Each client generates, chats in a stream, embeds, asks for answers held to a grammar or a schema of its own, leaves in
the middle, and cancels by name, in random order, on the demo model with states on disk. What must hold:

- every answer that is waited for is whole, and of the form that it was held to;
- memory is flat: at the last minute as at the second, but for `SLACK` of it and some pages;
- afterwards the node has no task, file descriptor, thread or request more than before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.nodes import add_worker, free_port, node_environ
from tests.torture.streams import DEMO, ROOT, SETTLE_S, SLACK_BYTES, left_behind

SLACK = 0.05
SECONDS = float(os.environ.get("SOAK_MIXED_S", "600"))


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        warm_s: load before anything is measured, until pools and caches have their size.
        mark_s: between two looks at the node under load.
    """

    n_clients: int = 16
    seconds: float = SECONDS
    warm_s: float = 10.0
    mark_s: float = 60.0
    seed: int = 1


@dataclass
class Outcome:
    """What came of it; `marks` are taken under load, `before` and `after` at rest. RSS in bytes."""

    n_done: Counter[str] = field(default_factory=Counter)
    marks: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        lines = [", ".join(f"{n} {kind}" for kind, n in sorted(self.n_done.items()))]
        for name, facts in (
            ("rest", self.before),
            *((f"{at}", facts) for at, facts in enumerate(self.marks, 1)),
            ("rest", self.after),
        ):
            lines.append(
                f"{name:>5}: {facts.get('rss', 0) / 2**20:7.1f} MiB, {facts.get('tasks')} tasks, "
                f"{facts.get('fds')} fds, {facts.get('threads')} threads"
            )
        return "\n".join([*lines, *(f"FAULT: {fault}" for fault in self.faults)])


class Mixed:
    """One run in one folder."""

    def __init__(self, folder: Path, plan: Plan, say: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.plan, self._say = folder, plan, say
        self.outcome = Outcome()
        add_worker(folder, "demo", DEMO, WORKER_CONCURRENCY=8, CTX_SIZE=512, PREFIX_CACHE_MB=8, PREFIX_CACHE_DISK_MB=32)
        self.environ = node_environ(folder, gateway=f":{free_port()}", embedded_nats="auto")
        self.url = f"http://127.0.0.1{self.environ['INFSVC_GATEWAY']}"
        self._told = folder / "told.json"
        self._process: psutil.Process

    async def run(self) -> Outcome:
        outcome = self.outcome
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.torture.streams", "--node", str(self._told), cwd=ROOT,
            env=dict(os.environ) | self.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self._process = psutil.Process(child.pid)
        try:
            async with httpx2.AsyncClient(base_url=self.url, timeout=120, trust_env=False) as http:
                await self._until_healthy(http)
                await self._load(http, self.plan.warm_s, Outcome())
            outcome.before = await self._settled(None)
            async with httpx2.AsyncClient(base_url=self.url, timeout=120, trust_env=False) as http:
                await self._load(http, self.plan.seconds, outcome)
            outcome.after = await self._settled(outcome.before)
        finally:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
            ended = await asyncio.wait_for(child.wait(), 20)
        if ended != 0:
            outcome.faults.append(f"the node ended with {ended}")
        self._check()
        return outcome

    async def _until_healthy(self, http: httpx2.AsyncClient) -> None:
        async with asyncio.timeout(60):
            while True:
                with suppress(httpx2.HTTPError):
                    if (await http.get("/healthz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    async def _load(self, http: httpx2.AsyncClient, seconds: float, outcome: Outcome) -> None:
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            marking = tasks.create_task(self._mark(outcome))
            clients = [tasks.create_task(self._client(n, http, until, outcome)) for n in range(self.plan.n_clients)]
            await asyncio.wait(clients)
            marking.cancel()

    async def _mark(self, outcome: Outcome) -> None:
        while True:
            await asyncio.sleep(self.plan.mark_s)
            outcome.marks.append(await self._facts())
            mark = outcome.marks[-1]
            self._say(
                f"  {len(outcome.marks)}: {mark['rss'] / 2**20:.1f} MiB, {mark['tasks']} tasks, {mark['fds']} fds, "
                f"{outcome.n_done.total()} requests"
            )

    async def _client(self, n: int, http: httpx2.AsyncClient, until: float, outcome: Outcome) -> None:
        chance = random.Random(self.plan.seed * 1000 + n)
        kinds = (self._generate, self._chat, self._embed, self._grammar, self._schema, self._leave, self._cancel)
        while time.monotonic() < until:
            kind = chance.choice(kinds)
            try:
                await kind(http, chance)
            except Exception as error:
                outcome.faults.append(f"{kind.__name__}: {error!r}")
            outcome.n_done[kind.__name__.lstrip("_")] += 1

    # -- what a client does -----------------------------------------------------------------------------------------

    async def _generate(self, http: httpx2.AsyncClient, chance: random.Random) -> None:
        n_tokens = chance.randint(5, 80)
        params = {"max_tokens": n_tokens, "ignore_eos": True, "temperature": chance.choice([0.0, 1.0])}
        reply = await _asked(http, "/v1/completions", {"input": _question(chance), "params": params})
        assert (reply["finish_reason"], reply["tokens_out"]) == ("length", n_tokens), reply

    async def _chat(self, http: httpx2.AsyncClient, chance: random.Random) -> None:
        body = {
            "model": "demo", "messages": [{"role": "user", "content": _question(chance)}], "stream": True,
            "max_tokens": 40, "stream_options": {"include_usage": True}, "logprobs": chance.random() < 0.2,
        }  # fmt: skip
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", lines[-1]
        assert json.loads(lines[-2][6:])["usage"]["completion_tokens"] > 0

    async def _embed(self, http: httpx2.AsyncClient, chance: random.Random) -> None:
        texts = [_question(chance) for _ in range(chance.randint(1, 6))]
        answer = await _asked(http, "/v1/embeddings", {"input": texts, "dimensions": 64})
        assert [len(each["embedding"]) for each in answer["data"]] == [64] * len(texts)

    async def _grammar(self, http: httpx2.AsyncClient, chance: random.Random) -> None:
        words = [f"w{chance.randint(0, 500)}" for _ in range(3)]
        grammar = "root ::= " + " | ".join(f'"{word}"' for word in words)
        params = {"max_tokens": 40, "grammar": grammar, "temperature": 1.0}
        reply = await _asked(http, "/v1/completions", {"input": _question(chance), "params": params})
        assert reply["text"] in words, reply

    async def _schema(self, http: httpx2.AsyncClient, chance: random.Random) -> None:
        key = f"k{chance.randint(0, 500)}"
        schema = {
            "type": "object", "properties": {key: {"type": "boolean"}}, "required": [key],
            "additionalProperties": False,
        }  # fmt: skip
        params = {"max_tokens": 100, "json_schema": schema}
        reply = await _asked(http, "/v1/completions", {"input": _question(chance), "params": params})
        if reply["finish_reason"] == "stop":  # else it was filled up with white space
            assert json.loads(reply["text"]).keys() == {key}, reply

    async def _leave(self, http: httpx2.AsyncClient, chance: random.Random) -> None:
        """In the prompt, or after some pieces of the answer."""
        body = {"model": "demo", "input": _question(chance) * 8, "stream": True, "params": {"max_tokens": 200}}
        body["params"] |= {"ignore_eos": True}  # type: ignore[operator]
        n_pieces = chance.randint(0, 20)
        with suppress(TimeoutError):
            async with (
                asyncio.timeout(chance.uniform(0.01, 2.0)),
                http.stream("POST", "/v1/completions", json=body) as said,
            ):
                async for _ in said.aiter_lines():
                    n_pieces -= 1
                    if n_pieces <= 0:
                        return

    async def _cancel(self, http: httpx2.AsyncClient, chance: random.Random) -> None:
        req_id = f"r{chance.getrandbits(64):x}"
        params = {"max_tokens": 400, "ignore_eos": True}
        body = {"model": "demo", "req_id": req_id, "input": _question(chance), "params": params}
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        await asyncio.sleep(chance.uniform(0.0, 0.2))
        stopped = await http.delete(f"/api/requests/{req_id}")
        assert stopped.status_code in (200, 404), stopped.text  # it may have come first, or be done already
        answer = await asking
        assert answer.status_code in (200, 499), answer.text

    # -- the node ---------------------------------------------------------------------------------------------------

    async def _facts(self) -> dict[str, Any]:
        self._told.unlink(missing_ok=True)
        self._process.send_signal(signal.SIGUSR1)
        async with asyncio.timeout(60):
            while not self._told.exists():
                await asyncio.sleep(0.05)
        facts: dict[str, Any] = json.loads(self._told.read_text())
        facts |= {"fds": self._process.num_fds(), "rss": self._process.memory_info().rss}
        return facts | {"threads": self._process.num_threads()}

    async def _settled(self, before: dict[str, Any] | None) -> dict[str, Any]:
        """What the node says once it rests: until it is as before, or the patience is over."""
        until = time.monotonic() + SETTLE_S
        while True:
            facts = await self._facts()
            rests = not facts["sequences"] and not facts["slots"]
            if before is None and rests:
                await asyncio.sleep(min(3.0, self.plan.warm_s))
                return await self._facts()
            as_before = before is not None and all(facts[key] <= before[key] for key in ("tasks", "fds", "threads"))
            if (rests and as_before) or time.monotonic() > until:
                return facts
            await asyncio.sleep(0.3)

    def _check(self) -> None:
        before, after, outcome = self.outcome.before, self.outcome.after, self.outcome
        outcome.faults += left_behind(before, after)
        if len(outcome.marks) > 2:
            # Not from the first: thousands of grammars and states fill their caches meanwhile.
            begun, ended = outcome.marks[1]["rss"], outcome.marks[-1]["rss"]
            if ended > begun * (1 + SLACK) + SLACK_BYTES:
                outcome.faults.append(f"memory grew from {begun} bytes at the second mark to {ended} at the last")


async def _asked(http: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(path, json={"model": "demo"} | body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def _question(chance: random.Random) -> str:
    return f"Tell me about number {chance.randint(0, 40)} and {chance.randint(0, 10**6)}, please. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=Plan.n_clients)
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="infsvc-mixed-"))
    plan = Plan(n_clients=options.clients, seconds=options.seconds, seed=options.seed)
    outcome = asyncio.run(Mixed(folder, plan, lambda line: print(line, flush=True)).run())
    print(outcome.text())
    if outcome.faults:
        sys.exit(f"see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
