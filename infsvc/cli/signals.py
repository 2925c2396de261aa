"""SIGTERM, SIGINT and a terminal that is closed as one wish: end well."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


def on_stop(loop: asyncio.AbstractEventLoop, stop: Callable[[], object]) -> None:
    """Calls `stop` on the loop for each of them, also on systems whose loop takes no signal handlers."""
    wishes = [signal.SIGTERM, signal.SIGINT]
    # Who starts it with nohup wants it to stay.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wishes.append(signal.SIGHUP)
    for number in wishes:
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
