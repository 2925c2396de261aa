"""The one path of every request: admission, prompt, generation, audit. Every door comes through `submit`.

Loop thread. A request is refused with a typed `RequestError`, and each one, refused or not, leaves a row in its model's
audit log.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from engine.embedding import Embedding, EmbeddingRequest
from engine.embedding_job import EmbeddingJob
from engine.embedding_text import token_lists
from engine.fleet import Fleet
from engine.generation import Generation
from engine.logprobs import MAX_TOP
from engine.prompt import Tool
from engine.rerank import Reranking, RerankRequest, pairs
from engine.sampling import SamplerSpec
from engine.sequence import Sequence
from engine.worker import Worker
from infsvc.audit import AuditStatus, RequestRow
from infsvc.errors import (
    AuditUnavailable,
    BadRequest,
    ContextLengthExceeded,
    Draining,
    EngineFailed,
    LlamaError,
    ModelNotLoaded,
    QueueFull,
    RequestError,
    TextTooLong,
)
from infsvc.events import EventBus, RequestFinished, RequestStarted
from infsvc.types import (
    Capability,
    CompletionReply,
    CompletionRequest,
    Message,
    ModelState,
    Params,
    ReasoningEffort,
    new_req_id,
)

if TYPE_CHECKING:
    from engine.constraint import Grammars
    from engine.worker import AnyEmbedder


@dataclass(frozen=True, kw_only=True)
class InferenceRequest:
    """A request as every door hands it in: an `input` text or `messages`, exactly one of them.

    Attributes:
        raw: the input goes to the model as it is, and its output comes back as it is.
        think: asks a reasoning model to think first, or not to; None leaves it to the model's template.
        effort: how long a model thinks that knows degrees; None leaves it to the worker file.
        plain: the input is completed without a template; the BOS is added as the vocabulary says.
        tokens: the prompt as token ids, in place of `input` and `messages`.
        tools: what the model may call; its template lists them.
        one_call: the answer is constrained to be one call, without its marks.
        n_logprobs: how many of the likeliest tokens `Generation.logprobs` tells with each drawn one (0-20); None for no
            log-probabilities.
        source: the door: http, nats, chat.
        queued: it has waited in the broker's queue, so what waits there does not count against it.
        client: whose it is, as its door tells clients apart; empty where it cannot.
    """

    model: str
    params: Params = field(default_factory=Params)
    input: str | None = None
    messages: tuple[Message, ...] = ()
    raw: bool = False
    think: bool | None = None
    effort: ReasoningEffort | None = None
    plain: bool = False
    tokens: tuple[int, ...] | None = None
    tools: tuple[Tool, ...] = ()
    one_call: bool = False
    n_logprobs: int | None = None
    req_id: str = field(default_factory=new_req_id)
    trace_id: str | None = None
    source: str = "http"
    reply_to: str | None = None
    priority: int = 0
    queued: bool = False
    client: str = ""

    @classmethod
    def from_wire(
        cls,
        body: CompletionRequest,
        *,
        model: str,
        source: str,
        trace_id: str | None = None,
        queued: bool = False,
        client: str = "",
    ) -> InferenceRequest:
        """From a native request; `trace_id` (a header's) counts where the body names none."""
        return cls(
            model=model,
            params=body.params,
            input=body.input,
            messages=body.messages,
            raw=body.raw,
            req_id=body.req_id or new_req_id(),
            trace_id=body.trace_id or trace_id,
            source=source,
            reply_to=body.reply_to,
            priority=body.priority,
            queued=queued,
            client=client,
        )

    @property
    def raw_input(self) -> str:
        """What the audit log keeps as the input: the text, or the messages as JSON."""
        if self.input is not None:
            return self.input
        if self.tokens is not None:
            return json.dumps(self.tokens)
        return json.dumps([message.model_dump(exclude_none=True) for message in self.messages], ensure_ascii=False)

    @property
    def params_json(self) -> str:
        return json.dumps(self.params.model_dump(exclude_none=True, exclude_defaults=True))


AnyAsked = InferenceRequest | EmbeddingRequest | RerankRequest
AnyRequest = TypeVar("AnyRequest", InferenceRequest, EmbeddingRequest, RerankRequest)
Admitted = TypeVar("Admitted", Generation, Embedding, Reranking)
Read = TypeVar("Read", bound=Embedding)


class InferenceService:
    """Admits requests to the fleet's engines."""

    def __init__(self, fleet: Fleet, *, events: EventBus, node: str, grammars: Grammars | None = None) -> None:
        self._fleet, self._events, self._node = fleet, events, node
        self._grammars = grammars
        self.draining = False

    def resolve(self, model: str | None) -> Worker:
        """The model by name; without one, the only ready one. Raises `UnknownModel` or `BadRequest`."""
        if model is not None:
            return self._fleet.get(model)
        ready = [worker for worker in self._fleet.workers.values() if worker.state is ModelState.READY]
        if len(ready) == 1:
            return ready[0]
        names = ", ".join(worker.name for worker in ready) or "none"
        raise BadRequest(f"model is needed to choose one of those loaded: {names}", param="model")

    async def submit(self, request: InferenceRequest) -> Generation:
        """Admits a request; it then runs whether it is read or not.

        Raises:
            RequestError: it cannot be served; its row in the audit log says `rejected`, or `error` for a fault of this
            node.
        """
        return await self._recorded(request, self._admit)

    async def embed(self, request: EmbeddingRequest) -> Embedding:
        """Admits a request for embeddings; otherwise as `submit`."""
        return await self._recorded(request, self._admit_texts)

    async def rerank(self, request: RerankRequest) -> Reranking:
        """Admits a request to order documents; otherwise as `submit`."""
        return await self._recorded(request, self._admit_pairs)

    async def _recorded(
        self, request: AnyRequest, admit: Callable[[Worker, AnyRequest], Awaitable[Admitted]]
    ) -> Admitted:
        """Admits, or leaves the row of a request that was not."""
        worker = self._fleet.get(request.model)
        begun_s = time.perf_counter()

        def leave_row(status: AuditStatus, error: str, n_prompt_tokens: int = 0) -> None:
            dur_ms = (time.perf_counter() - begun_s) * 1000
            self._not_run(worker, request, status, error, dur_ms, n_prompt_tokens)

        try:
            return await admit(worker, request)
        except EngineFailed as error:
            leave_row("error", f"{error.code}: {error}")
            raise
        except RequestError as error:
            leave_row("rejected", f"{error.code}: {error}", getattr(error, "n_prompt_tokens", 0))
            raise
        except LlamaError as error:
            # The engine ended while the prompt was read.
            failure = EngineFailed(str(error))
            leave_row("error", f"{failure.code}: {failure}")
            raise failure from error
        except asyncio.CancelledError:
            leave_row("cancelled", "the client left before the prompt was read")
            raise
        except Exception as error:
            leave_row("error", repr(error))
            raise

    async def complete(self, request: InferenceRequest) -> CompletionReply:
        """Submits and waits for the reply; leaving early cancels."""
        async with await self.submit(request) as generation:
            return await generation.result()

    def answered_again(self, request: InferenceRequest | EmbeddingRequest, answer: dict[str, Any]) -> None:
        """Leaves the row of a repeat that got an earlier answer: nothing was computed."""
        worker = self._fleet.get(request.model)
        row = self._row(request, "replayed", error=answer.get("error"))
        known = {key: answer[key] for key in ("tokens_in", "tokens_out", "finish_reason", "reasoning") if key in answer}
        told = answer_text(answer.get("text"), answer.get("tool_calls"))
        worker.audit.record(replace(row, response_text=told, **known))

    def refused(self, request: InferenceRequest | EmbeddingRequest, error: RequestError) -> None:
        """Leaves the row of a request that a door refused by itself."""
        self._fleet.get(request.model).audit.record(self._row(request, "rejected", error=f"{error.code}: {error}"))

    def withdrawn(self, request: InferenceRequest | EmbeddingRequest) -> None:
        """Leaves the row of a request that was cancelled while it waited outside this process."""
        row = self._row(request, "cancelled", error=None)
        self._fleet.get(request.model).audit.record(row)

    def live(self) -> Iterator[Generation | Embedding]:
        """All requests that wait or run, oldest first within a model."""
        for worker in self._fleet.workers.values():
            yield from worker.requests.values()

    def find(self, req_id: str) -> Generation | Embedding | None:
        """A live request by its id."""
        return next((generation for generation in self.live() if generation.req_id == req_id), None)

    async def drain(self, grace_s: float) -> None:
        """Refuses new work, waits `grace_s` for what runs and cancels the rest; returns when all has ended."""
        self.draining = True
        waits = [asyncio.ensure_future(generation.ended()) for generation in self.live()]
        if not waits:
            return
        _, late = await asyncio.wait(waits, timeout=grace_s)
        for generation in self.live():
            generation.cancel()
        if late:
            await asyncio.wait(late, timeout=1.0)
        for wait in waits:
            wait.cancel()

    async def _admit(self, worker: Worker, request: InferenceRequest) -> Generation:
        self._check_ready(worker)
        if worker.engine is None:
            why = worker.evidence(Capability.TEXT_GENERATION)
            raise BadRequest(
                f"{worker.name} is an embedding model ({why}) and generates no text: send texts to /v1/embeddings or "
                "its embedding subject",
                param="model",
            )
        self._check_supported(request)
        self._check_room(worker, queued=request.queued)
        with worker.preparing():
            params = request.params
            prompt, constraint = await asyncio.get_running_loop().run_in_executor(
                self._fleet.pool,
                lambda: (
                    worker.prompt(
                        text=request.input,
                        messages=request.messages,
                        raw=request.raw,
                        think=request.think,
                        effort=request.effort,
                        tools=request.tools,
                        one_call=request.one_call,
                        answer_only=params.constrained,
                        plain=request.plain,
                        tokens=request.tokens,
                    ),
                    worker.constraint(params, self._grammars),
                ),
            )
            # The model may have been asked to leave while the prompt was rendered.
            self._check_ready(worker)
            assert worker.engine is not None
            tokens = prompt.tokens
            if not tokens:
                raise BadRequest("the input has no tokens", param="input")
            if len(tokens) >= worker.n_ctx:
                raise ContextLengthExceeded(n_prompt_tokens=len(tokens), n_ctx=worker.n_ctx)
            engine = worker.engine
            for token in request.params.logit_bias:
                if not 0 <= token < engine.model.n_vocab:
                    raise BadRequest(
                        f"params.logit_bias names token {token}, and {worker.name}'s vocabulary has "
                        f"{engine.model.n_vocab} (0 to {engine.model.n_vocab - 1})",
                        param="params.logit_bias",
                    )
            generation = Generation(
                request,
                formatted=prompt.text,
                tokens_in=len(tokens),
                parser=prompt.parser,
                calls=prompt.calls,
                cancel=engine.cancel,
                on_token=worker.stats.token,
                on_done=lambda done: self._done(worker, done),
            )
            sequence = Sequence(
                prompt=tokens,
                sampler=SamplerSpec.from_params(params, n_ctx=worker.n_ctx),
                max_tokens=params.max_tokens,
                n_ctx=worker.n_ctx,
                listener=generation.on_event,
                stop=params.stop,
                ignore_eos=params.ignore_eos,
                special=request.raw,
                shown=prompt.shown,
                priority=request.priority,
                client=f"{request.source} {request.client}",
                n_logprobs=request.n_logprobs,
                constraint=constraint,
                draft_max=params.draft_max,
            )
            generation.attach(sequence)
            worker.requests[_free_key(worker, request.req_id)] = generation
        self._events.publish(
            RequestStarted(model=worker.name, req_id=request.req_id, tokens_in=len(tokens), source=request.source)
        )
        engine.submit(sequence)
        return generation

    async def _admit_texts(self, worker: Worker, request: EmbeddingRequest) -> Embedding:
        self._check_ready(worker)
        if not worker.has(Capability.EMBEDDINGS):
            raise BadRequest(f"{worker.name} cannot embed: {worker.evidence(Capability.EMBEDDINGS)}", param="model")
        self._check_room(worker, queued=request.queued)
        with worker.preparing():
            embedder = await self._fleet.embedder(worker)
            self._check_ready(worker)
            if request.dimensions is not None and request.dimensions > embedder.n_embd:
                raise BadRequest(
                    f"dimensions: {worker.name} computes vectors of {embedder.n_embd} values", param="dimensions"
                )
            texts = await asyncio.get_running_loop().run_in_executor(
                self._fleet.pool, token_lists, request.input, embedder.model
            )
            return self._read_texts(worker, embedder, Embedding, request, texts, what="input")

    async def _admit_pairs(self, worker: Worker, request: RerankRequest) -> Reranking:
        self._check_ready(worker)
        if not worker.has(Capability.RERANKING):
            raise BadRequest(f"{worker.name} is no reranker: {worker.evidence(Capability.RERANKING)}", param="model")
        self._check_room(worker, queued=request.queued)
        with worker.preparing():
            embedder = await self._fleet.embedder(worker)
            self._check_ready(worker)
            template = worker.info.rerank_template if worker.info else None
            texts = await asyncio.get_running_loop().run_in_executor(
                self._fleet.pool, pairs, request.query, request.documents, embedder.model, template
            )
            return self._read_texts(worker, embedder, Reranking, request, texts, what="document")

    def _read_texts(
        self,
        worker: Worker,
        embedder: AnyEmbedder,
        kind: type[Read],
        request: EmbeddingRequest | RerankRequest,
        texts: list[list[int]],
        *,
        what: Literal["input", "document"],
    ) -> Read:
        """Hands texts that fit to the embedder."""
        self._check_ready(worker)
        tokens_in = sum(map(len, texts))
        for index, text in enumerate(texts):
            if len(text) > embedder.n_ctx:
                n_ctx_train = worker.info.n_ctx_train if worker.info else 0
                raise TextTooLong(
                    index=index, n_prompt_tokens=len(text), n_ctx=embedder.n_ctx, n_ctx_train=n_ctx_train, what=what
                )
        read = kind(
            request,
            tokens_in=tokens_in,
            cancel=embedder.cancel,
            on_done=lambda done: self._embedded(worker, done),
        )
        job = EmbeddingJob(texts, listener=read.on_event, priority=request.priority)
        read.attach(job)
        worker.requests[_free_key(worker, request.req_id)] = read
        self._events.publish(
            RequestStarted(model=worker.name, req_id=request.req_id, tokens_in=tokens_in, source=request.source)
        )
        embedder.submit(job)
        return read

    def _embedded(self, worker: Worker, embedding: Embedding) -> None:
        _leave(worker, embedding)
        worker.stats.finished(ttft_ms=None, latency_ms=embedding.duration_ms)
        statuses: dict[str | None, tuple[AuditStatus, str]] = {
            "done": ("ok", "stop"),
            "cancelled": ("cancelled", "cancelled"),
        }
        status, reason = statuses.get(embedding.outcome, ("error", "error"))
        worker.audit.record(
            RequestRow(
                **_asked(embedding.request),
                ts=embedding.created_ts,
                worker_id=self._node,
                formatted_input=None,
                response_text=None,
                tokens_in=embedding.tokens_in,
                tokens_out=0,
                dur_ms=round(embedding.duration_ms, 3),
                status=status,
                error=embedding.error,
                finish_reason=reason,
            )
        )
        self._events.publish(
            RequestFinished(
                model=worker.name,
                req_id=embedding.req_id,
                tokens_in=embedding.tokens_in,
                tokens_out=0,
                ttft_ms=None,
                duration_ms=embedding.duration_ms,
                finish_reason=reason,
                source=embedding.source,
            )
        )

    @staticmethod
    def _check_room(worker: Worker, *, queued: bool) -> None:
        if worker.audit.unavailable is not None:
            raise AuditUnavailable(f"the audit log takes no more rows: {worker.audit.unavailable}")
        if queued:
            return  # its place was given to it when it was queued; who fills the line since must not take it
        capacity = worker.settings.queue_max_msgs
        if worker.n_in_flight + worker.n_queued_durable >= worker.n_slots + capacity:
            raise QueueFull(
                model=worker.name, n_waiting=worker.n_waiting, capacity=capacity, retry_after_s=retry_after_s(worker)
            )

    def _check_ready(self, worker: Worker) -> None:
        if self.draining:
            raise Draining("the node is shutting down")
        if worker.state is ModelState.DRAINING:
            raise Draining(f"{worker.name} is being unloaded", param="model")
        if worker.state is not ModelState.READY:
            raise ModelNotLoaded(worker.name, worker.state.replace("_", " "), worker.reason)

    @staticmethod
    def _check_supported(request: InferenceRequest) -> None:
        if request.n_logprobs is not None and not 0 <= request.n_logprobs <= MAX_TOP:
            raise BadRequest(f"at most {MAX_TOP} of the likeliest tokens can be told", param="top_logprobs")
        params = request.params
        if params.grammar is not None and params.json_schema is not None:
            raise BadRequest("params.grammar and params.json_schema exclude each other", param="params.json_schema")
        if params.constrained and params.ignore_eos:
            raise BadRequest(
                "a constrained answer ends where its grammar says: leave ignore_eos out", param="params.ignore_eos"
            )
        if params.constrained and request.think:
            raise BadRequest("a constrained answer comes without reasoning: ask for none", param="think")

    def _done(self, worker: Worker, generation: Generation) -> None:
        reply = generation.reply
        assert reply is not None
        _leave(worker, generation)
        worker.stats.finished(ttft_ms=generation.ttft_ms, latency_ms=generation.duration_ms)
        status: AuditStatus = "ok"
        if reply.finish_reason in ("cancelled", "error"):
            status = "cancelled" if reply.finish_reason == "cancelled" else "error"
        slot = "" if generation.slot is None else f"-{generation.slot}"
        worker.audit.record(
            RequestRow(
                **_asked(generation.request),
                ts=generation.created_ts,
                worker_id=f"{self._node}{slot}",
                formatted_input=generation.formatted,
                response_text=answer_text(reply.text, reply.tool_calls),
                tokens_in=reply.tokens_in,
                tokens_out=reply.tokens_out,
                tokens_cached=reply.tokens_cached,
                dur_ms=round(generation.duration_ms, 3),
                status=status,
                error=reply.error,
                finish_reason=reply.finish_reason,
                ttft_ms=None if generation.ttft_ms is None else round(generation.ttft_ms, 3),
                reasoning=reply.reasoning,
            )
        )
        self._events.publish(
            RequestFinished(
                model=worker.name,
                req_id=generation.req_id,
                tokens_in=reply.tokens_in,
                tokens_out=reply.tokens_out,
                tokens_cached=reply.tokens_cached,
                ttft_ms=generation.ttft_ms,
                duration_ms=generation.duration_ms,
                finish_reason=reply.finish_reason,
                source=generation.source,
            )
        )

    def _not_run(
        self,
        worker: Worker,
        request: AnyAsked,
        status: AuditStatus,
        error: str,
        dur_ms: float,
        n_prompt_tokens: int,
    ) -> None:
        """The row of a request that no engine saw."""
        worker.audit.record(self._row(request, status, error=error, dur_ms=dur_ms, n_prompt_tokens=n_prompt_tokens))

    def _row(
        self,
        request: AnyAsked,
        status: AuditStatus,
        *,
        error: str | None,
        dur_ms: float = 0.0,
        n_prompt_tokens: int = 0,
    ) -> RequestRow:
        return RequestRow(
            **_asked(request),
            worker_id=self._node,
            formatted_input=None,
            response_text=None,
            tokens_in=n_prompt_tokens,
            tokens_out=0,
            dur_ms=round(dur_ms, 3),
            status=status,
            error=error,
            finish_reason="cancelled" if status == "cancelled" else None,
        )


def _leave(worker: Worker, ended: Generation | Embedding) -> None:
    for key, live in tuple(worker.requests.items()):
        if live is ended:
            del worker.requests[key]


def _asked(request: AnyAsked) -> dict[str, Any]:
    """The columns that the request alone fills."""
    raw_input = request.raw_input
    return {
        "trace_id": request.trace_id,
        "req_id": request.req_id,
        "source": request.source,
        "reply_to": request.reply_to,
        "raw_input": raw_input,
        "input_len": len(raw_input),
        "params_json": request.params_json,
        "grammar_used": _grammar_used(request.params) if isinstance(request, InferenceRequest) else None,
    }


def _grammar_used(params: Params) -> str | None:
    """The grammar's name or text, or the schema as JSON."""
    if params.json_schema is None:
        return params.grammar
    return json.dumps(params.json_schema, ensure_ascii=False)


def answer_text(text: str | None, calls: list[dict[str, Any]] | None) -> str | None:
    """What the audit log keeps as the answer: its text, then its tool calls as JSON."""
    if not calls:
        return text
    told = json.dumps(calls, ensure_ascii=False)
    return f"{text}\n{told}" if text else told


def retry_after_s(worker: Worker) -> int:
    """When a place in the queue may be free: what waits, at the median pace, over the slots; 1 to 60 seconds."""
    latency = worker.stats.latency_ms()
    seconds = worker.n_waiting * (latency[0] if latency else 1000.0) / 1000 / worker.n_slots
    return min(60, max(1, math.ceil(seconds)))


def _free_key(worker: Worker, req_id: str) -> str:
    """The request's key among the live ones; a second one with the same id gets a number behind it."""
    key, n = req_id, 2
    while key in worker.requests:
        key, n = f"{req_id}#{n}", n + 1
    return key
