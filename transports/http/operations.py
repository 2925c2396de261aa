"""What each route takes and answers, by types: the table that `openapi` turns into the API's description.

It stands beside the route table in `app` and not in it, so that serving needs none of this; a test holds that every
route has its row. What a route does is its handler's docstring; the words here are only the types' and parameters'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from infsvc import errors
from infsvc.audit import AuditStatus
from infsvc.embedding_types import EmbeddingBody
from infsvc.openai_types import ChatRequest, TextRequest
from infsvc.rerank_types import RerankBody
from infsvc.types import CompletionReply, CompletionRequest
from transports.http import admin, answers, dead_letters, refusals
from transports.http.grammars import GrammarBody, GrammarRoutes

_DONE: tuple[dict[str, Any], ...] = ({"const": "[DONE]"},)
JSON, EVENTS, HTML = "application/json", "text/event-stream", "text/html"

Errors = tuple[type[errors.RequestError], ...]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A query or header parameter, with its JSON Schema."""

    name: str
    schema: Mapping[str, Any]
    says: str
    place: str = "query"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One successful answer.

    Attributes:
        shapes: the JSON body is one of these.
        events: where it may be a stream: what its events' data are.
        last: schemas of data that are no JSON.
        other: media types without a schema.
    """

    shapes: tuple[Any, ...] = ()
    events: tuple[Any, ...] = ()
    last: tuple[dict[str, Any], ...] = ()
    other: tuple[str, ...] = ()
    says: str = "as asked"


_NATIVE = (answers.NativeError,)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one route.

    Attributes:
        bodies: the request body is one of these; none: there is no body.
        errors: what it may refuse with, beside what every route may.
        shaped: which error bodies: native, OpenAI's, or either.
        handler: whose docstring says what it does, where it is not the route's own.
        open: whether it is served without a key.
    """

    tag: str
    answers: Mapping[int, Answer]
    bodies: tuple[Any, ...] = ()
    needs_body: bool = True
    parameters: tuple[Parameter, ...] = ()
    errors: Errors = ()
    shaped: tuple[type, ...] = _NATIVE
    handler: Callable[..., Any] | None = None
    says: str = ""
    open: bool = False


def ok(*shapes: Any, status: int = 200) -> dict[int, Answer]:
    return {status: Answer(shapes=shapes)}


_EVERYWHERE: Errors = (errors.BadRequest, refusals.Forbidden, refusals.Unauthorized, refusals.Internal)
_BODY: Errors = (errors.TooLarge, refusals.WrongMediaType)
_MODEL: Errors = (errors.UnknownModel,)
_RUN: Errors = (
    *_BODY, *_MODEL, errors.QueueFull, errors.EngineFailed, errors.EngineLost, errors.ModelNotLoaded,
    errors.Draining, errors.AuditUnavailable, errors.Cancelled,
)  # fmt: skip
_GENERATE: Errors = (*_RUN, errors.UnknownGrammar, errors.GrammarInvalid, errors.SchemaInvalid)
_QUEUE: Errors = (errors.QueueUnavailable,)
_TRACE = Parameter(
    name="X-Trace-ID", schema={"type": "string", "maxLength": 200}, place="header",
    says="kept in the audit log, where the body names no trace_id",
)  # fmt: skip


def common(operation: Operation) -> Errors:
    """Every error that the operation may answer with."""
    return (*_EVERYWHERE, *operation.errors)


PATH_PARAMETERS: Mapping[str, Parameter] = {
    "model": Parameter(name="model", schema={"type": "string"}, says="a model's name"),
    "name": Parameter(name="name", schema={"type": "string"}, says="<name> or <folder>/<name>"),
    "req_id": Parameter(name="req_id", schema={"type": "string"}, says="a request's id"),
    "id": Parameter(name="id", schema={"type": "integer", "minimum": 1, "maximum": 2**63}, says="a dead letter's"),
}

