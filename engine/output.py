"""From bytes of tokens to text a client may see: UTF-8 made whole, stop strings held back, reasoning told apart."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.tool_calls import ToolCall


class TextAssembler:
    """Turns token bytes into text, never showing half a character or the beginning of a stop string.

    One an answer; engine thread. After `feed` returned `stopped=True` nothing more may be fed.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held = ""

    def feed(self, piece: bytes) -> tuple[str, bool]:
        """Returns the text that is now certain, and whether a stop string was met (it is cut off)."""
        text = self._decoder.decode(piece)
        if not self._stop:
            return text, False
        self._held += text
        # The stop string that is whole first counts, so that the answer does not depend on where tokens are cut.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)[1]], ""
            self._decoder.reset()
            return shown, True
        keep = self._longest_beginning()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def finish(self) -> str:
        """What was still held back; an unfinished character becomes U+FFFD."""
        rest = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return rest

    def _longest_beginning(self) -> int:
        """How many characters at the end of the held text may yet become a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:n]):
                    longest = n
                    break
        return longest


@dataclass(frozen=True)
class Parsed:
    """What one piece of text turned out to be; each may be empty."""

    text: str
    reasoning: str
    calls: tuple[ToolCall, ...] = ()


class OutputParser(Protocol):
    """Sorts an answer piece by piece, whatever the pieces. One an answer; loop thread.

    Attributes:
        ended: whether the answer is complete, so that nothing of what may follow is read.
    """

    ended: bool

    def feed(self, piece: str) -> Parsed:
        """What is certain now."""

    def finish(self) -> Parsed:
        """What was held back when the answer ended."""


class ReasoningParser:
    """Tells `<think>…</think>` at the beginning of an answer from the answer itself, piece by piece.

    With `inside` the prompt already opened the reasoning. With `enabled=False` everything is text (raw mode, other
    models).
    """

    _OPEN, _CLOSE = "<think>", "</think>"

    ended = False

    def __init__(self, *, enabled: bool, inside: bool = False) -> None:
        self._phase = "text" if not enabled else "opened" if inside else "start"
        self._held = ""
        self._strip = enabled

    def feed(self, piece: str) -> Parsed:
        """Sorts a piece; what may yet be a mark is held back."""
        self._held += piece
        reasoning = ""
        if self._phase == "start":
            lead = self._held.lstrip()
            if lead.startswith(self._OPEN):
                self._held = lead[len(self._OPEN) :].lstrip("\n")
                self._phase = "opened"
            elif self._OPEN.startswith(lead):
                return Parsed("", "")
            else:
                self._phase, self._strip = "text", False
        if self._phase == "opened":
            self._held = self._held.lstrip("\n")
            if not self._held:
                return Parsed("", "")
            self._phase = "reasoning"
        if self._phase == "reasoning":
            at = self._held.find(self._CLOSE)
            if at < 0:
                keep = overlap(self._held, self._CLOSE)
                # The newline before the closing mark is its own, not the reasoning's.
                safe = self._held[: len(self._held) - keep].rstrip("\n")
                self._held = self._held[len(safe) :]
                return Parsed("", safe)
            reasoning = self._held[:at].rstrip("\n")
            self._held = self._held[at + len(self._CLOSE) :]
            self._phase = "text"
        if self._strip:
            self._held = self._held.lstrip("\n")
            if not self._held:
                return Parsed("", reasoning)
            self._strip = False
        text, self._held = self._held, ""
        return Parsed(text, reasoning)

    def finish(self) -> Parsed:
        """What was held back when the answer ended."""
        rest, self._held = self._held, ""
        if self._phase == "reasoning":
            return Parsed("", rest.rstrip("\n"))
        return Parsed("" if self._phase == "opened" else rest, "")


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` begin `mark`."""
    for n in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:n]):
            return n
    return 0
