"""Listens to the bus and keeps a roster: subscribes to heartbeats and reports, finds who was there before, and asks
each model for its health to know its response time.

It works on a connection that somebody else owns and says nothing itself but questions. Event loop's thread only.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from infsvc import subjects
from infsvc.roster import PROBE_S, Roster, Sighting

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

SERVICE = "infsvc"
"""The name of this project's NATS micro service."""

_QUIET_S = 0.15
_FIND_S = 1.0
_MOST_TOPICS = 512
"""Subjects for reports that are listened to beside the usual ones; foreign words may not cost more."""
_LATE = 4096
"""Questions that are remembered at most; an answer to an older one counts as no measurement."""

Heard = Callable[[Sighting], None]
HeardAlert = Callable[[dict[str, Any]], None]


class Watch:
    """Fills `roster` from one connection.

    Args:
        nc: a connected client; a lost connection ends the watch, and a new one is made for the next.
        on_health: called with each sighting whose health document has come.
        on_report: called with each sighting whose report has come.
        on_alert: called with each alert.
        on_own: called with a model's name and milliseconds when the node `own` itself has answered.
        own: name and start time of the onlooker's own node.
    """

    def __init__(
        self,
        nc: Client,
        roster: Roster,
        *,
        on_health: Heard | None = None,
        on_report: Heard | None = None,
        on_alert: HeardAlert | None = None,
        on_own: Callable[[str, float], None] | None = None,
        own: tuple[str, str] | None = None,
    ) -> None:
        self._nc, self.roster = nc, roster
        self._on_health, self._on_report, self._on_alert = on_health, on_report, on_alert
        self._on_own, self._own = on_own, own
        self._prefix = nc.new_inbox()
        self._asked: dict[str, float] = {}
        self._n_asked = 0
        self._known: set[str] = set()
        self._heard = asyncio.Event()
        self._subscriptions: list[Subscription] = []
        self._topics: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Subscribes, and asks who is there; then asks every `PROBE_S` seconds until `close()`."""
        subscribe = self._nc.subscribe
        self._subscriptions = [
            await subscribe(f"{self._prefix}.*", cb=self._take_answer),
            await subscribe(subjects.HEARTBEATS, cb=self._take_heartbeat),
            await subscribe(subjects.REPORTS, cb=self._take_report),
        ]
        await self.ask()
        self._task = asyncio.create_task(self._ask_again(), name="bus-watch")

    async def close(self) -> None:
        """Ends the watch; the connection stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._closed = True
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            with suppress(Exception):
                await subscription.unsubscribe()

    async def ask(self) -> None:
        """Asks who is there and how each known model is; answers are noted as they come."""
        self._known = set()
        await self._nc.publish(subjects.service("INFO", name=SERVICE), b"", reply=f"{self._prefix}.info")
        for model in self.roster.models():
            await self._probe(model)

    async def found(self) -> None:
        """Waits until those who are there have answered: nothing new for a moment, and a second at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIND_S):
                while True:
                    self._heard.clear()
                    try:
                        async with asyncio.timeout(_QUIET_S):
                            await self._heard.wait()
                    except TimeoutError:
                        return

    async def _ask_again(self) -> None:
        while not self._nc.is_closed:
            await asyncio.sleep(PROBE_S)
            with suppress(Exception):  # the connection's loss is its owner's business
                await self.ask()

    async def _probe(self, model: str) -> None:
        if model in self._known or not _is_literal(model):
            return
        self._known.add(model)
        self._n_asked += 1
        token = str(self._n_asked)
        self._asked[token] = time.perf_counter()
        if len(self._asked) > _LATE:
            del self._asked[next(iter(self._asked))]
        await self._nc.publish(subjects.health(model), b"", reply=f"{self._prefix}.{token}")

    async def _take_answer(self, message: Msg) -> None:
        token = message.subject.rpartition(".")[2]
        if not message.data:
            return  # nobody answers there any more
        self._heard.set()
        if token == "info":
            for model in _models_of(message.data):
                await self._probe(model)
            return
        asked_s = self._asked.get(token)
        took_ms = None if asked_s is None else round((time.perf_counter() - asked_s) * 1000, 3)
        await self._hear_reports_of(self._take_health(message.data, took_ms))

    async def _take_heartbeat(self, message: Msg) -> None:
        sighting = self._take_health(message.data, None)
        await self._hear_reports_of(sighting)
        if sighting is not None and sighting.response_time_ms is None and sighting.document.status == "online":
            self._known.discard(sighting.document.model_name)
            await self._probe(sighting.document.model_name)

    async def _hear_reports_of(self, sighting: Sighting | None) -> None:
        """Listens to a model whose worker file has its reports sent where nobody else's are."""
        if sighting is None or self._closed:
            return
        document = sighting.document
        topic = document.monitoring_topic
        subject = subjects.report(topic, document.model_name)
        usual = not topic or subjects.covers(subjects.REPORTS, subject)
        if usual or subject in self._topics or len(self._topics) >= _MOST_TOPICS:
            return
        if topic.startswith(("$", "_INBOX")) or not (_is_literal(topic) and _is_literal(document.model_name)):
            return
        self._topics.add(subject)
        self._subscriptions.append(await self._nc.subscribe(subject, cb=self._take_report))

    def _take_health(self, data: bytes, took_ms: float | None) -> Sighting | None:
        sighting = self.roster.hear_health(data, response_time_ms=took_ms)
        if sighting is not None:
            if self._on_health is not None:
                self._on_health(sighting)
        elif took_ms is not None and self._on_own is not None:
            with suppress(ValueError, AttributeError):
                document = json.loads(data)
                if (document.get("node"), document.get("start_time")) == self._own:
                    self._on_own(str(document.get("model_name")), took_ms)
        return sighting

    async def _take_report(self, message: Msg) -> None:
        if message.subject == subjects.AGGREGATE:
            self.roster.hear_totals(message.data)
            return
        if message.subject == subjects.ALERTS:
            with suppress(ValueError):
                alert = json.loads(message.data)
                if isinstance(alert, dict) and self._on_alert is not None:
                    self._on_alert(alert)
            return
        sighting = self.roster.hear_report(message.data)
        if sighting is not None and self._on_report is not None:
            self._on_report(sighting)


def _models_of(info: bytes) -> list[str]:
    """The models that a service's INFO lists."""
    try:
        endpoints = json.loads(info)["endpoints"]
        return [str(endpoint["metadata"]["model"]) for endpoint in endpoints]
    except (ValueError, KeyError, TypeError):
        return []


def _is_literal(model: str) -> bool:
    """Whether a foreign name may stand in a subject that is published to."""
    return bool(model) and all(
        token and token.isprintable() and not any(mark in token for mark in " \t*>") for token in model.split(".")
    )
