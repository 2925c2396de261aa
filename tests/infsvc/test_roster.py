"""The book of who is on the bus, with a clock set by hand."""

from __future__ import annotations

from typing import Any

import pytest

from infsvc import board, roster
from infsvc.roster import FORGOTTEN_S, SILENT_S, Roster, iso, least_loaded, roomiest, uptime_ns
from infsvc.types import (
    BackpressureReport,
    BackpressureStatus,
    HealthDocument,
    QueueMetrics,
    ServiceDocument,
)

EARLY, LATE = "2026-01-01T00:00:00.000Z", "2026-01-02T00:00:00.000Z"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def health(model: str = "demo", node: str = "beta", start: str = EARLY, **fields: Any) -> bytes:
    document = HealthDocument(
        **{
            "model_name": model,
            "status": "online",
            "last_activity": None,
            "capabilities": ["text-generation"],
            "endpoint": "",
            "nats_topic": f"inference.request.{model}",
            "version": "0",
            "model_info": None,
            "queue_metrics": QueueMetrics(
                pending_messages=0, active_processing=0, total_processed=7, queue_capacity=100, last_processed_time=None
            ),
            "backpressure_status": BackpressureStatus(level="healthy", utilization=0, threshold=5),
            "node": node,
            "start_time": start,
        }
        | fields
    )
    return document.model_dump_json().encode()


