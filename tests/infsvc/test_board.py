"""The monitor's table: columns for every width, what silence does to a row, sorts, the filter, hostile text."""

from __future__ import annotations

import pytest

from infsvc import board
from infsvc.roster import SILENT_S, Roster

from .test_roster import Clock, health, report


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> Roster:
    book = Roster(clock=clock)
    book.hear_health(health("demo", "alpha"), response_time_ms=1.25)
    book.hear_health(health("big", "beta", status="loading", progress=0.4))
    book.hear_report(report("demo", "alpha", n_waiting=12))
    return book


@pytest.mark.parametrize("width", [24, 39, 40, 60, 80, 100, 120, 200])
def test_a_line_never_is_wider_than_the_screen(book: Roster, clock: Clock, width: int) -> None:
    widths = board.layout(width)
    assert sum(widths.values()) + len(widths) <= width + 1
    assert {"model", "state", "waiting"} <= set(widths)
    for row in board.rows(book, clock.now_s):
        for key, room in widths.items():
            assert len(board.cell(row, key, room)[0]) == len(board.heading(key, room)) == room


def test_every_column_is_there_where_there_is_room() -> None:
    assert list(board.layout(120)) == [
        *("model", "node", "state", "arch", "params", "waiting", "active", "capacity", "level"),
        *("tok/s", "rtt", "seen", "up"),
    ]
    assert {"node", "level", "tok/s", "rtt", "seen"} <= set(board.layout(80))


def test_a_row_tells_state_load_and_speed(book: Roster, clock: Clock) -> None:
    big, demo = board.rows(book, clock.now_s)
    assert {key: demo.cells[key][0] for key in ("state", "waiting", "active", "level", "tok/s", "rtt", "seen")} == {
        "state": "● online",
        "waiting": "12",
        "active": "4",
        "level": "critical",
        "tok/s": "32",
        "rtt": "1.2 ms",
        "seen": "0.0s",
    }
    assert big.cells["state"] == ("◐ load 40%", "warning")
    assert board.headline(book, clock.now_s) == "2 nodes  1/2 up  32 tok/s  queue 12"
    assert dict(board.detail(demo))["queue"] == "12 of 100 waiting, 4 active"


def test_a_silent_model_has_no_figures(book: Roster, clock: Clock) -> None:
    clock.now_s += SILENT_S + 1
    demo = board.rows(book, clock.now_s)[1]
    assert demo.cells["state"] == ("✕ silent", "error")
    assert {demo.cells[key][0] for key in ("waiting", "active", "level", "tok/s", "rtt", "up")} == {"–"}
    assert demo.cells["seen"] == ("76s", "error")
    assert board.headline(book, clock.now_s) == "0 nodes  0/0 up  0 tok/s  queue 0"


@pytest.mark.parametrize("sort_by", board.SORTS)
def test_each_sort_has_an_order(book: Roster, clock: Clock, sort_by: str) -> None:
    first = board.rows(book, clock.now_s, sort_by=sort_by)[0].service.model_name
    assert first == ("big" if sort_by in ("name", "state") else "demo")


def test_the_filter_takes_every_word(book: Roster, clock: Clock) -> None:
    def names(text: str) -> list[str]:
        return [row.service.model_name for row in board.rows(book, clock.now_s, filter_text=text)]

    assert names("") == ["big", "demo"]
    assert names("@ALPHA critical") == ["demo"]
    assert names("loading") == ["big"]
    assert names("@alpha loading") == []


def test_foreign_text_steers_no_terminal(clock: Clock) -> None:
    book = Roster(clock=clock)
    book.hear_health(health("\x1b[31mred\u202e", "a\r\nb", status="\x07odd"))
    (row,) = board.rows(book, clock.now_s)
    shown = "".join(text for text, _ in row.cells.values()) + "".join(value for _, value in board.detail(row))
    assert all(character.isprintable() for character in shown)


def test_wide_characters_keep_their_place() -> None:
    assert board.fit("模型", 6) == "模型  "
    assert board.fit("模型模型", 6) == "模型… "
    assert board.fit("ab", 4, right=True) == "  ab"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0.0s"), (0.44, "0.4s"), (42, "42s"), (750, "12m"), (7_860, "2h11m"), (273_600, "3d4h")],
)
def test_ages(seconds: float, text: str) -> None:
    assert board.age(seconds) == text
