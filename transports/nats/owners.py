"""Who is at work on a queued request: the question between processes, and this one's answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from infsvc import subjects
from infsvc.errors import RequestError
from transports.nats.bus import Bus, heeding
from transports.nats.jetstream import JetStreamFault
from transports.nats.messages import encode, named, read_object

_ASK_S = 1.0
_N_SILENT = 10
_MOVE_S = 2.0
"""How long a process may take from a server of a cluster that died to another one."""


class Owners:
    """Loop thread only.

    Args:
        instance: this process among all nodes.
        moves: whether a process may come back on another server of a cluster.
        works_on: whether this process is at work on a model's request.
    """

    def __init__(self, bus: Bus, instance: str, *, moves: bool, works_on: Callable[[str, str], bool]) -> None:
        self._bus, self._instance, self._moves, self._works_on = bus, instance, moves, works_on
        self._silent: dict[str, int] = {}
        self._missing: dict[str, float] = {}

    async def listen(self, nc: Client) -> None:
        """Answers others over this connection."""
        await nc.subscribe(subjects.owner(self._instance), cb=self._tell)

    async def alive(self, instance: str, model: str, req_id: str) -> bool:
        """Asks a process whether it is at work on a request. One that is there and silent counts so for a while. Raises
        `JetStreamFault` without a connection."""
        nc = self._bus.nc
        if nc is None or not nc.is_connected:
            raise JetStreamFault("there is no connection to the broker")
        try:
            body = encode({"model": model, "req_id": req_id})
            message = await heeding(nc.request(subjects.owner(instance), body, timeout=_ASK_S))
            answer = read_object(message.data)
        except NoRespondersError:
            # In a cluster it may be on its way to another server.
            missing_s = time.monotonic() - self._missing.setdefault(instance, time.monotonic())
            return self._moves and missing_s < _MOVE_S
        except (TimeoutError, NatsError, RequestError):
            self._silent[instance] = self._silent.get(instance, 0) + 1
            return self._silent[instance] < _N_SILENT
        self._silent.pop(instance, None)
        self._missing.pop(instance, None)
        return answer.get("running") is True

    async def _tell(self, message: Msg) -> None:
        with suppress(RequestError):
            body = read_object(message.data)
            running = self._works_on(named(body, "model") or "", named(body, "req_id") or "")
            if message.reply:
                await self._bus.publish(message.reply, encode({"running": running}))
