"""Notices a step of a model's thread that does not end: a decode that hangs raises nothing, and keeps everybody
waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

HUNG_AFTER_S = 180.0
"""A step that takes longer will not end: the largest batch of the largest model on a slow machine takes some 30 s."""


class StepWatch:
    """`begin` and `end` are the stepping thread's, the rest is the loop's.

    Args:
        what: whose steps they are, for the sentence.
        on_hung: called on the loop, once, with a sentence.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, what: str, on_hung: Callable[[str], None]) -> None:
        self._loop, self._what, self._on_hung = loop, what, on_hung
        self._began_s: float | None = None
        self._stopped = False

    def begin(self) -> None:
        """A step begins."""
        self._began_s = time.perf_counter()

    def end(self) -> None:
        """It has ended."""
        self._began_s = None

    def look(self) -> None:
        """Looks, and again now and then, until `stop`."""
        if self._stopped:
            return
        began = self._began_s
        if began is None or time.perf_counter() - began <= HUNG_AFTER_S:
            self._loop.call_later(HUNG_AFTER_S / 20, self.look)
            return
        self._stopped = True
        self._on_hung(
            f"a step of {self._what} has not ended in {HUNG_AFTER_S:.0f} s: load it again; "
            "if it hangs again, try MODEL_THREADS=1 or another file"
        )

    def stop(self) -> None:
        """Looks no more. Any thread."""
        self._stopped = True
