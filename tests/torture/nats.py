"""The durable queue under kill -9: two node processes and a broker process die again and again while requests go in.

`python -m tests.torture.nats --seed N --requests 2000 --kills 30 [--cluster]`; with `--cluster` the broker is three
servers, each of which may die, and every stream has three copies. What must hold afterwards:

- every durable request is answered;
- none was executed twice, save what was running at a kill (those are counted);
- the queue, the spool and the dead letters are empty;
- each answer stands in an audit log, word for word, and so does the computing of each request.

Durable requests go three ways: published to the queue until the broker has acknowledged them; published on the public
subject, and again with the same id when a broker died around then, as nobody acknowledges that; and as requests with a
reply subject, asked again with the same id after a time-out. Answers are read from a stream, so that none is missed
while this process itself is without a broker. A cluster's stream is itself without a leader for seconds after a kill;
there a listener at each server hears them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import StreamConfig

from infsvc import subjects
from tests.nats_cluster import Seat, seats, until_it_keeps
from tests.nodes import add_worker, free_port, node_environ
from tests.tiny_models import write_tiny_model
from transports.nats.broker import Listener, find_binary, probe
from transports.nats.bus import bounded

MODEL = "tiny"
SUBJECT = f"inference.request.{MODEL}"
QUEUE = subjects.queue(MODEL)
STREAM = f"INFERENCE_{MODEL.upper()}"
ROOT = Path(__file__).parents[2]
RECONNECT_S = 8.0
"""Within this a node is back on a broker that came back."""
ELECTION_S = 16.0
"""Within this a cluster that lost a server has leaders again and the nodes have found them."""


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        n_durable: requests that must be answered; three kinds in turn.
        n_asked: request/reply without an id, which a crash may lose.
        pause_s: seconds between two kills, from and to.
        weights: how often the two nodes and the broker are the victims.
        n_brokers: 1, or the servers of a cluster, one of which is the victim then.
        ask_s: after how long a caller takes a request for lost.
    """

    seed: int = 1
    n_durable: int = 2000
    n_asked: int = 500
    n_kills: int = 30
    pause_s: tuple[float, float] = (2.0, 5.0)
    patience_s: float = 240.0
    ask_s: float = 6.0
    weights: tuple[int, int, int] = (1, 1, 1)
    n_brokers: int = 1


@dataclass
class Kill:
    who: str
    at: float
    broker: bool = False
    dead: float = 0.0
    """When the process was seen to have ended."""
    until: float = 0.0
    """When a broker was back."""


@dataclass
class Outcome:
    """What came of it; `faults` are sentences about what should not be."""

    n_durable: int = 0
    n_answered: int = 0
    n_asked: int = 0
    n_asked_answered: int = 0
    n_executed: int = 0
    n_twice: int = 0
    n_twice_unexcused: int = 0
    n_replayed: int = 0
    n_taken_over: int = 0
    """Requests that ran on a process when it was killed, and were begun again elsewhere."""
    n_kills: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        kills = ", ".join(f"{n} {who}" for who, n in sorted(self.n_kills.items()))
        return "\n".join(
            [
                f"kill -9: {self.n_kills.total()} ({kills}) in {self.seconds:.0f} s",
                f"durable: {self.n_answered} of {self.n_durable} answered",
                f"request/reply without an id: {self.n_asked_answered} of {self.n_asked} answered",
                f"executed: {self.n_executed}; twice: {self.n_twice}, of them not running at a kill: "
                f"{self.n_twice_unexcused}; broken off by a kill and begun again: {self.n_taken_over}; answered again "
                f"without computing: {self.n_replayed}",
                *(f"FAULT: {fault}" for fault in self.faults),
            ]
        )


class Part:
    """A process that is started again after each kill."""

    def __init__(self, name: str, command: list[str], environ: dict[str, str], log: Path) -> None:
        self.name, self._command, self._environ, self._log = name, command, environ, log
        self.process: Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as stream:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environ, stdin=DEVNULL, stdout=stream, stderr=stream, cwd=ROOT
            )

    async def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        await self.process.wait()


