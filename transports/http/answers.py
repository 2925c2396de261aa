"""What each route answers, as types: for the API's description alone.

The routes build their answers as plain dicts, which costs nothing; the tests hold these types against what a node says,
field by field, so that neither can drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from engine.counters import EngineCounters
from infsvc.audit import RequestRow
from infsvc.types import Capability, CompletionChunk, CompletionReply, FinishReason, ModelState, ServiceDocument, Wire

GrammarKind = Literal["gbnf", "json_schema"]


class NativeError(Wire):
    """An error in the native shape: a sentence, a word, the status. What follows `param` only some errors have.

    Attributes:
        line, column: where a grammar does not compile, from 1.
        path: where a schema cannot be enforced, as a JSON pointer.
    """

    req_id: str | None
    error: str
    code: str
    status: int
    param: str | None = None
    line: int | None = None
    column: int | None = None
    path: str | None = None
    queue_depth: int | None = None
    retry_after_s: int | None = None


class OpenAIErrorFacts(Wire):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class OpenAIError(Wire):
    """An error in OpenAI's shape."""

    error: OpenAIErrorFacts


class LastEvent(CompletionReply):
    """The last event of a native stream."""

    done: Literal[True]


# -- OpenAI's ------------------------------------------------------------------------------------------------------


class ModelEntry(Wire):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["infsvc"]
    status: ModelState
    context_length: int
    capabilities: list[Capability]
    nodes: list[str]


class ModelList(Wire):
    object: Literal["list"]
    data: list[ModelEntry]


class CachedTokens(Wire):
    cached_tokens: int


class Usage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TokenLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int]


class StepLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Wire):
    content: list[StepLogprobs]
    refusal: None


class CalledFunction(Wire):
    name: str
    arguments: str


class ToolCall(Wire):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Wire):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Wire):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class _Completion(Wire):
    id: str
    created: int
    model: str


class ChatCompletion(_Completion):
    """OpenAI's chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ToolCallDelta(Wire):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Delta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Wire):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(_Completion):
    """One event of a chat's stream; `usage` where `include_usage` asks for it."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(Wire):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Wire):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(_Completion):
    """OpenAI's text completion, and each event of its stream."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class EmbeddingUsage(Wire):
    prompt_tokens: int
    total_tokens: int


class Vector(Wire):
    """`embedding`: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Wire):
    """OpenAI's list of embeddings."""

    object: Literal["list"]
    data: list[Vector]
    model: str
    usage: EmbeddingUsage


class DocumentText(Wire):
    text: str


class RankedDocument(Wire):
    """`index` in the request; `document` where it was asked for."""

    index: int
    relevance_score: float
    document: DocumentText | None = None


class Ranking(Wire):
    """Jina's list of results, the best first."""

    object: Literal["list"]
    model: str
    results: list[RankedDocument]
    usage: EmbeddingUsage


# -- grammars ------------------------------------------------------------------------------------------------------


class GrammarFacts(Wire):
    name: str
    description: str
    kind: GrammarKind
    shipped: bool


class Grammar(GrammarFacts):
    content: str


class GrammarList(Wire):
    grammars: list[GrammarFacts]


class GrammarDeleted(Wire):
    name: str
    deleted: Literal[True]


# -- the node ------------------------------------------------------------------------------------------------------


class StateFacts(Wire):
    """`progress` is a share, 0 to 1."""

    state: ModelState
    reason: str | None = None
    progress: float | None = None


class ModelHealth(StateFacts):
    """What a model's own port says of it; `status` is `ok` when it takes work."""

    status: Literal["ok", "offline", "loading", "draining", "failed"]
    model: str


class BusFacts(Wire):
    status: Literal["starting", "connected", "down", "off"]
    url: str
    reason: str | None = None


class NodeHealth(Wire):
    """What the gateway says of the node."""

    status: Literal["ok", "loading", "draining", "failed"]
    node: str
    models: dict[str, StateFacts]
    bus: BusFacts


@dataclass(frozen=True, kw_only=True)
class AuditRow(RequestRow):
    """One row of a model's audit log."""

    id: int


class AuditRows(Wire):
    rows: list[AuditRow]


class FileFacts(Wire):
    """A model's file, and how far its download is."""

    path: str
    size_bytes: int | None
    source: str | None
    done_bytes: int | None = None
    total_bytes: int | None = None
    bytes_per_s: float | None = None
    eta_s: float | None = None


class Claim(Wire):
    capability: Capability
    present: bool
    evidence: str


@dataclass
class EngineFacts(EngineCounters):
    """What an engine did since it was loaded."""

    mean_batch_sequences: float = 0.0


class Service(ServiceDocument):
    """One model of one node. What follows `local` is told of the answering node's own models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: ModelState | None = None
    file: FileFacts | None = None
    claims: list[Claim] | None = None
    engine: EngineFacts | None = None


class ServiceList(Wire):
    services: list[Service]


class LiveRequest(Wire):
    """`position`: the place among those that wait, from 1; 0 for one that runs."""

    req_id: str
    model: str
    source: str
    state: Literal["running", "waiting"]
    age_ms: int
    tokens_in: int
    tokens_out: int
    position: int


class LiveRequests(Wire):
    requests: list[LiveRequest]


class RequestCancelled(Wire):
    req_id: str
    cancelled: Literal[True]


class QueueFacts(Wire):
    """One model's durable queue. `waiting` and what follows it only where requests are kept; else `reason`."""

    model: str
    subject: str
    stream: str
    capacity: int
    max_age_s: float
    max_deliver: int
    max_ack_pending: int
    durable: bool
    reason: str | None = None
    oldest_s: float | None = None
    waiting: int | None = None
    taken: int | None = None
    redelivered: int | None = None
    spooled: int | None = None
    foreign_streams: list[str] | None = None


class QueueList(Wire):
    queues: list[QueueFacts]


class QueuePurged(Wire):
    model: str
    removed: int


class DeadLetterFacts(Wire):
    """`body`: the request as it came, an object where it was one, else its text."""

    id: int
    model: str
    req_id: str | None
    reason: str
    deliveries: int
    subject: str
    died: str
    body: dict[str, Any] | str


class DeadLetterPage(Wire):
    dead: list[DeadLetterFacts]
    total: int


class DeadLetterReplayed(Wire):
    id: int
    model: str
    req_id: str | None
    replayed: Literal[True]


class DeadLetterDeleted(Wire):
    id: int
    deleted: Literal[True]


class LoadBody(Wire):
    """`force` loads past the memory estimate."""

    force: bool = False


class NoFields(Wire):
    """An object without fields, or no body."""


class ModelStateAnswer(Wire):
    model: str
    state: ModelState


class FileRemoved(Wire):
    model: str
    freed_bytes: int


class Index(Wire):
    service: Literal["infsvc"]
    version: str
    node: str
    model: str | None
    routes: list[str]


class EventData(Wire):
    """The data of one event; the rest of its fields are its type's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Annotated[str, Field(description="model.state, model.progress, request.started and so on")]
    ts: float
    node: str
    model: str | None = None


NativeEvent = CompletionChunk | LastEvent | NativeError
