"""`infsvc-tui` in a terminal of its own: it opens, answers signals, and leaves the terminal as it was."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.cli.conftest import ROOT

COMMAND = [sys.executable, "-c", "from infsvc.__main__ import main_tui; main_tui()"]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A process in a pseudo-terminal of 100×30; everything it wrote is kept."""

    def __init__(self, *arguments: str, environ: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"} | environ,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.written = ""

    def wait_for(self, text: str) -> None:
        """Reads until the text was on the screen."""
        while text not in ESCAPES.sub("", self.written):
            self.written += os.read(self._ours, 65536).decode("utf-8", errors="replace")

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def end(self) -> int:
        """Reads to the end; returns the exit code."""
        with suppress(OSError):
            while data := os.read(self._ours, 65536):
                self.written += data.decode("utf-8", errors="replace")
        return self.process.wait(10)

    def vanish(self) -> None:
        """Closes the terminal, as a connection that is lost does. No signal tells of it: it controls no process."""
        os.close(self._ours)
        self._ours = os.open(os.devnull, os.O_RDONLY)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(environ: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_app(*arguments: str, **settings: str) -> Terminal:
        opened.append(Terminal(*arguments, environ=environ | settings))
        return opened[-1]

    yield open_app
    for each in opened:
        each.close()


def assert_intact(written: str) -> None:
    """The alternate screen, mouse mode and the hidden cursor were all taken back."""
    for mode in ("1049", "1000", "1003"):
        assert written.rfind(f"\x1b[?{mode}l") > written.rfind(f"\x1b[?{mode}h") >= 0, mode
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")


def test_it_opens_and_quits_with_the_terminal_intact(terminal: Callable[..., Terminal]) -> None:
    app = terminal("tiny")
    app.wait_for("● ready")
    app.press("\x11")
    assert app.end() == 0
    assert_intact(app.written)


def test_sigterm_ends_it_with_the_terminal_intact(terminal: Callable[..., Terminal]) -> None:
    app = terminal("tiny")
    app.wait_for("● ready")
    app.process.send_signal(signal.SIGTERM)
    assert app.end() == 0
    assert_intact(app.written)


@pytest.mark.parametrize("told", [True, False])
def test_it_ends_with_its_terminal(terminal: Callable[..., Terminal], told: bool) -> None:
    app = terminal("tiny")
    app.wait_for("● ready")
    app.vanish()
    if told:
        app.process.send_signal(signal.SIGHUP)
    assert app.process.wait(15) == 0


def test_a_start_that_fails_says_why_on_a_clean_terminal(terminal: Callable[..., Terminal]) -> None:
    terminal("tiny").wait_for("● ready")
    second = terminal("tiny")
    assert second.end() == 1
    assert "a node already runs" in ESCAPES.sub("", second.written)
    assert "Traceback" not in second.written


def test_a_dumb_terminal_is_told_of_serve(terminal: Callable[..., Terminal]) -> None:
    app = terminal(TERM="dumb")
    assert app.end() == 1
    assert "infsvc serve" in app.written


def test_no_terminal_is_told_of_serve(environ: dict[str, str]) -> None:
    told = subprocess.run(
        COMMAND,
        cwd=ROOT,
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert told.returncode == 1
    assert "infsvc serve" in told.stderr