class Torture:
    """One run in one folder."""

    def __init__(self, folder: Path, plan: Plan, say: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.plan, self._say = folder, plan, say
        # One of its own for the kills, so that a seed names the same victims however fast the requests go.
        self._fate, self._random = random.Random(plan.seed), random.Random(plan.seed + 1)
        self.seats = seats(folder, plan.n_brokers) if plan.n_brokers > 1 else [_single(folder)]
        self.url = ",".join(seat.url for seat in self.seats)
        self.kills: list[Kill] = []
        self.outcome = Outcome(n_durable=plan.n_durable, n_asked=plan.n_asked)
        self._sent: dict[str, float] = {}
        self._direct: dict[str, dict[str, Any]] = {}
        self._heard: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.brokers = [
            Part(seat.name, list(seat.command), dict(os.environ), folder / f"{seat.name}.log") for seat in self.seats
        ]
        model = write_tiny_model(folder / "tiny.gguf", n_ctx=2048)
        self.homes = [folder / "alpha", folder / "beta"]
        self.nodes = []
        for home in self.homes:
            add_worker(home, MODEL, model, ACK_WAIT="3s", QUEUE_MAX_MSGS=100_000, CTX_SIZE=512, **self._copies)
            environ = node_environ(home, nats_url=self.url, embedded_nats="off", node=home.name)
            self.nodes.append(
                Part(
                    home.name,
                    [sys.executable, "-m", "infsvc", "serve", MODEL],
                    dict(os.environ) | environ | {"PYTHONPATH": str(ROOT)},
                    folder / f"{home.name}.log",
                )
            )

    @property
    def _copies(self) -> dict[str, int]:
        return {"STREAM_REPLICAS": len(self.seats)} if len(self.seats) > 1 else {}

    @property
    def _reconnect_s(self) -> float:
        return RECONNECT_S if len(self.seats) == 1 else ELECTION_S

    async def run(self) -> Outcome:
        begun = time.time()
        for number in range(len(self.brokers)):
            await self.brokers[number].start()
        for seat in self.seats:
            await _listens(seat)
        if len(self.seats) > 1:
            await until_it_keeps(self.url, len(self.seats))
        await asyncio.gather(*(node.start() for node in self.nodes))
        client = Client()
        await client.connect(
            self.url.split(","), max_reconnect_attempts=-1, reconnect_time_wait=0.2, error_cb=_quiet, ping_interval=2
        )
        listeners = [asyncio.create_task(self._listen(seat)) for seat in self.seats if len(self.seats) > 1]
        try:
            if not listeners:
                await client.jetstream().add_stream(
                    StreamConfig(name="ANSWERS", subjects=["inference.reply.>", "torture.reply.>"])
                )
            await self._until_served(client)
            killer = asyncio.create_task(self._kill_all())
            span_s = self.plan.n_kills * sum(self.plan.pause_s) / 2
            await self._send_all(client, span_s)
            await killer
            await self._until_answered(client)
            await self._check(client)
        finally:
            for listener in listeners:
                listener.cancel()
            await asyncio.gather(*listeners, return_exceptions=True)
            for part in (*self.nodes, *self.brokers):
                if part.process is not None and part.process.returncode is None:
                    await part.kill(signal.SIGTERM if part in self.nodes else signal.SIGKILL)
            await asyncio.wait_for(client.close(), 10)
        self._check_audits()
        self.outcome.seconds = time.time() - begun
        return self.outcome

    async def _until_served(self, client: Client) -> None:
        async with asyncio.timeout(60):
            while True:
                with suppress(NatsError, TimeoutError):
                    answer = await client.request(SUBJECT, b'{"input": "x", "params": {"max_tokens": 1}}', timeout=1)
                    if b'"text"' in answer.data:
                        return
                await asyncio.sleep(0.2)

    async def _kill_all(self) -> None:
        for n in range(self.plan.n_kills):
            await asyncio.sleep(self._fate.uniform(*self.plan.pause_s))
            part = self._fate.choices([*self.nodes, None], weights=self.plan.weights)[0]
            rest_s = self._fate.uniform(0.0, 1.0)
            seat = None
            if part is None:
                number = self._fate.randrange(len(self.seats)) if len(self.seats) > 1 else 0
                part, seat = self.brokers[number], self.seats[number]
            kill = Kill(part.name, time.time(), broker=seat is not None)
            self.kills.append(kill)
            await part.kill()
            kill.dead = time.time()
            self.outcome.n_kills[part.name] += 1
            self._say(f"  kill {n + 1} of {self.plan.n_kills}: {part.name}; sent {len(self._sent)}")
            if seat is not None:
                await asyncio.sleep(rest_s)
            await part.start()
            if seat is not None:
                await _listens(seat)
            kill.until = time.time()

    async def _send_all(self, client: Client, span_s: float) -> None:
        kinds: list[Callable[[Client, int], Awaitable[None]]] = []
        for n in range(self.plan.n_durable):
            kinds.append((self._queue, self._publish, self._ask_by_id)[n % 3])
        kinds += [self._ask] * self.plan.n_asked
        order = list(enumerate(kinds))
        self._random.shuffle(order)
        pause_s = span_s / max(1, len(order))
        async with asyncio.TaskGroup() as tasks:
            for n, send in order:
                tasks.create_task(send(client, n))
                await asyncio.sleep(self._random.uniform(0, 2 * pause_s))

    def _body(self, n: int, **more: Any) -> dict[str, Any]:
        params = {"max_tokens": 1 + n % 24, "temperature": 0, "ignore_eos": True}
        return {"input": f"request {n}", "params": params} | more

    async def _queue(self, client: Client, n: int) -> None:
        """Published to the queue until the broker says that it has it."""
        req_id = f"queued-{n}"
        self._sent[req_id] = time.time()
        js = client.jetstream()
        headers = {subjects.MSG_ID_HEADER: subjects.msg_id(MODEL, req_id)}
        data = json.dumps(self._body(n, req_id=req_id)).encode()
        while True:
            with suppress(NatsError, TimeoutError, OSError):
                await js.publish(QUEUE, data, headers=dict(headers), timeout=2)
                return
            await asyncio.sleep(0.2)

    async def _publish(self, client: Client, n: int) -> None:
        """Published without an acknowledgement; again, if the broker died before it can have been on its disk."""
        req_id = f"published-{n}"
        self._sent[req_id] = time.time()
        data = json.dumps(self._body(n, req_id=req_id)).encode()
        while True:
            at = time.time()
            with suppress(NatsError, TimeoutError, OSError):
                await client.publish(SUBJECT, data)
                await client.flush(timeout=2)
                await asyncio.sleep(1.0)
                if req_id in self._heard:
                    return
                # A spool without a leader keeps nothing, and nobody says so.
                before_s = 1.0 if len(self.seats) == 1 else ELECTION_S
                if not any(kill.broker and at - before_s <= kill.at <= at + 1.0 for kill in self.kills):
                    return
            await asyncio.sleep(0.5)

    async def _ask_by_id(self, client: Client, n: int) -> None:
        """Asked with a reply subject and an id; asked again after a time-out, until it is answered."""
        req_id = f"asked-{n}"
        self._sent[req_id] = time.time()
        data = json.dumps(self._body(n, req_id=req_id)).encode()
        until = time.time() + self.plan.patience_s
        while time.time() < until:
            with suppress(NatsError, TimeoutError, OSError):
                answer = json.loads((await client.request(SUBJECT, data, timeout=self.plan.ask_s)).data)
                if "text" in answer:
                    self._direct[req_id] = answer
                    return
                if answer.get("status", 500) < 500:
                    self.outcome.faults.append(f"{req_id} was refused: {answer}")
                    return
            await asyncio.sleep(0.3)

    async def _ask(self, client: Client, n: int) -> None:
        """A caller that nobody could find again."""
        data = json.dumps(self._body(n)).encode()
        with suppress(NatsError, TimeoutError, OSError):
            answer = json.loads((await client.request(SUBJECT, data, timeout=2 * self.plan.ask_s)).data)
            self.outcome.n_asked_answered += "text" in answer

    async def _listen(self, seat: Seat) -> None:
        """Hears answers at one server, whenever it is up."""

        async def note(message: Msg) -> None:
            answer = json.loads(message.data)
            if answer not in self._heard[answer["req_id"]]:
                self._heard[answer["req_id"]].append(answer)

        while True:
            listener = Client()
            with suppress(NatsError, TimeoutError, OSError):
                await listener.connect(seat.url, allow_reconnect=False, error_cb=_quiet, connect_timeout=1)
                await listener.subscribe("inference.reply.>", cb=note)
                await listener.subscribe("torture.reply.>", cb=note)
                while listener.is_connected:
                    await asyncio.sleep(0.05)
            await bounded(listener.close(), 0.5)
            await asyncio.sleep(0.1)

    async def _answers(self, client: Client) -> dict[str, list[dict[str, Any]]]:
        answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        if len(self.seats) > 1:
            for req_id, heard in self._heard.items():
                answers[req_id] += heard
            for req_id, answer in self._direct.items():
                answers[req_id].append(answer)
            return answers
        js = client.jetstream()
        last = (await js.stream_info("ANSWERS")).state.last_seq
        subscription = await js.subscribe("", stream="ANSWERS", ordered_consumer=True) if last else None
        if subscription is not None:
            while True:
                message = await subscription.next_msg(timeout=10)
                answer = json.loads(message.data)
                answers[answer["req_id"]].append(answer)
                if message.metadata.sequence.stream >= last:
                    break
            await subscription.unsubscribe()
        for req_id, answer in self._direct.items():
            answers[req_id].append(answer)
        return answers

    async def _until_answered(self, client: Client) -> None:
        until = time.time() + self.plan.patience_s
        self.answers: dict[str, list[dict[str, Any]]] = {}
        while True:
            with suppress(NatsError, TimeoutError, OSError):
                self.answers = await self._answers(client)
                missing = self._sent.keys() - self.answers.keys()
                if not missing:
                    break
                if time.time() > until:
                    self.outcome.faults.append(f"{len(missing)} unanswered, such as {sorted(missing)[:5]}")
                    break
            await asyncio.sleep(0.5)
        self.outcome.n_answered = len(self._sent.keys() & self.answers.keys())
        for req_id in self._sent.keys() & self.answers.keys():
            for answer in self.answers[req_id]:
                if "text" not in answer:
                    self.outcome.faults.append(f"{req_id} was answered with {answer}")

    async def _check(self, client: Client) -> None:
        """Queue, spool and dead letters empty themselves."""
        js = client.jetstream()
        names = (STREAM, f"{STREAM}_SPOOL", "INFSVC_DEAD")
        left: dict[str, int] = {}
        until = time.time() + 30
        while time.time() < until:
            with suppress(NatsError, TimeoutError, OSError):
                left = {name: (await js.stream_info(name)).state.messages for name in names}
                if not any(left.values()):
                    return
            await asyncio.sleep(0.5)
        self.outcome.faults.append(f"messages are left: {left}")

    def _check_audits(self) -> None:
        executed: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        texts: dict[str, set[str]] = defaultdict(set)
        for home in self.homes:
            with sqlite3.connect(home / f"data/logs/{MODEL}.sqlite") as db:
                for req_id, ts, dur_ms, status, text in db.execute(
                    "SELECT req_id, ts, dur_ms, status, response_text FROM requests"
                ):
                    if status in ("ok", "replayed"):
                        texts[req_id].add(text)
                    if status == "ok":
                        executed[req_id].append((ts, ts + dur_ms / 1000, home.name))
                    self.outcome.n_replayed += status == "replayed"
                (n_events,) = db.execute("SELECT COUNT(*) FROM events WHERE code='queue.taken_over'").fetchone()
                self.outcome.n_taken_over += n_events
            db.close()
        outcome = self.outcome
        outcome.n_executed = sum(len(runs) for req_id, runs in executed.items() if req_id in self._sent)
        for req_id in self._sent:
            runs = sorted(executed[req_id])
            if len(runs) > 1:
                outcome.n_twice += 1
                if not all(self._was_running_at_a_kill(run) for run in runs[:-1]):
                    outcome.n_twice_unexcused += 1
                    outcome.faults.append(f"{req_id} was executed twice without a kill: {runs}")
            if not runs and req_id in self.answers:
                outcome.faults.append(f"{req_id} was answered, and no audit log says that it was computed")
            for answer in self.answers.get(req_id, []):
                if answer.get("text") not in texts[req_id] and "text" in answer:
                    outcome.faults.append(f"{req_id}: no audit log has the answer that was received")

    def _was_running_at_a_kill(self, run: tuple[float, float, str]) -> bool:
        """Whether a kill hit between the start of a run and its acknowledgement: of its node, or of the broker, which
        the acknowledgement then waits for."""
        start, end, node = run
        for broker in self.kills:
            if broker.broker and broker.at <= end + 1.0 and end <= broker.until + self._reconnect_s:
                end = max(end, broker.until + self._reconnect_s)
        return any(
            (kill.broker or kill.who == node) and start <= kill.dead and kill.at <= end + 1.0 for kill in self.kills
        )


def _single(folder: Path) -> Seat:
    """One broker that is no cluster."""
    port, config = free_port(), folder / "broker.conf"
    config.write_text(
        f'host: 127.0.0.1\nport: {port}\nmax_payload: 8454144\njetstream {{store_dir: "{folder}/store"}}\n'
    )
    return Seat("broker", port, (str(find_binary()), "-c", str(config)))


async def _listens(seat: Seat) -> None:
    async with asyncio.timeout(20):
        while await probe("127.0.0.1", seat.port) is not Listener.NATS:
            await asyncio.sleep(0.05)


async def _quiet(error: Exception) -> None:
    pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--requests", type=int, default=2000, help="durable ones; a quarter more are asked without an id"
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--cluster", action="store_true", help="three servers in the broker's place")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    options = parser.parse_args()
    plan = Plan(
        seed=options.seed,
        n_durable=options.requests,
        n_asked=options.requests // 4,
        n_kills=options.kills,
        n_brokers=3 if options.cluster else 1,
        ask_s=15.0 if options.cluster else Plan.ask_s,
    )

    def run(folder: Path) -> Outcome:
        return asyncio.run(Torture(folder, plan, lambda line: print(line, flush=True)).run())

    if options.keep:
        options.keep.mkdir(parents=True)
        outcome = run(options.keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(Path(folder))
    print(outcome.text())
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
