"""Keeps a roster over connections that come and go, for a monitor that stays up when the broker does not."""

from __future__ import annotations

import asyncio
from typing import Literal

from infsvc.errors import InfsvcError
from infsvc.nats_login import NatsLogin
from infsvc.roster import Roster

_RETRY_S = 2.0
_LOOK_S = 0.5

State = Literal["connecting", "connected", "down"]


class Onlooker:
    """Watches a broker from outside; no node is needed. Loop thread only.

    Attributes:
        roster: who is there; it outlives connections.
        state: of the connection; `reason` says why it is down.
    """

    def __init__(self, login: NatsLogin | str) -> None:
        self._login = NatsLogin.of(login) if isinstance(login, str) else login
        self.roster = Roster()
        self.state: State = "connecting"
        self.reason = ""

    async def run(self) -> None:
        """Connects again and again; ends when it is cancelled."""
        from infsvc.nats_link import NatsLink

        while True:
            link = NatsLink(self._login, roster=self.roster)
            try:
                await link.open()
                self.state, self.reason = "connected", ""
                await link.watched()
                while not link.connection.is_closed:
                    self.state = "connected" if link.connection.is_connected else "down"
                    self.reason = "" if self.state == "connected" else "the connection was lost"
                    await asyncio.sleep(_LOOK_S)
            except InfsvcError as error:
                self.state, self.reason = "down", str(error)
            finally:
                await link.close()
            await asyncio.sleep(_RETRY_S)
