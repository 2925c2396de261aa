"""Rates and percentiles, by a clock that the test turns."""

from __future__ import annotations

import pytest

from engine.stats import ModelStats


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stats(clock: Clock) -> ModelStats:
    return ModelStats(clock)


def test_nothing_yet(stats: ModelStats) -> None:
    assert (stats.tokens_per_s(), stats.ttft_ms(), stats.latency_ms(), stats.n_finished) == (0.0, None, None, 0)
    assert stats.last_activity_ts is None


def test_tokens_a_second_over_the_last_two(stats: ModelStats, clock: Clock) -> None:
    for _ in range(20):
        stats.token()
    assert stats.tokens_per_s() == 10.0
    clock.now += 1.5
    for _ in range(4):
        stats.token()
    assert stats.tokens_per_s() == 12.0
    clock.now += 1.0
    assert stats.tokens_per_s() == 2.0
    clock.now += 5.0
    assert stats.tokens_per_s() == 0.0
    assert stats.n_tokens_out == 24
    assert stats.last_activity_ts == 1001.5


@pytest.mark.parametrize(
    ("n", "p50", "p95"), [(1, 1, 1), (2, 1, 2), (3, 2, 3), (4, 2, 4), (20, 10, 19), (100, 50, 95), (101, 51, 96)]
)
def test_percentiles_by_nearest_rank(stats: ModelStats, n: int, p50: int, p95: int) -> None:
    for value in reversed(range(1, n + 1)):
        stats.finished(ttft_ms=float(value), latency_ms=10.0 * value)
    assert stats.ttft_ms() == (p50, p95)
    assert stats.latency_ms() == (10 * p50, 10 * p95)


def test_percentiles_are_of_the_last_256(stats: ModelStats) -> None:
    for value in range(1000):
        stats.finished(ttft_ms=float(value), latency_ms=0.0)
    found = stats.ttft_ms()
    assert found is not None
    assert found[0] >= 744
    assert stats.n_finished == 1000


def test_a_request_without_a_token_has_no_time_to_first(stats: ModelStats, clock: Clock) -> None:
    stats.finished(ttft_ms=None, latency_ms=5.0)
    assert stats.ttft_ms() is None
    assert stats.latency_ms() == (5.0, 5.0)
    assert stats.last_finished_ts == clock.now


def test_history_keeps_a_quarter_of_an_hour(stats: ModelStats, clock: Clock) -> None:
    for second in range(1000):
        clock.now = float(second)
        stats.sample(n_waiting=second, n_active=1)
    assert len(stats.history) == 900
    assert stats.history[-1].n_waiting == 999
