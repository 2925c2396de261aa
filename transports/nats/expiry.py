"""What waits longer than QUEUE_MAX_AGE: taken out of the queue in words, where the broker would drop it in silence.

So the queue's stream has no age of its own. A message that reaches a node too late is ended by its `WorkQueue`; this is
for those that no node has room for: the oldest is looked at when it is due. While no node serves the model they lie
there, and its next node sees to them first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from engine.worker import Worker
from infsvc import subjects
from infsvc.errors import DeadlineExceeded
from infsvc.settings import WorkerSettings
from transports.nats.jetstream import JetStream, JetStreamFault, Kept, seconds_of

_LONGEST_S, _SHORTEST_S = 60.0, 0.1


def expired(settings: WorkerSettings) -> DeadlineExceeded:
    """What the caller is told, and the dead letter's reason."""
    return DeadlineExceeded(
        f"expired in the queue: it waited longer than QUEUE_MAX_AGE, {settings.queue_max_age:g} s, and is kept as a "
        "dead letter"
    )


def came_s(headers: Mapping[str, str], stored_s: float) -> float:
    """When a queue's message came to the broker: to its queue, or before that to the spool."""
    with suppress(KeyError, ValueError):
        return min(stored_s, float(headers[subjects.CAME_HEADER]))
    return stored_s


class Expiry:
    """One model's. Loop thread only.

    Args:
        expire: ends one message that no node was given.
    """

    def __init__(self, worker: Worker, js: JetStream, *, expire: Callable[[Worker, Kept], Awaitable[None]]) -> None:
        self._worker, self._js, self._expire = worker, js, expire

    async def run(self) -> None:
        """Looks after the oldest message until it is cancelled."""
        while True:
            due_s = _LONGEST_S
            with suppress(JetStreamFault):
                due_s = await self._sweep()
            await asyncio.sleep(min(_LONGEST_S, max(_SHORTEST_S, due_s)))

    async def _sweep(self) -> float:
        """Ends what is too old; seconds until the next may be."""
        settings = self._worker.settings
        info = await self._js.call(f"CONSUMER.INFO.{settings.stream_name}.{settings.queue_durable}")
        now_s = seconds_of(info["ts"]) if "ts" in info else time.time()
        seq = int(info["delivered"]["stream_seq"])
        while (kept := await self._js.next_message(settings.stream_name, seq + 1)) is not None:
            left_s = came_s(kept.headers, kept.stored_s) + settings.queue_max_age - now_s
            if left_s > 0:
                return left_s
            await self._expire(self._worker, kept)
            seq = kept.seq
        return settings.queue_max_age
