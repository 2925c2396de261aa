"""The shapes on the wire: what a native request, reply, chunk, health document and report look like.

Every door validates with these types and no other; nothing here knows a socket or an engine.
"""

from __future__ import annotations

import math
import secrets
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

MAX_BODY_BYTES = 8 * 2**20
"""The largest request body, over HTTP and NATS."""

MAX_TRACE_CHARACTERS = 200
"""Of a trace id, in a body or a header."""

Priority = Annotated[int, Field(ge=0, le=9)]
"""How urgent a request is: 0, the default, to 9. A higher one is admitted earlier; see `engine.waiting`."""

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]

ReasoningEffort = Literal["low", "medium", "high"]
"""How long a model thinks that knows degrees of it."""


def new_req_id() -> str:
    """An identifier for a request that came without one: 16 hexadecimal digits."""
    return secrets.token_hex(8)


class ModelState(StrEnum):
    """Where a model is in its life."""

    ABSENT = "absent"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    ON_DISK = "on_disk"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"

    @property
    def health_status(self) -> str:
        """The word of the health document for this state."""
        return _HEALTH_STATUS[self]


_HEALTH_STATUS = {
    ModelState.ABSENT: "offline",
    ModelState.DOWNLOADING: "loading",
    ModelState.VERIFYING: "loading",
    ModelState.ON_DISK: "offline",
    ModelState.LOADING: "loading",
    ModelState.READY: "online",
    ModelState.DRAINING: "draining",
    ModelState.FAILED: "failed",
}


