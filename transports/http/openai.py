"""OpenAI's shapes: `/v1/chat/completions`, `/v1/completions` with a `prompt`, `/v1/models`.

A request of several choices or prompts becomes as many requests to the service, which share what they begin with; all
end when the client goes. What a request means is the service's; this file knows bodies, choices and frames.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from engine.answer import Chunk
from engine.generation import Generation
from engine.logprobs import StepLogprobs, TokenLogprob
from engine.service import InferenceRequest
from engine.tool_calls import call_schema
from infsvc.errors import BadRequest, ClientGone, RequestError, UnknownModel, Unsupported
from infsvc.openai_types import UNBOUNDED, ChatRequest, TextRequest, split
from infsvc.types import CompletionReply, ModelState, Params, new_req_id
from infsvc.wire_input import complaint
from transports.http.body import query, read_object
from transports.http.callers import caller
from transports.http.choice import ModelChoice
from transports.http.native import QUIET_S, trace_header
from transports.http.refusals import Internal, Json
from transports.http.streams import EventStream, comment, data, present

if TYPE_CHECKING:
    from transports.node import Node

log = logging.getLogger("infsvc.http")

_TEXT_MAX_TOKENS = 16
"""OpenAI's default for text completions."""

_SENT = {f"params.{name}": name for name in Params.model_fields} | {"think": "chat_template_kwargs.enable_thinking"}
"""The native names in errors, as OpenAI's bodies have them."""

_MAX_SEED = 2**32 - 1
_DONE = b"data: [DONE]\n\n"

Shape = TypeVar("Shape", bound=BaseModel)


