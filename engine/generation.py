"""One admitted request as its reader sees it: chunks as they are decoded, then the reply; and the way to stop it.

Loop thread only. The sequence's events come in through `on_event`; when the last one has come, `on_done` is called
once, whether anybody reads or not, so that each request ends with its audit row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from engine.answer import Answer, Chunk
from engine.logprobs import StepLogprobs
from engine.output import OutputParser, Parsed
from engine.sequence import Sequence, SequenceEvent, SequenceFinished, SequenceStarted, TokenEmitted
from engine.tool_calls import ToolCall, ToolCallParser
from infsvc.errors import EngineFailed, EngineLost
from infsvc.types import CompletionReply, FinishReason

if TYPE_CHECKING:
    from engine.service import InferenceRequest


class Generation(Answer):
    """A request that runs, or waits for a slot. Read it with `async for` (one reader) or `result()`."""

    def __init__(
        self,
        request: InferenceRequest,
        *,
        formatted: str,
        tokens_in: int,
        parser: OutputParser,
        calls: ToolCallParser | None = None,
        cancel: Callable[[Sequence], None],
        on_token: Callable[[], None],
        on_done: Callable[[Generation], None],
    ) -> None:
        super().__init__()
        self.request = request
        self.req_id, self.model, self.source = request.req_id, request.model, request.source
        self.formatted = formatted
        self.tokens_in = tokens_in
        self.tokens_cached = 0
        self.logprobs: list[StepLogprobs] = []
        self._n_logprobs_shown = 0
        self.created_ts = time.time()
        self.slot: int | None = None
        self.error: str | None = None
        self._failure: Callable[[], EngineFailed] | None = None
        self._parser, self._calls = parser, calls
        self.tool_calls: list[ToolCall] = []
        self._cancel, self._on_token, self._on_done = cancel, on_token, on_done
        self._sequence: Sequence | None = None
        self._chunk_s: float | None = None
        self._ended = asyncio.Event()

    def attach(self, sequence: Sequence) -> None:
        """Names the sequence whose events this generation receives."""
        self._sequence = sequence

    @property
    def running(self) -> bool:
        """Whether it has a slot and has not ended."""
        return self.slot is not None and self.reply is None

    def cancel(self) -> None:
        """Ends it soon with `finish_reason` "cancelled". Safe to call at any time and twice."""
        if self._sequence is not None and not self.finished:
            self._cancel(self._sequence)

    async def result(self) -> CompletionReply:
        """Waits for the end and returns the reply; raises `EngineFailed` when the engine died, `EngineLost` with
        its process."""
        await self._ended.wait()
        self._raise_if_failed()
        return cast(CompletionReply, self.reply)

    async def ended(self) -> None:
        """Waits for the end, well or not; any number may wait."""
        await self._ended.wait()

    def _raise_if_failed(self) -> None:
        if self._failure is not None:
            raise self._failure()

    def on_event(self, event: SequenceEvent) -> None:
        """Takes an event of the engine; called on the loop, in order."""
        try:
            self._take(event)
        finally:
            self._wake()

    def _take(self, event: SequenceEvent) -> None:
        match event:
            case TokenEmitted() if self._parser.ended:
                pass  # drawn before the engine heard that the answer is complete
            case TokenEmitted():
                self.tokens_out += 1
                self._last_s = event.at_s
                if self._first_s is None:
                    self._first_s = event.at_s
                self._on_token()
                if event.logprobs is not None:
                    self.logprobs.append(event.logprobs)
                self._show(self._parser.feed(event.text), step_s=event.at_s)
                if self._parser.ended:
                    self.cancel()
            case SequenceStarted():
                self.slot = event.slot
            case SequenceFinished():
                complete = self._parser.ended and event.reason in ("cancelled", "length")
                if (event.reason == "cancelled" and not complete) or self._first_s is None:
                    self._last_s = event.at_s
                self._show(self._parser.feed(event.text))
                self._show(self._parser.finish(), last=True)
                self._end(event, "stop" if complete else event.reason)

    def _show(self, parsed: Parsed, *, last: bool = False, step_s: float | None = None) -> None:
        text = parsed.text
        calls = list(parsed.calls)
        if self._calls is not None:
            text, found = self._calls.feed(text)
            calls += found
            if last:
                rest, found = self._calls.finish()
                text, calls = text + rest, [*calls, *found]
        if text or parsed.reasoning or calls:
            self._text.append(text)
            self._reasoning.append(parsed.reasoning)
            self.tool_calls += calls
            logprobs = tuple(self.logprobs[self._n_logprobs_shown :])
            self._n_logprobs_shown = len(self.logprobs)
            chunk = Chunk(self._n_chunks, text, parsed.reasoning, logprobs, tuple(calls))
            if step_s is not None and step_s == self._chunk_s and self._chunks:
                # One step drew several tokens: their events come in one go, and nobody has read between them.
                chunk = self._chunks.pop() + chunk
            else:
                self._n_chunks += 1
            self._chunk_s = step_s
            self._chunks.append(chunk)

    def _end(self, event: SequenceFinished, reason: str) -> None:
        if event.error is not None:
            why = event.error
            self._failure = (lambda: EngineLost(self.model, why)) if event.lost else (lambda: EngineFailed(why))
            self.error = str(self._failure())
        self.tokens_cached = event.n_cached
        guessed = event.n_drafted > 0
        duration = round(self.duration_ms)
        called = bool(self.tool_calls) and reason == "stop"
        self.reply = CompletionReply(
            req_id=self.req_id,
            text="".join(self._text),
            reasoning="".join(self._reasoning) or None,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            tokens_cached=self.tokens_cached,
            tokens_drafted=event.n_drafted if guessed else None,
            tokens_accepted=event.n_accepted if guessed else None,
            tool_calls=[call.wire() for call in self.tool_calls] or None,
            finish_reason=cast(FinishReason, "tool_calls" if called else reason),
            duration_ms=duration,
            ms=duration,
            error=self.error,
        )
        self._ended.set()
        self._on_done(self)

    def facts(self) -> dict[str, Any]:
        """What `/api/requests` shows of it."""
        return {
            "req_id": self.req_id,
            "model": self.model,
            "source": self.source,
            "state": "running" if self.running else "waiting",
            "age_ms": round((time.time() - self.created_ts) * 1000),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
        }
