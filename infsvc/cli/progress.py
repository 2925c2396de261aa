"""A progress line for a person: drawn over itself on a terminal, a line for each tenth elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from infsvc.errors import human_bytes

_WIDTH = 24


def human_span(seconds: float) -> str:
    """A time that is left: 8 s, 4 min, 2 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


class ProgressLine:
    """`with ProgressLine("gemma3-270m") as line: line.show(…)`. Writes to standard error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._on_terminal = sys.stderr.isatty()
        self._said: tuple[str, int] | None = None
        self._drawn = False

    def show(
        self,
        word: str,
        done_bytes: int,
        total_bytes: int,
        *,
        bytes_per_s: float | None = None,
        eta_s: float | None = None,
    ) -> None:
        """Draws how far it is; `total_bytes` is 0 while unknown."""
        fraction = min(1.0, done_bytes / total_bytes) if total_bytes else 0.0
        parts = [f"{human_bytes(done_bytes)} of {human_bytes(total_bytes)}" if total_bytes else human_bytes(done_bytes)]
        if bytes_per_s:
            parts.append(f"{human_bytes(bytes_per_s)}/s")
        if eta_s is not None and bytes_per_s:
            parts.append(f"{human_span(eta_s)} left")
        percent = f"{int(fraction * 100):>3} %" if total_bytes else "     "
        if self._on_terminal:
            bar = "━" * round(fraction * _WIDTH)
            print(
                f"\r\x1b[K{self._name}  {word}  {bar:─<{_WIDTH}} {percent}  {'  '.join(parts)}", end="", file=sys.stderr
            )
            self._drawn = True
        elif (tenth := (word, int(fraction * 10))) != self._said:
            self._said = tenth
            print(f"{self._name}  {word} {percent}  {'  '.join(parts)}", file=sys.stderr)
        sys.stderr.flush()

    def say(self, text: str) -> None:
        """A line of its own above the bar."""
        print(f"\r\x1b[K{text}" if self._drawn else text, file=sys.stderr)

    def end(self) -> None:
        """Leaves the bar as it is; what is written next stands below it."""
        if self._drawn:
            print(file=sys.stderr)
            self._drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