class OpenAI:
    """The routes in OpenAI's shape.

    Args:
        choice: finds the model that a request is for.
    """

    def __init__(self, node: Node, choice: ModelChoice) -> None:
        self._node, self._choice = node, choice

    async def models(self, request: Request) -> Json:
        """`GET /v1/models`: what is loaded here, on the gateway also what is online on other nodes; or this port's
        model."""
        query(request)
        workers, only = self._node.fleet.workers.values(), self._choice.model
        listed = {each.name: self._entry(each.name) for each in workers if each.asked and only in (None, each.name)}
        for model in sorted({each.model_name for each in self._choice.elsewhere()}):
            if model not in listed or listed[model]["status"] != "ready":
                listed[model] = self._entry_elsewhere(model)
        return Json({"object": "list", "data": list(listed.values())})

    async def one_model(self, request: Request) -> Json:
        """`GET /v1/models/<m>`: one model, loaded or not."""
        query(request)
        name = request.path_params["model"]
        if self._choice.model not in (None, name):
            raise UnknownModel(name, [self._choice.model or ""])
        worker = self._node.fleet.workers.get(name)
        if (worker is None or worker.state is not ModelState.READY) and any(self._choice.elsewhere(name)):
            return Json(self._entry_elsewhere(name))
        return Json(self._entry(self._node.fleet.get(name).name))

    def _entry(self, name: str) -> dict[str, Any]:
        worker = self._node.fleet.get(name)
        own = [self._node.name] if worker.state is ModelState.READY else []
        return {
            "id": name,
            "object": "model",
            "created": int(datetime.fromisoformat(self._node.start_time).timestamp()),
            "owned_by": "infsvc",
            "status": worker.state.value,
            "context_length": worker.n_ctx,
            "capabilities": [claim.capability.value for claim in worker.claims if claim.present],
            "nodes": own + [each.node for each in self._choice.elsewhere(name)],
        }

    def _entry_elsewhere(self, name: str) -> dict[str, Any]:
        found = self._choice.elsewhere(name)
        first = found[0]
        return {
            "id": name,
            "object": "model",
            "created": _seconds(first.start_time),
            "owned_by": "infsvc",
            "status": ModelState.READY.value,
            "context_length": first.model_info.context_size if first.model_info else 0,
            "capabilities": first.capabilities,
            "nodes": [each.node for each in found],
        }

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`: OpenAI's chat completion, whole or as a stream."""
        query(request)
        own, sampling = split(await read_object(request), max_tokens=UNBOUNDED)
        asked = _validated(ChatRequest, own)
        schema = asked.response_format.schema if asked.response_format else None
        forced = asked.forced_tools
        n_constraints = (schema is not None) + bool(forced) + ("json_schema" in sampling or "grammar" in sampling)
        if n_constraints > 1:
            raise BadRequest(
                "response_format, a grammar and a forced tool exclude each other",
                param="response_format" if schema is not None else "tool_choice",
            )
        sent = dict(_SENT) | {"input": "messages", "raw": "messages"}
        if schema is not None or forced:
            sampling["json_schema"] = call_schema(forced) if forced else schema
            sent["params.json_schema"] = "tools" if forced else "response_format"
        if asked.reasoning_effort is not None and "enable_thinking" not in asked.chat_template_kwargs:
            sent["think"] = "reasoning_effort"
        if asked.parallel_tool_calls is False and asked.tools:
            raise Unsupported("parallel_tool_calls", "false is not; take the first call")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        offered = [] if asked.tool_choice == "none" else asked.tools
        base = InferenceRequest(
            model=self._choice.of(asked.model),
            params=_params(sampling),
            messages=asked.messages,
            think=asked.think,
            effort=asked.effort,
            tools=tuple(tool.model_dump(exclude_none=True) for tool in offered),
            one_call=bool(forced),
            n_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            req_id=asked.req_id or new_req_id(),
            trace_id=trace_header(request),
            priority=asked.priority,
            client=caller(request),
        )
        shape = _Chat(base.req_id, base.model, logprobs=asked.logprobs)
        with _as_sent(sent):
            return await self._answer(request, _choices(base, asked.n), shape, asked.stream, asked.include_usage)

    async def text(self, request: Request, body: dict[str, Any]) -> Response:
        """`POST /v1/completions` with a `prompt`."""
        own, sampling = split(body, max_tokens=_TEXT_MAX_TOKENS)
        asked = _validated(TextRequest, own)
        if asked.best_of not in (None, asked.n):
            raise Unsupported("best_of", "ask for n")
        base = InferenceRequest(
            model=self._choice.of(asked.model),
            params=_params(sampling),
            plain=True,
            n_logprobs=asked.logprobs,
            req_id=asked.req_id or new_req_id(),
            trace_id=trace_header(request),
            priority=asked.priority,
            client=caller(request),
        )
        all_choices: list[InferenceRequest] = []
        for prompt in asked.prompts:
            one = replace(base, input=prompt) if isinstance(prompt, str) else replace(base, tokens=prompt)
            all_choices += _choices(one, asked.n, begin=len(all_choices))
        shape = _Text(base.req_id, base.model, logprobs=asked.logprobs is not None)
        with _as_sent(dict(_SENT) | {"input": "prompt"}):
            return await self._answer(request, all_choices, shape, asked.stream, asked.include_usage)

    async def _answer(
        self, request: Request, asked: Sequence[InferenceRequest], shape: _Shape, stream: bool, include_usage: bool
    ) -> Response:
        if stream:
            generations = await self._submit(asked)
            return EventStream(
                _frames(generations, shape, include_usage=include_usage),
                stop=lambda: _cancel(generations),
                quiet=comment("waiting"),
                quiet_s=QUIET_S,
            )
        async with present(request.receive) as client, AsyncExitStack() as running:
            generations = await self._submit(asked)
            running.callback(_cancel, generations)
            client.when_gone(lambda: _cancel(generations))
            replies = [await generation.result() for generation in generations]
            gone = client.gone
        if gone:
            raise ClientGone("the client went away before its answer was ready")
        choices = [
            shape.choice(index, each, reply)
            for index, (each, reply) in enumerate(zip(generations, replies, strict=True))
        ]
        return Json(shape.envelope(shape.whole) | {"choices": choices, "usage": _usage(replies)})

    async def _submit(self, asked: Sequence[InferenceRequest]) -> list[Generation]:
        """All of them, or none: where one is refused, those before it end."""
        generations: list[Generation] = []
        try:
            for each in asked:
                generations.append(await self._node.service.submit(each))
        except BaseException:
            _cancel(generations)
            raise
        return generations


def _seconds(timestamp: str) -> int:
    """Another node's time, in seconds since the epoch; 0 when it is none."""
    try:
        return int(datetime.fromisoformat(timestamp).timestamp())
    except (ValueError, OverflowError):
        return 0


def _validated(shape: type[Shape], own: dict[str, Any]) -> Shape:
    try:
        return shape.model_validate(own)
    except ValidationError as error:
        raise complaint(error) from None


@contextmanager
def _as_sent(sent: Mapping[str, str]) -> Iterator[None]:
    """An error names the field that the client sent, where the service knows it by its native name."""
    try:
        yield
    except RequestError as error:
        error.param = sent.get(error.param or "", error.param)
        raise


def _params(sampling: dict[str, Any]) -> Params:
    if "grammar" in sampling and "json_schema" in sampling:
        raise BadRequest("grammar and json_schema exclude each other", param="json_schema")
    try:
        return Params.model_validate(sampling)
    except ValidationError as error:
        raise complaint(error) from None


def _choices(base: InferenceRequest, n: int, *, begin: int = 0) -> list[InferenceRequest]:
    """`n` requests alike, each with an id and, where one is asked for, a seed of its own."""
    seed = base.params.seed
    choices = []
    for index in range(n):
        params = base.params
        if seed is not None and index:
            params = params.model_copy(update={"seed": (seed + index) % _MAX_SEED})
        at = begin + index
        choices.append(replace(base, params=params, req_id=base.req_id if not at else f"{base.req_id}-{at}"))
    return choices


def _cancel(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.cancel()


def _usage(replies: Sequence[CompletionReply]) -> dict[str, Any]:
    tokens_in, tokens_out = sum(each.tokens_in for each in replies), sum(each.tokens_out for each in replies)
    return {
        "prompt_tokens": tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
        "prompt_tokens_details": {"cached_tokens": sum(each.tokens_cached for each in replies)},
    }


class _Shape:
    """How one kind of answer is framed."""

    whole, part, prefix = "", "", ""

    def __init__(self, req_id: str, model: str, *, logprobs: bool) -> None:
        self._id, self._model, self._logprobs = f"{self.prefix}-{req_id}", model, logprobs
        self._created = int(time.time())

    def envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def choice(self, index: int, generation: Generation, reply: CompletionReply) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def opening(self) -> dict[str, Any] | None:
        """What a choice's first event says before there is any text."""
        return None

    def piece(self, index: int, chunk: Chunk, n_calls: int) -> dict[str, Any]:
        """A part of a choice; `n_calls` calls came before it."""
        raise NotImplementedError

    def end(self, index: int, reason: str) -> dict[str, Any]:
        """The last part of a choice."""
        raise NotImplementedError


class _Chat(_Shape):
    whole, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, generation: Generation, reply: CompletionReply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text or (None if reply.tool_calls else "")}
        if reply.reasoning:
            message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
        if reply.tool_calls:
            message["tool_calls"] = reply.tool_calls
        told = _chat_logprobs(generation.logprobs) if self._logprobs else None
        return {"index": index, "message": message, "logprobs": told, "finish_reason": reply.finish_reason}

    def opening(self) -> dict[str, Any] | None:
        return {"role": "assistant", "content": ""}

    def piece(self, index: int, chunk: Chunk, n_calls: int) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if chunk.reasoning:
            delta |= {"reasoning_content": chunk.reasoning, "reasoning": chunk.reasoning}
        if chunk.text:
            delta["content"] = chunk.text
        if chunk.tool_calls:
            delta["tool_calls"] = [{"index": n_calls + at} | call.wire() for at, call in enumerate(chunk.tool_calls)]
        told = _chat_logprobs(chunk.logprobs) if self._logprobs else None
        return {"index": index, "delta": delta, "logprobs": told, "finish_reason": None}

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}


class _Text(_Shape):
    whole, part, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, index: int, generation: Generation, reply: CompletionReply) -> dict[str, Any]:
        told = _text_logprobs(generation.logprobs) if self._logprobs else None
        return {"index": index, "text": reply.text, "logprobs": told, "finish_reason": reply.finish_reason}

    def piece(self, index: int, chunk: Chunk, n_calls: int) -> dict[str, Any]:
        told = _text_logprobs(chunk.logprobs) if self._logprobs else None
        return {"index": index, "text": chunk.text, "logprobs": told, "finish_reason": None}

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}


def _spelled(piece: bytes) -> str:
    return piece.decode("utf-8", errors="replace")


def _chat_logprobs(steps: Sequence[StepLogprobs]) -> dict[str, Any]:
    def entry(each: TokenLogprob) -> dict[str, Any]:
        return {"token": _spelled(each.piece), "logprob": each.logprob, "bytes": list(each.piece)}

    return {
        "content": [entry(step.drawn) | {"top_logprobs": [entry(each) for each in step.top]} for step in steps],
        "refusal": None,
    }


def _text_logprobs(steps: Sequence[StepLogprobs]) -> dict[str, Any]:
    offsets, at = [], 0
    for step in steps:
        offsets.append(at)
        at += len(_spelled(step.drawn.piece))
    return {
        "tokens": [_spelled(step.drawn.piece) for step in steps],
        "token_logprobs": [step.drawn.logprob for step in steps],
        "top_logprobs": [{_spelled(each.piece): each.logprob for each in step.top} for step in steps],
        "text_offset": offsets,
    }


async def _frames(
    generations: Sequence[Generation], shape: _Shape, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Events of all choices as they come, then the usage where it is asked for, then `[DONE]`."""
    envelope = shape.envelope(shape.part) | ({"usage": None} if include_usage else {})
    choices = [_parts(index, each, shape) for index, each in enumerate(generations)]
    async with aclosing(choices[0] if len(choices) == 1 else _merged(choices)) as parts:
        failed = False
        async for part in parts:
            failed = failed or "error" in part
            yield data(part if "error" in part else envelope | {"choices": [part]})
    if failed:
        return
    if include_usage:
        replies = [each.reply for each in generations if each.reply is not None]
        yield data(envelope | {"choices": [], "usage": _usage(replies)})
    yield _DONE


async def _parts(index: int, generation: Generation, shape: _Shape) -> AsyncGenerator[dict[str, Any], None]:
    """One choice's parts in order; an error in their place is its last."""
    n_calls = 0
    try:
        if (opening := shape.opening()) is not None:
            yield {"index": index, "delta": opening, "logprobs": None, "finish_reason": None}
        async for chunk in generation:
            yield shape.piece(index, chunk, n_calls)
            n_calls += len(chunk.tool_calls)
        reply = await generation.result()
        yield shape.end(index, reply.finish_reason)
    except RequestError as error:
        yield error.openai()
    except Exception:
        log.exception(
            "a stream failed",
            extra={"code": "http.failed", "meta": {"req_id": generation.req_id}, "model": generation.model},
        )
        yield Internal().openai()


async def _merged(choices: Sequence[AsyncGenerator[dict[str, Any], None]]) -> AsyncGenerator[dict[str, Any], None]:
    """The parts of several choices as they come; those of one in its order."""
    parts: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def follow(choice: AsyncGenerator[dict[str, Any], None]) -> None:
        try:
            async with aclosing(choice):
                async for part in choice:
                    parts.put_nowait(part)
        finally:
            parts.put_nowait(None)

    followers = [
        asyncio.create_task(follow(choice), name=f"http-choice-{index}") for index, choice in enumerate(choices)
    ]
    try:
        n_left = len(followers)
        while n_left:
            part = await parts.get()
            if part is None:
                n_left -= 1
            else:
                yield part
    finally:
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