_PAGE = (
    Parameter(name="model", schema={"type": "string"}, says="of this model only"),
    Parameter(name="after", schema={"type": "integer", "minimum": 0, "maximum": 2**63}, says="behind this id"),
    Parameter(
        name="limit", schema={"type": "integer", "minimum": 1, "maximum": dead_letters.MAX_PAGE}, says="at most so many"
    ),
)
_LOGS = (
    Parameter(name="model", schema={"type": "string"}, says="whose; needed where several models are loaded"),
    Parameter(name="limit", schema={"type": "integer", "minimum": 1, "maximum": admin.MAX_ROWS}, says="how many"),
    Parameter(name="status", schema={"enum": list(get_args(AuditStatus))}, says="only those"),
    Parameter(
        name="since",
        schema={"anyOf": [{"type": "number"}, {"type": "string", "format": "date-time"}]},
        says="seconds since the epoch, or a time",
    ),
)
_FILE = {
    "/dashboard/dashboard.html": HTML,
    "/dashboard/dashboard.css": "text/css",
    "/dashboard/dashboard.js": "text/javascript",
    "/dashboard/icon.svg": "image/svg+xml",
}

OPERATIONS: Mapping[str, Operation] = {
    "POST /v1/completions": Operation(
        tag="inference",
        bodies=(CompletionRequest, TextRequest),
        parameters=(_TRACE,),
        answers={
            200: Answer(
                shapes=(CompletionReply, answers.TextCompletion),
                events=(answers.NativeEvent, answers.TextCompletion, answers.OpenAIError),
                last=_DONE,
            )
        },
        errors=_GENERATE,
        shaped=(answers.NativeError, answers.OpenAIError),
        says="Completes an `input` (the native shape) or a `prompt` (OpenAI's): one of both. A stream when asked.",
    ),
    "POST /v1/chat/completions": Operation(
        tag="inference",
        bodies=(ChatRequest,),
        parameters=(_TRACE,),
        answers={
            200: Answer(shapes=(answers.ChatCompletion,), events=(answers.ChatChunk, answers.OpenAIError), last=_DONE)
        },
        errors=_GENERATE,
        shaped=(answers.OpenAIError,),
        says="OpenAI's chat completion. Native sampling parameters are taken beside OpenAI's.",
    ),
    "POST /v1/embeddings": Operation(
        tag="inference",
        bodies=(EmbeddingBody,),
        parameters=(_TRACE,),
        answers=ok(answers.EmbeddingList),
        errors=(*_RUN, errors.CannotEmbed, errors.TextTooLong),
        shaped=(answers.OpenAIError,),
        says="OpenAI's embeddings.",
    ),
    "POST /v1/rerank": Operation(
        tag="inference",
        bodies=(RerankBody,),
        parameters=(_TRACE,),
        answers=ok(answers.Ranking),
        errors=(*_RUN, errors.CannotEmbed, errors.TextTooLong),
        shaped=(answers.OpenAIError,),
        says="Documents in order of how well they answer a query, by a reranking model: Jina's shape.",
    ),
    "GET /v1/models": Operation(tag="inference", answers=ok(answers.ModelList), shaped=(answers.OpenAIError,)),
    "GET /v1/models/{model}": Operation(
        tag="inference", answers=ok(answers.ModelEntry), errors=_MODEL, shaped=(answers.OpenAIError,)
    ),
    "GET /grammars": Operation(tag="grammars", answers=ok(answers.GrammarList), handler=GrammarRoutes.list),
    "POST /grammars": Operation(
        tag="grammars",
        bodies=(GrammarBody,),
        answers=ok(answers.GrammarFacts, status=201),
        errors=(*_BODY, errors.GrammarConflict, errors.GrammarInvalid, errors.SchemaInvalid),
        handler=GrammarRoutes.create,
    ),
    "GET /grammars/{name}": Operation(
        tag="grammars", answers=ok(answers.Grammar), errors=(errors.UnknownGrammar,), handler=GrammarRoutes.show
    ),
    "PUT /grammars/{name}": Operation(
        tag="grammars",
        bodies=(GrammarBody,),
        answers=ok(answers.GrammarFacts) | ok(answers.GrammarFacts, status=201),
        errors=(*_BODY, errors.GrammarConflict, errors.GrammarInvalid, errors.SchemaInvalid, errors.NotFound),
        handler=GrammarRoutes.replace,
    ),
    "DELETE /grammars/{name}": Operation(
        tag="grammars",
        answers=ok(answers.GrammarDeleted),
        errors=(errors.UnknownGrammar, errors.GrammarConflict),
        handler=GrammarRoutes.delete,
    ),
    "GET /healthz": Operation(
        tag="node",
        answers={
            200: Answer(shapes=(answers.NodeHealth, answers.ModelHealth), says="work is welcome"),
            503: Answer(shapes=(answers.NodeHealth, answers.ModelHealth), says="not yet, or no more: what is missing"),
        },
        open=True,
    ),
    "GET /logs": Operation(
        tag="node", parameters=_LOGS, answers=ok(answers.AuditRows), errors=(*_MODEL, errors.AuditUnavailable)
    ),
    "GET /metrics": Operation(tag="node", answers={200: Answer(other=("text/plain",))}),
    "GET /api/services": Operation(tag="node", answers=ok(answers.ServiceList)),
    "GET /api/services/{model}": Operation(
        tag="node",
        parameters=(Parameter(name="node", schema={"type": "string"}, says="that node's"),),
        answers=ok(answers.Service),
        errors=(*_MODEL, errors.NotFound),
    ),
    "GET /api/events": Operation(tag="node", answers={200: Answer(events=(answers.EventData,))}),
    "GET /api/requests": Operation(tag="node", answers=ok(answers.LiveRequests)),
    "DELETE /api/requests/{req_id}": Operation(
        tag="node", answers=ok(answers.RequestCancelled), errors=(errors.UnknownRequest,)
    ),
    "GET /api/queue": Operation(tag="queue", answers=ok(answers.QueueList)),
    "DELETE /api/queue/{model}": Operation(tag="queue", answers=ok(answers.QueuePurged), errors=(*_MODEL, *_QUEUE)),
    "GET /api/dead": Operation(
        tag="queue", parameters=_PAGE, answers=ok(answers.DeadLetterPage), errors=(*_MODEL, *_QUEUE)
    ),
    "POST /api/dead/{id}/replay": Operation(
        tag="queue",
        bodies=(answers.NoFields,),
        needs_body=False,
        answers=ok(answers.DeadLetterReplayed),
        errors=(*_BODY, *_QUEUE, errors.NotFound, errors.QueueFull),
    ),
    "DELETE /api/dead/{id}": Operation(
        tag="queue", answers=ok(answers.DeadLetterDeleted), errors=(*_QUEUE, errors.NotFound)
    ),
    "POST /api/models/{model}/load": Operation(
        tag="models",
        bodies=(answers.LoadBody,),
        needs_body=False,
        answers=ok(answers.ModelStateAnswer, status=202),
        errors=(*_BODY, *_MODEL, refusals.CannotLoad, errors.Draining),
    ),
    "POST /api/models/{model}/unload": Operation(
        tag="models",
        bodies=(answers.NoFields,),
        needs_body=False,
        answers=ok(answers.ModelStateAnswer),
        errors=(*_BODY, *_MODEL),
    ),
    "POST /api/models/{model}/pull": Operation(
        tag="models",
        bodies=(answers.NoFields,),
        needs_body=False,
        answers=ok(answers.ModelStateAnswer, status=202),
        errors=(*_BODY, *_MODEL, refusals.CannotLoad),
    ),
    "DELETE /api/models/{model}/file": Operation(
        tag="models", answers=ok(answers.FileRemoved), errors=(*_MODEL, refusals.CannotLoad)
    ),
    "GET /": Operation(
        tag="node",
        answers={200: Answer(shapes=(answers.Index,), other=(HTML,))},
        says="What is served here; for a browser, on the gateway, the dashboard.",
        open=True,
    ),
    "GET /openapi.json": Operation(tag="node", answers=ok(dict[str, Any])),
} | {
    f"GET {path}": Operation(
        tag="dashboard", answers={200: Answer(other=(media,))}, says="A file of the dashboard.", open=True
    )
    for path, media in _FILE.items()
}