def report(model: str = "demo", node: str = "beta", n_waiting: int = 12, n_active: int = 4) -> bytes:
    return (
        BackpressureReport(
            model_name=model,
            pending_messages=n_waiting,
            active_processing=n_active,
            timestamp=EARLY,
            worker_count=4,
            queue_capacity=100,
            status="critical",
            node=node,
            tokens_per_s=31.5,
        )
        .model_dump_json()
        .encode()
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> Roster:
    return Roster(ignore=("alpha", EARLY), clock=clock)


def test_a_model_is_seen_asked_and_measured(book: Roster, clock: Clock) -> None:
    book.hear_health(health())
    clock.now_s += 5
    book.hear_health(health(), response_time_ms=1.5)
    (service,) = book.services()
    assert service.first_seen == iso(clock.now_s - 5)
    assert service.last_seen == iso(clock.now_s)
    assert service.response_time_ms == 1.5
    assert service.uptime == uptime_ns(EARLY, clock.now_s) > 0
    assert not service.local


def test_a_report_brings_the_queue_up_to_date_until_the_next_document(book: Roster) -> None:
    assert book.hear_report(report()) is None  # of whom?
    book.hear_health(health())
    book.hear_report(report())
    (service,) = book.services()
    assert (service.queue_metrics.pending_messages, service.queue_metrics.active_processing) == (12, 4)
    assert service.queue_metrics.total_processed == 7
    assert (service.backpressure_status.level, service.backpressure_status.utilization) == ("critical", 0.12)
    assert (service.tokens_per_s, service.worker_count) == (31.5, 4)
    book.hear_health(health())
    (service,) = book.services()
    assert (service.queue_metrics.pending_messages, service.backpressure_status.level) == (0, "healthy")


def test_silence_then_oblivion(book: Roster, clock: Clock) -> None:
    book.hear_health(health())
    clock.now_s += SILENT_S
    assert book.services()[0].status == "online"
    clock.now_s += 1
    (service,) = book.services()
    assert (service.status, service.reason) == ("offline", "beta has been silent for 76 s")
    assert book.nodes() == []
    clock.now_s += FORGOTTEN_S
    assert book.services() == []


def test_the_onlookers_own_models_are_left_out(book: Roster) -> None:
    assert book.hear_health(health(node="alpha")) is None
    assert book.services() == []
    # The same name, started at another time, is somebody else.
    assert book.hear_health(health(node="alpha", start=LATE)) is not None


def test_a_restarted_node_leaves_no_ghost_and_namesakes_stay_two(book: Roster, clock: Clock) -> None:
    book.hear_health(health(start=EARLY))
    book.hear_health(health(start=LATE))
    assert len(book.services()) == 2
    assert book.namesakes() == {"beta"}
    clock.now_s += 20
    book.hear_health(health(start=LATE))
    assert [service.start_time for service in book.services()] == [LATE]
    assert book.namesakes() == set()


@pytest.mark.parametrize("data", [b"", b"nonsense", b"[]", b"{}", b'{"model_name": 1}', b"\xff\xfe"])
def test_what_is_no_document_is_counted(book: Roster, data: bytes) -> None:
    assert book.hear_health(data) is None
    assert book.hear_report(data) is None
    assert book.n_ignored == 2


def test_fields_of_a_newer_version_pass(book: Roster) -> None:
    assert book.hear_health(health()[:-1] + b', "mood": "fine"}') is not None


def test_the_book_has_a_limit(book: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "_LIMIT", 2)
    for n in range(3):
        book.hear_health(health(model=f"m{n}"))
    assert book.models() == ["m0", "m1"]
    assert book.n_ignored == 1


def test_least_loaded_looks_at_room_state_and_capability(book: Roster) -> None:
    for name in ("busy", "free", "down", "vectors"):
        book.hear_health(health(model=name))
    book.hear_report(report(model="busy"))
    book.hear_health(health(model="down", status="loading"))
    book.hear_health(health(model="vectors", capabilities=["embeddings"]))

    def choice(capability: str, services: list[ServiceDocument]) -> str | None:
        best = least_loaded(services, capability=capability)
        return best.model_name if best else None

    assert choice("text-generation", book.services()) == "free"
    assert choice("embeddings", book.services()) == "vectors"
    assert choice("reasoning", book.services()) is None


def test_uptime_of_a_clock_ahead_or_a_wrong_time_is_zero() -> None:
    assert uptime_ns("2026-01-01T00:00:01Z", uptime_ns("1970-01-01T00:00:00Z", 0.0)) == 0
    assert uptime_ns("yesterday", 1e9) == 0
    assert uptime_ns("1970-01-01T00:00:00Z", 2.0) == 2_000_000_000


def test_nodes_are_drawn_by_their_room_and_equal_ones_by_lot(book: Roster) -> None:
    for node, n_waiting in (("beta", 0), ("gamma", 0), ("delta", 5)):
        book.hear_health(health(node=node))
        book.hear_report(report(node=node, n_waiting=n_waiting, n_active=0))
    book.hear_health(health(node="gone", status="offline"))
    orders = {tuple(each.node for each in roomiest(book.services())) for _ in range(200)}
    assert orders == {("beta", "gamma", "delta"), ("gamma", "beta", "delta")}
    sent = {"beta": 6, "gamma": 7}
    busy = roomiest(book.services(), n_more=lambda service: sent.get(service.node, 0))
    assert [each.node for each in busy] == ["delta", "beta", "gamma"]


def test_dead_letters_are_what_a_node_last_told() -> None:
    clock = Clock()
    book = Roster(clock=clock)
    assert book.n_dead is None
    assert board.dead_line(book) == ""
    book.hear_totals(b'{"node": "beta", "dead_letters": 3}')
    assert (book.n_dead, board.dead_line(book)[:33]) == (3, "✕ 3 requests could not be answere")
    for nonsense in (
        b"nonsense",
        b"[]",
        b'{"dead_letters": "many"}',
        b'{"dead_letters": -1}',
        b'{"dead_letters": true}',
    ):
        book.hear_totals(nonsense)
    assert book.n_dead == 3
    book.hear_totals(b'{"node": "alpha", "dead_letters": 1}')
    assert board.dead_line(book).startswith("✕ 1 request could not")
    clock.now_s += SILENT_S + 1
    assert book.n_dead is None
    book.hear_totals(b'{"dead_letters": 0}')
    assert board.dead_line(book) == ""
