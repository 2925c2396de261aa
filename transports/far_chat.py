"""The chat's way to models of other nodes: asked as any gateway's client would ask, read as if they ran here.

It stands apart from the gateway's `http.elsewhere`, which passes an answer on as it is and reads none. The owner runs
the request and audits it, and shares its slots out to this node's chat as to one client. Loop thread only.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from engine.answer import Answer, Chunk
from infsvc.errors import EngineFailed, ModelNotLoaded, NodeLost, RequestError, rebuilt
from infsvc.subjects import CLIENT_HEADER
from infsvc.types import Capability, CompletionReply, FinishReason, ServiceDocument
from transports.forwarder import Forwarded, Forwarder, Outgoing, Refusal

if TYPE_CHECKING:
    from engine.service import InferenceRequest

_ROUTE = "/v1/chat/completions"


class FarChat:
    """Which models of other nodes can be talked to, and the asking of one.

    Args:
        node: this node's name; the owner knows its chat by it.
    """

    def __init__(self, forwarder: Forwarder, *, node: str) -> None:
        self._forwarder, self._node = forwarder, node

    def models(self) -> list[ServiceDocument]:
        """What generates text on other nodes, by model and node, whatever its state. Of two starts, or two nodes, with
        one name the one that is online counts, else the later one."""
        return self._latest(None)

    def _latest(self, model: str | None) -> list[ServiceDocument]:
        found: dict[tuple[str, str], ServiceDocument] = {}
        for each in self._forwarder.services(model):
            if Capability.TEXT_GENERATION in each.capabilities:
                known = found.get((each.model_name, each.node))
                if known is None or _rank(each) > _rank(known):
                    found[each.model_name, each.node] = each
        return [found[key] for key in sorted(found)]

    def find(self, model: str, node: str) -> ServiceDocument | None:
        """What is known of one of them."""
        return next((each for each in self._latest(model) if each.node == node), None)

    def submit(self, request: InferenceRequest, node: str) -> FarGeneration:
        """Asks a node. It returns at once; what goes wrong is raised where the answer is read.

        Raises:
            NodeLost: nobody knows the node any more.
            ModelNotLoaded: the model is not online there.
        """
        target = self.find(request.model, node)
        if target is None:
            raise NodeLost(node, "is not there any more")
        if target.status != "online":
            raise ModelNotLoaded(request.model, target.status, f"at {node}: {target.reason or 'it says no more'}")
        body = {
            "model": request.model,
            "messages": [message.model_dump(exclude_none=True) for message in request.messages],
            "req_id": request.req_id,
            "stream": True,
            "stream_options": {"include_usage": True},
            **request.params.model_dump(exclude_unset=True, exclude_none=True),
        }
        if request.think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": request.think}
        outgoing = Outgoing(
            method="POST",
            path=_ROUTE,
            headers=[("content-type", "application/json"), (CLIENT_HEADER.lower(), f"chat at {self._node}")],
            body=json.dumps(body).encode(),
        )
        return FarGeneration(self._forwarder, outgoing, target, request.req_id)


def _rank(service: ServiceDocument) -> tuple[bool, str]:
    return (service.status == "online", service.start_time)


class FarGeneration(Answer):
    """One answer of another node; one reader.

    Attributes:
        tokens_in: 0 until the owner tells it, with the answer's end.
        tokens_out: until then the steps that have come, of which one may hold several tokens.
    """

    def __init__(self, forwarder: Forwarder, outgoing: Outgoing, target: ServiceDocument, req_id: str) -> None:
        super().__init__()
        self._forwarder, self._target, self.req_id = forwarder, target, req_id
        self.tokens_in = self.tokens_cached = 0
        self._reason: str | None = None
        self._error: RequestError | None = None
        self._reading = asyncio.create_task(self._read(outgoing), name=f"far-chat-{target.node}")
        self._reading.add_done_callback(self._end)

    def cancel(self) -> None:
        """Reads no more, and tells the owner, which stops. Safe to call at any time and twice."""
        self._reading.cancel()

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    async def _read(self, outgoing: Outgoing) -> None:
        taken = await self._forwarder.send(outgoing, [self._target])
        if isinstance(taken, Refusal):
            raise _refused(taken.body, taken.headers)
        try:
            if taken.status >= 400:
                raise _refused(await taken.body(), taken.headers)
            async with aclosing(_events(taken)) as events:
                async for event in events:
                    self._take(event)
        finally:
            # Not waited for: the user who stops an answer should not wait for the broker.
            self._forwarder.drop(taken)
        if self._reason is None:
            raise NodeLost(self._target.node, "ended its answer before the end")

    def _take(self, event: dict[str, Any]) -> None:
        if isinstance(event.get("error"), dict):
            raise _rebuilt(event["error"])
        usage = event.get("usage") or {}
        if usage:
            self.tokens_in, self.tokens_out = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            self.tokens_cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or {}
            text, reasoning = delta.get("content") or "", delta.get("reasoning") or ""
            if text or reasoning:
                self._last_s = time.perf_counter()
                if self._first_s is None:
                    self._first_s = self._last_s
                self.tokens_out += 1
                self._text.append(text)
                self._reasoning.append(reasoning)
                self._chunks.append(Chunk(self._n_chunks, text, reasoning))
                self._n_chunks += 1
                self._wake()
            self._reason = choice.get("finish_reason") or self._reason

    def _end(self, reading: asyncio.Task[None]) -> None:
        fault = None if reading.cancelled() else reading.exception()
        if isinstance(fault, RequestError):
            self._error = fault
        elif fault is not None:
            self._error = EngineFailed(f"{self._target.node} sent what is no answer: {fault!r}")
        reason = "cancelled" if reading.cancelled() else "error" if fault is not None else self._reason
        duration = round(self.duration_ms)
        self.reply = CompletionReply(
            req_id=self.req_id,
            text="".join(self._text),
            reasoning="".join(self._reasoning) or None,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            tokens_cached=self.tokens_cached,
            finish_reason=cast(FinishReason, reason),
            duration_ms=duration,
            ms=duration,
            error=str(fault) if fault is not None else None,
        )
        self._wake()


async def _events(forwarded: Forwarded) -> AsyncGenerator[dict[str, Any], None]:
    """The events of an answer's stream; raises `NodeLost`. A piece may end anywhere, in a letter too."""
    rest = b""
    async with aclosing(forwarded.pieces()) as pieces:
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                told = line.removeprefix(b"data: ")
                if told != line and told.strip() != b"[DONE]":
                    yield json.loads(told)


def _refused(body: bytes, headers: list[tuple[str, str]]) -> RequestError:
    told = dict(headers)
    figures = {"queue_depth": told.get("x-queue-depth"), "retry_after_s": told.get("retry-after")}
    return _rebuilt(json.loads(body)["error"], {key: int(value) for key, value in figures.items() if value})


def _rebuilt(error: dict[str, Any], figures: Mapping[str, int] = MappingProxyType({})) -> RequestError:
    """The typed error of an answer in OpenAI's shape, with what its headers add."""
    return rebuilt({"code": error.get("code"), "error": error.get("message"), "param": error.get("param"), **figures})
