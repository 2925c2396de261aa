"""One admitted request for embeddings as its reader sees it: wait for the vectors, or stop it.

Loop thread only. When the job's last event has come, `on_done` is called once, whether anybody waits or not, so that
each request ends with its audit row.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from engine.embedding_job import EmbeddingEvent, EmbeddingJob
from infsvc.embedding_types import EmbeddingBody, EmbeddingInput
from infsvc.errors import Cancelled, Draining, EngineFailed, EngineLost
from infsvc.types import new_req_id

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from engine.rerank import RerankRequest


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """A request as every door hands it in.

    Attributes:
        dimensions: how many of a vector's first values are wanted; None for all.
        source: the door: http, nats.
        queued: it has waited in the broker's queue, so what waits there does not count against it.
    """

    model: str
    input: EmbeddingInput
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    req_id: str = field(default_factory=new_req_id)
    trace_id: str | None = None
    source: str = "http"
    reply_to: str | None = None
    priority: int = 0
    queued: bool = False

    @classmethod
    def from_wire(
        cls, body: EmbeddingBody, *, model: str, source: str, trace_id: str | None = None, queued: bool = False
    ) -> EmbeddingRequest:
        """From a body; `trace_id` (a header's) counts where the body names none."""
        return cls(
            model=model,
            input=body.input,
            dimensions=body.dimensions,
            encoding_format=body.encoding_format,
            req_id=body.req_id or new_req_id(),
            trace_id=body.trace_id or trace_id,
            source=source,
            reply_to=body.reply_to,
            priority=body.priority,
            queued=queued,
        )

    @property
    def raw_input(self) -> str:
        """What the audit log keeps as the input: the text, or the list as JSON."""
        return self.input if isinstance(self.input, str) else json.dumps(self.input, ensure_ascii=False)

    @property
    def params_json(self) -> str:
        given = {"dimensions": self.dimensions} if self.dimensions is not None else {}
        return json.dumps(given | ({} if self.encoding_format == "float" else {"encoding_format": "base64"}))


@dataclass(frozen=True)
class EmbeddingResult:
    """The vectors (n_texts, dimensions), each of norm 1, in the order of the texts."""

    request: EmbeddingRequest
    vectors: npt.NDArray[np.float32]
    tokens_in: int

    def wire(self) -> dict[str, Any]:
        """OpenAI's list. Takes a millisecond for each thousand values: call it off the loop."""
        if self.request.encoding_format == "base64":
            shown: list[Any] = [base64.b64encode(each.astype("<f4").tobytes()).decode() for each in self.vectors]
        else:
            shown = self.vectors.tolist()
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(shown)],
            "model": self.request.model,
            "usage": {"prompt_tokens": self.tokens_in, "total_tokens": self.tokens_in},
        }


class Embedding:
    """A request that is read, or waits to be. `result()` waits for its vectors."""

    def __init__(
        self,
        request: EmbeddingRequest | RerankRequest,
        *,
        tokens_in: int,
        cancel: Callable[[EmbeddingJob], None],
        on_done: Callable[[Embedding], None],
    ) -> None:
        self.request = request
        self.req_id, self.model, self.source = request.req_id, request.model, request.source
        self.tokens_in, self.tokens_out = tokens_in, 0
        self.created_ts = time.time()
        self.outcome: Literal["done", "cancelled", "error"] | None = None
        self.error: str | None = None
        self._lost: str | None = None
        self._begun_s = self._last_s = time.perf_counter()
        self._started = self._asked_to_stop = False
        self._cancel, self._on_done = cancel, on_done
        self._job: EmbeddingJob | None = None
        self._ended = asyncio.Event()

    def attach(self, job: EmbeddingJob) -> None:
        """Names the job whose events this request receives."""
        self._job = job

    @property
    def running(self) -> bool:
        """Whether a text of it was taken and it has not ended."""
        return self._started and self.outcome is None

    @property
    def finished(self) -> bool:
        return self.outcome is not None

    @property
    def duration_ms(self) -> float:
        """From submit to the end."""
        return (self._last_s - self._begun_s) * 1000

    def cancel(self) -> None:
        """Ends it soon. Safe to call at any time and twice."""
        if self._job is not None and not self.finished:
            self._asked_to_stop = True
            self._cancel(self._job)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    async def ended(self) -> None:
        """Waits for the end, well or not; any number may wait."""
        await self._ended.wait()

    async def vectors(self) -> npt.NDArray[np.float32]:
        """Waits for what the embedder computes of each text.

        Raises:
            Cancelled: someone cancelled the request.
            Draining: the model left before they were computed.
            EngineFailed: the embedder failed; `EngineLost` when it went with its process.
        """
        await self._ended.wait()
        if self.outcome == "cancelled":
            if self._asked_to_stop:
                raise Cancelled("the request was cancelled before its embeddings were computed")
            raise Draining(f"{self.model} was unloaded before the embeddings were computed", param="model")
        if self.outcome == "error":
            raise (
                EngineLost(self.model, self._lost) if self._lost else EngineFailed(self.error or "the embedder failed")
            )
        assert self._job is not None
        assert self._job.vectors is not None
        return self._job.vectors

    async def result(self) -> EmbeddingResult:
        """Waits for the embeddings; raises as `vectors`."""
        import numpy as np

        vectors, request = await self.vectors(), self.request
        assert isinstance(request, EmbeddingRequest)
        if request.dimensions is not None and request.dimensions < vectors.shape[1]:
            vectors = vectors[:, : request.dimensions]
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
        return EmbeddingResult(request, vectors, self.tokens_in)

    def on_event(self, event: EmbeddingEvent) -> None:
        """Takes an event of the embedder; called on the loop, in order."""
        if event.kind == "started":
            self._started = True
            return
        self._last_s = event.at_s
        self.outcome, self.error = event.kind, event.error
        if event.lost:
            self._lost = event.error
            self.error = str(EngineLost(self.model, event.error or ""))
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
            "tokens_out": 0,
        }
