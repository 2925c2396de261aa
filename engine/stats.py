"""Rates and percentiles of one model, for people: over the last seconds and the last requests. Loop thread only."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_WINDOW_S = 2.0
_N_REQUESTS = 256
_N_SAMPLES = 900


@dataclass(frozen=True, slots=True)
class Sample:
    """One second of a model's life."""

    ts: float
    n_waiting: int
    n_active: int
    tokens_per_s: float


class ModelStats:
    """Counts since the node began; rates over the last two seconds; percentiles over the last 256 requests."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._tokens: deque[tuple[float, int]] = deque()
        self._n_window = 0
        self._ttft_ms: deque[float] = deque(maxlen=_N_REQUESTS)
        self._latency_ms: deque[float] = deque(maxlen=_N_REQUESTS)
        self.n_finished = 0
        self.n_tokens_out = 0
        self.last_finished_ts: float | None = None
        self.last_activity_ts: float | None = None
        self.history: deque[Sample] = deque(maxlen=_N_SAMPLES)

    def token(self) -> None:
        """Notes one drawn token."""
        now = self._clock()
        self.n_tokens_out += 1
        self.last_activity_ts = now
        # Tokens of one step arrive within a millisecond: one entry holds them all.
        if self._tokens and now - self._tokens[-1][0] < 0.02:
            at, n = self._tokens[-1]
            self._tokens[-1] = (at, n + 1)
        else:
            self._tokens.append((now, 1))
        self._n_window += 1
        self._forget(now)

    def finished(self, *, ttft_ms: float | None, latency_ms: float) -> None:
        """Notes the end of a request; `ttft_ms` is None when it drew no token."""
        self.n_finished += 1
        self.last_finished_ts = self.last_activity_ts = self._clock()
        self._latency_ms.append(latency_ms)
        if ttft_ms is not None:
            self._ttft_ms.append(ttft_ms)

    def sample(self, *, n_waiting: int, n_active: int) -> None:
        """Adds a point to `history`; called once a second."""
        self.history.append(Sample(self._clock(), n_waiting, n_active, self.tokens_per_s()))

    def tokens_per_s(self) -> float:
        """Tokens drawn in the last two seconds, a second."""
        self._forget(self._clock())
        return self._n_window / _WINDOW_S

    def ttft_ms(self) -> tuple[float, float] | None:
        """Time to first token, p50 and p95; None before the first request."""
        return _percentiles(self._ttft_ms)

    def latency_ms(self) -> tuple[float, float] | None:
        """Whole requests, p50 and p95; None before the first."""
        return _percentiles(self._latency_ms)

    def _forget(self, now: float) -> None:
        while self._tokens and now - self._tokens[0][0] > _WINDOW_S:
            self._n_window -= self._tokens.popleft()[1]


def _percentiles(values: deque[float]) -> tuple[float, float] | None:
    """Nearest-rank p50 and p95."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[math.ceil(0.5 * len(ordered)) - 1], ordered[math.ceil(0.95 * len(ordered)) - 1]
