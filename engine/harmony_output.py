"""Reads a harmony answer piece by piece: analysis is reasoning, final is text, commentary to a function is a call.

The marks come as text, as `engine.sequence` shows them. What the parser yields does not depend on where the pieces end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from engine.harmony import CALL, CHANNEL, CONSTRAIN, END, FUNCTIONS, MESSAGE, RETURN, START
from engine.output import Parsed, overlap
from engine.tool_calls import ToolCall

_ENDS = (END, CALL, RETURN)
# A header where its message should have ended goes on with the next one: models leave an end out at times.
_CLOSERS = (*_ENDS, START, CHANNEL)
_HEADER_BEGINS = (START, CHANNEL, CONSTRAIN, MESSAGE, "to=")
_MAX_HEADER_CHARS = 512
_GAP = "\n\n"
_EVERYBODY = frozenset({"all", "assistant", "user"})
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*([A-Za-z_]*)")
_RECIPIENT = re.compile(r"(?:^|\s)to=([^\s<]+)")


@dataclass(frozen=True, slots=True)
class _Header:
    """A message's header: as it was written, its channel, and whom it is to; empty for everybody."""

    written: str
    channel: str
    recipient: str

    @classmethod
    def parse(cls, written: str) -> _Header:
        # A stray beginning may stand before the header that counts.
        text = written.rpartition(START)[2]
        channels, recipients = _CHANNEL.findall(text), _RECIPIENT.findall(text)
        recipient = recipients[-1] if recipients and recipients[-1] not in _EVERYBODY else ""
        return cls(written, channels[-1] if channels else "", recipient)


_FINAL = _Header("", "final", "")


class HarmonyParser:
    """Sorts an answer into text, reasoning and calls. One an answer; loop thread.

    A message to a function becomes a call where tools were offered and its content is a JSON object. Every other
    message to somebody, and a call that is cut off, comes back as the text that it was, header and all: nobody here
    answers it. Several messages of one kind are parted by an empty line.

    Args:
        final: the prompt has already opened the final channel.
        calls: whether tools were offered.
        verbatim: the text is the whole answer with its marks; nothing is reasoning, and calls are told all the same.

    Attributes:
        ended: whether the final message is complete: what a model goes on with after it is no part of the answer.
    """

    def __init__(self, *, final: bool = False, calls: bool = False, verbatim: bool = False) -> None:
        self._header: _Header | None = _FINAL if final else None
        self._takes_calls, self._verbatim = calls, verbatim
        self._held = ""
        self._written = ""
        self._body: list[str] = []
        self._fresh = True
        self._said: set[str] = set()
        self.ended = False

    def feed(self, piece: str) -> Parsed:
        """Sorts a piece; what may yet be a mark or a header is held back."""
        if self.ended:
            return Parsed("", "")
        self._held += piece
        return self._sorted(self._steps(), piece)

    def finish(self) -> Parsed:
        """What was held back when the answer ended."""
        if self.ended:
            return Parsed("", "")
        return self._sorted(self._rest(), "")

    def _sorted(self, parts: Iterator[tuple[str, str] | ToolCall], piece: str) -> Parsed:
        texts: dict[str, list[str]] = {"text": [], "reasoning": []}
        calls: list[ToolCall] = []
        for part in parts:
            if isinstance(part, ToolCall):
                calls.append(part)
            else:
                texts[part[0]].append(part[1])
        if self._verbatim:
            # What is still held when the answer has ended is no part of it.
            self._written += piece
            n = len(self._written) - len(self._held)
            shown, self._written = self._written[:n], self._written[n:]
            return Parsed(shown, "", tuple(calls))
        return Parsed("".join(texts["text"]), "".join(texts["reasoning"]), tuple(calls))

    def _steps(self) -> Iterator[tuple[str, str] | ToolCall]:
        while self._held and not self.ended:
            if self._header is None:
                no_header = self._read_header()
                if no_header is None:
                    return
                yield from self._content(no_header)
            else:
                at, mark = self._closer()
                if not mark:
                    keep = max(overlap(self._held, each) for each in _CLOSERS)
                    safe = len(self._held) - keep
                    yield from self._content(self._held[:safe])
                    self._held = self._held[safe:]
                    return
                yield from self._content(self._held[:at])
                yield from self._close(self._header)
                self.ended = mark in (CALL, RETURN) or (mark == END and self._header.channel == "final")
                # A mark that begins a header is part of it.
                self._held = self._held[at + (len(mark) if mark in _ENDS else 0) :]
                self._header = None

    def _read_header(self) -> str | None:
        """Takes the header off what is held; None while it is not whole. What cannot be one is the answer itself: of
        what is too long for one, the beginning is answered, which may be a mark that would otherwise begin another."""
        at = self._held.find(MESSAGE)
        n = len(self._held) - len(MESSAGE) if at < 0 else at
        lead = self._held.lstrip()
        no_header = ""
        if not any(lead.startswith(each) or each.startswith(lead) for each in _HEADER_BEGINS):
            self._header = _FINAL
        elif n > _MAX_HEADER_CHARS:
            self._header = _FINAL
            no_header, self._held = self._held[:_MAX_HEADER_CHARS], self._held[_MAX_HEADER_CHARS:]
        elif at < 0:
            return None
        else:
            self._header = _Header.parse(self._held[:at])
            self._held = self._held[at + len(MESSAGE) :]
        self._body.clear()
        self._fresh = True
        return no_header

    def _closer(self) -> tuple[int, str]:
        """Where the message ends, and by which mark; an empty one while it goes on."""
        found = [(at, str(mark)) for mark in _CLOSERS if (at := self._held.find(mark)) >= 0]
        return min(found, default=(-1, ""))

    def _content(self, text: str) -> Iterator[tuple[str, str]]:
        header = self._header
        assert header is not None
        if not text:
            return
        if self._is_call(header):
            self._body.append(text)
            return
        yield from self._say(header, text)

    def _say(self, header: _Header, text: str) -> Iterator[tuple[str, str]]:
        kind = "reasoning" if header.channel == "analysis" and not header.recipient else "text"
        if self._fresh and kind in self._said:
            yield kind, _GAP
        if self._fresh and header.recipient:
            yield kind, f"{header.written}{MESSAGE}"
        self._fresh = False
        self._said.add(kind)
        yield kind, text

    def _close(self, header: _Header) -> Iterator[tuple[str, str] | ToolCall]:
        """The end of a message: a call is whole, or is none."""
        if not self._is_call(header):
            return
        body = "".join(self._body)
        self._body.clear()
        arguments = _arguments(body)
        if arguments is not None:
            yield ToolCall.new(header.recipient.removeprefix(FUNCTIONS), arguments)
        else:
            yield from self._say(header, body)

    def _rest(self) -> Iterator[tuple[str, str] | ToolCall]:
        held, self._held = self._held, ""
        if self._header is not None:
            yield from self._content(held)
            yield from self._close(self._header)
        elif not held.lstrip().startswith(_HEADER_BEGINS):  # else a header without its message
            self._header = _FINAL
            yield from self._content(held)

    def _is_call(self, header: _Header) -> bool:
        name = header.recipient.removeprefix(FUNCTIONS)
        return self._takes_calls and bool(name) and name != header.recipient


def _arguments(body: str) -> str | None:
    """A call's content as the JSON text of its arguments, or None where it is no JSON object."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return body.strip() if isinstance(told, dict) else None
