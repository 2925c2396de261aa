"""One answer as its reader sees it, wherever it is decoded: chunks as they come, their pace, the reply at the end."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from engine.logprobs import StepLogprobs
from engine.tool_calls import ToolCall
from infsvc.types import CompletionReply


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one decode step yielded; at least one of its texts and calls is there. `logprobs` are those of the tokens
    drawn since the chunk before, where they were asked for."""

    index: int
    text: str
    reasoning: str
    logprobs: tuple[StepLogprobs, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()

    def __add__(self, more: Chunk) -> Chunk:
        """Both as one, at this one's index."""
        return Chunk(
            self.index,
            self.text + more.text,
            self.reasoning + more.reasoning,
            self.logprobs + more.logprobs,
            self.tool_calls + more.tool_calls,
        )


class Answer:
    """What is told of an answer, to one reader. Loop thread only.

    Attributes:
        reply: once it has ended, well or not.
    """

    def __init__(self) -> None:
        self.reply: CompletionReply | None = None
        self.tokens_out = 0
        self._begun_s = self._last_s = time.perf_counter()
        self._first_s: float | None = None
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._chunks: deque[Chunk] = deque()
        self._n_chunks = 0
        self._reader: asyncio.Future[None] | None = None

    @property
    def finished(self) -> bool:
        return self.reply is not None

    @property
    def ttft_ms(self) -> float | None:
        """From the asking to the first token, in milliseconds; None before it."""
        return None if self._first_s is None else (self._first_s - self._begun_s) * 1000

    @property
    def duration_ms(self) -> float:
        """From the asking to the last token or the end."""
        return (self._last_s - self._begun_s) * 1000

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; 0 before the second."""
        if self._first_s is None or self.tokens_out < 2 or self._last_s <= self._first_s:
            return 0.0
        return (self.tokens_out - 1) / (self._last_s - self._first_s)

    def cancel(self) -> None:
        """Ends it soon. Safe to call at any time and twice."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """The chunks as they come; raises the `RequestError` that ended the answer."""
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self.finished:
                self._raise_if_failed()
                return
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def _wake(self) -> None:
        """Has the reader look again."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _raise_if_failed(self) -> None:
        raise NotImplementedError
