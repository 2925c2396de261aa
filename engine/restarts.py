"""When a model whose process ended by itself is started again, and when no more."""

from __future__ import annotations

import time
from collections.abc import Callable

N_MAX = 5
"""Starts after losses that no calm lies between. As many as MAX_DELIVER's default: a queued request that kills the
engine each time is a dead letter before the model is given up."""

_FIRST_S, _LAST_S = 0.5, 30.0
_CALM_S = 600.0


class Restarts:
    """Counts the losses of one model. After ten minutes without one they are forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = 0.0
        self.n = self.n_ever = 0
        """Losses that no calm lies between, and all."""

    def lost(self) -> float | None:
        """Notes a loss; returns the pause before the next start in seconds, which doubles each time, or None when
        there have been too many."""
        now = self._clock()
        if now - self._last_s > _CALM_S:
            self.n = 0
        self.n += 1
        self.n_ever += 1
        self._last_s = now
        return None if self.n > N_MAX else min(_FIRST_S * 2.0 ** (self.n - 1), _LAST_S)

    def forget(self) -> None:
        """Begins anew: somebody has asked for the model."""
        self.n = 0
