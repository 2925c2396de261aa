"""Still pictures and a driven app: no colour settings from outside, one time zone, pictures under the top-level
`snapshots/`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_textual_snapshot
from pytest_textual_snapshot import SVGImageExtension
from syrupy.location import PyTestLocation
from textual.pilot import Pilot

SNAPSHOTS = Path(__file__).resolve().parents[2] / "snapshots"


class TopLevelSvg(SVGImageExtension):  # type: ignore[misc]
    """The plugin's pictures, in a folder for each test file below `snapshots/`."""

    @classmethod
    def dirname(cls, *, test_location: PyTestLocation) -> str:
        return str(SNAPSHOTS / Path(test_location.filepath).stem)


@pytest.fixture(autouse=True)
def _fixed_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pytest_textual_snapshot, "SVGImageExtension", TopLevelSvg)
    for name in ("NO_COLOR", "TEXTUAL", "TEXTUAL_THEME", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def until() -> Callable[[Pilot[Any], Callable[[], object]], Awaitable[None]]:
    """Lets the app run until a condition holds, and fails when it does not in a few seconds."""

    async def wait(pilot: Pilot[Any], condition: Callable[[], object]) -> None:
        for _ in range(200):
            if condition():
                return
            await pilot.pause(0.02)
        raise AssertionError(f"never held: {condition}")

    return wait