class Wire(BaseModel):
    """A wire type that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class Params(Wire):
    """How to sample. Meanings, order and defaults are llama.cpp's, where the contract names no other default."""

    model_config = ConfigDict(strict=True)

    max_tokens: Annotated[int, Field(ge=1)] = 512
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.7
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.95
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 40
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.05
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] = 1.0
    repeat_last_n: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 64
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    logit_bias: Annotated[dict[int, _Bias], Field(max_length=1024)] = {}
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    draft_max: Annotated[int, Field(ge=0, le=15)] | None = None

    @field_validator("logit_bias", mode="before", json_schema_input_type=dict[str, _Bias] | None)
    @classmethod
    def _ids(cls, value: Any) -> Any:
        """JSON's keys are texts, and clients send null for none."""
        if not isinstance(value, dict):
            return {} if value is None else value
        ids = {
            int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key: value[key]
            for key in value
        }
        if len(ids) < len(value):
            raise ValueError("a token id that is named twice")
        return ids

    @property
    def constrained(self) -> bool:
        """Whether a grammar or a schema says what the answer looks like."""
        return self.grammar is not None or self.json_schema is not None

    @field_validator(
        "stop", mode="before", json_schema_input_type=_Stop | Annotated[list[_Stop], Field(max_length=16)] | None
    )
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return (value,) if isinstance(value, str) else () if value is None else value

    @field_validator("stop")
    @classmethod
    def _useful(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > 16 or any(not text or len(text) > 1024 for text in value):
            raise ValueError("at most 16 stop strings of 1 to 1024 characters each")
        return value


class Message(Wire):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class CompletionRequest(Wire):
    """The native request: an `input` text or the `messages` of a chat. Strict: a number in quotes or a true for a 1 is
    refused, not guessed at."""

    model_config = ConfigDict(strict=True)

    messages: tuple[Message, ...] = ()
    req_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    trace_id: Annotated[str, Field(max_length=MAX_TRACE_CHARACTERS)] | None = None
    model: str | None = None
    input: Annotated[str, Field(min_length=1)] | None = Field(default=None, validate_default=True)
    params: Params = Params()
    raw: bool = False
    stream: bool = False
    priority: Priority = 0
    reply_to: Annotated[str, Field(min_length=1, max_length=255)] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("input")
    @classmethod
    def _one_of_both(cls, value: str | None, info: ValidationInfo) -> str | None:
        # "messages" is missing from the data when it is wrong itself, which is then the complaint.
        messages = info.data.get("messages")
        if value is None and messages == ():
            raise PydanticCustomError("missing", "Field required, or messages")
        if value is not None and messages:
            raise PydanticCustomError("both", "give input or messages, not both")
        return value


class CancelRequest(Wire):
    """What `inference.cancel` takes."""

    model_config = ConfigDict(strict=True)

    req_id: Annotated[str, Field(min_length=1, max_length=200)]


class CompletionChunk(Wire):
    """One event of a native stream: the text that one decode step yielded."""

    req_id: str
    index: int
    text: str


class CompletionReply(Wire):
    """The native reply. `ms` is `duration_ms` under its older name. `tokens_drafted` were guessed ahead, and of these
    `tokens_accepted` held; both are missing where nothing was guessed."""

    req_id: str
    text: str
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tokens_in: int
    tokens_out: int
    tokens_cached: int = 0
    tokens_drafted: int | None = None
    tokens_accepted: int | None = None
    finish_reason: FinishReason
    duration_ms: int
    ms: int
    error: str | None = None

    def wire(self) -> dict[str, Any]:
        """The JSON body: what is not there is left out."""
        return self.model_dump(exclude_none=True)


class Capability(StrEnum):
    """What a model can do; each claim is read from the model's file."""

    TEXT_GENERATION = "text-generation"
    EMBEDDINGS = "embeddings"
    REASONING = "reasoning"
    TOOL_CALLING = "tool-calling"
    GRAMMAR_CONSTRAINED = "grammar-constrained"
    RERANKING = "reranking"


class ModelInfoDocument(Wire):
    architecture: str
    modalities: list[str]
    parameter_count: str
    context_size: int
    embedding_size: int
    quantization: str
    model_family: str


class QueueMetrics(Wire):
    pending_messages: int
    active_processing: int
    total_processed: int
    queue_capacity: int
    last_processed_time: str | None


class BackpressureStatus(Wire):
    level: Literal["healthy", "warning", "critical"]
    utilization: float
    threshold: int


class HealthDocument(Wire):
    """What `models.<m>.health` answers, heartbeats carry and `/healthz` and `/api/services` show.

    `monitoring_topic` is where the model's reports go, `worker_count` how many sequences it decodes at once.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_name: str
    status: str
    reason: str | None = None
    progress: float | None = None
    last_activity: str | None
    capabilities: list[str]
    endpoint: str
    nats_topic: str
    monitoring_topic: str = ""
    version: str
    model_info: ModelInfoDocument | None
    queue_metrics: QueueMetrics
    backpressure_status: BackpressureStatus
    worker_count: int | None = None
    node: str
    start_time: str


class BackpressureReport(Wire):
    """What `monitoring.inference.<m>` carries."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_name: str
    pending_messages: int
    active_processing: int
    timestamp: str
    worker_count: int
    queue_capacity: int
    status: Literal["healthy", "warning", "critical"]
    node: str = ""
    tokens_per_s: float = 0.0


class ServiceDocument(HealthDocument):
    """A health document with what an onlooker knows besides: `/api/services`, and the client's `list_models`.

    Attributes:
        first_seen: when the onlooker first heard of the model.
        last_seen: when it last did.
        uptime: nanoseconds since the node's start.
        response_time_ms: how long the last answer of `models.<m>.health` took; None while there was none.
        local: whether the model is the answering node's own.
    """

    first_seen: str
    last_seen: str
    uptime: int
    response_time_ms: float | None = None
    tokens_per_s: float | None = None
    local: bool = False


def backpressure_level(n_waiting: int, *, threshold: int, capacity: int) -> Literal["healthy", "warning", "critical"]:
    """`healthy` below the threshold, `warning` from it, `critical` from twice it or with a full queue."""
    if n_waiting >= capacity or n_waiting >= 2 * threshold:
        return "critical"
    return "warning" if n_waiting >= threshold else "healthy"


def human_count(n: int) -> str:
    """A parameter count as people write it: 268M, 4.0B, 20.9B."""
    if n <= 0:
        return "0"
    exponent = min(int(math.log10(n) // 3), 4)
    value = n / 1000**exponent
    if round(value) >= 1000 and exponent < 4:
        exponent, value = exponent + 1, value / 1000
    unit = ("", "K", "M", "B", "T")[exponent]
    return f"{value:.1f}{unit}" if unit in ("B", "T") or (unit == "M" and value < 10) else f"{value:.0f}{unit}"
