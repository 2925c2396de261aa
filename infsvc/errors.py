"""Everything that can go wrong in words a user can act on, and what each door answers.

    InfsvcError
    ├── ConfigError              a worker file or a setting is wrong: file, line, key
    ├── HomeError                the home folder cannot be used or is another node's
    ├── StartError               a port is taken, a broker does not start
    ├── ClientError              a client has no answer
    │   ├── Unreachable          no broker, no node, or nobody listens on the subject
    │   └── NoAnswer             nothing came within the time-out
    ├── LlamaError               a call that llama.cpp would have answered with an abort
    ├── StateFileError           a saved state is damaged or another's; it is removed, and its prompt read anew
    ├── LoadError                a model file cannot become a running model
    │   ├── ModelFileError       missing, truncated, not a GGUF
    │   ├── MemoryFitError       would not fit into memory
    │   └── DownloadError        its file cannot be fetched
    │       ├── NoSource         the worker file names no place to fetch it from
    │       ├── DiskFull         needs more room than the disk has
    │       └── DownloadStopped  someone stopped it; what has come is kept
    └── RequestError             one request cannot be served; has a code and a status
        ├── BadRequest           400
        │   ├── ContextLengthExceeded
        │   │   └── TextTooLong  a text to embed; never cut
        │   └── Unsupported      a field that changes meaning and is not supported
        ├── UnknownModel         404
        ├── UnknownRequest       404
        ├── UnknownGrammar       404
        ├── NotFound             404
        ├── MethodNotAllowed     405
        ├── Conflict             409   a req_id that belongs to another body
        ├── Removed              410   an operator took it out of the queue
        ├── GrammarConflict      409   a name that is taken, or a grammar that ships
        ├── TooLarge             413
        ├── ConstraintError      422  what an answer should be constrained to cannot be
        │   ├── GrammarInvalid   line and column
        │   └── SchemaInvalid    the path in the schema
        ├── QueueFull            429
        ├── ClientGone           499
        ├── Cancelled            499
        ├── EngineFailed         500
        │   └── EngineLost       503   its process is gone, and started again
        ├── GivenUp              500   tried too often, kept as a dead letter
        ├── NodeLost             502   the node that a request was forwarded to is gone
        ├── ModelNotLoaded       503
        ├── CannotEmbed          503
        ├── Draining             503
        ├── QueueUnavailable     503   the durable queue: switched off, full disk, no broker
        ├── AuditUnavailable     503
        └── DeadlineExceeded     504

A `RequestError` makes its own sentence and knows its `code` (a word) and `status` (HTTP's number, used over NATS too).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal


def human_bytes(n_bytes: float) -> str:
    """A size as people write it: 812 B, 3.4 MiB, 11.3 GiB."""
    value, unit = float(n_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


_SHOWN_CHARACTERS = 120


def shown(text: str) -> str:
    """Client text as it may stand in an error: short, and without what a terminal or UTF-8 would stumble over."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return clean if len(clean) <= _SHOWN_CHARACTERS else clean[: _SHOWN_CHARACTERS - 1] + "…"


class InfsvcError(Exception):
    """The root. `str(error)` is a sentence that says what, where and what to do."""


class ConfigError(InfsvcError):
    """A worker file or an environment setting is wrong."""

    def __init__(
        self, message: str, *, file: str | None = None, line: int | None = None, key: str | None = None
    ) -> None:
        self.file, self.line, self.key = file, line, key
        where = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(": ".join(part for part in (where, shown(key or ""), message) if part))


class HomeError(InfsvcError):
    """The home folder cannot be written, or another node owns it."""


class StartError(InfsvcError):
    """The node could not start one of its parts."""


class ClientError(InfsvcError):
    """A client has no answer; whether the request was executed is not known."""


class Unreachable(ClientError):
    """No broker or node answers at the URL, or nobody listens on the subject."""


class NoAnswer(ClientError):
    """Nothing came within the time-out."""


class LlamaError(InfsvcError):
    """A call that llama.cpp would have answered with an abort, or did answer with a failure."""


class StateFileError(InfsvcError):
    """A file of a prompt's state is cut off, damaged, or of another model, context or build."""


class LoadError(InfsvcError):
    """A model could not be loaded; the sentence is the reason shown beside its `failed` state."""


class ModelFileError(LoadError):
    """The model file is missing, truncated or no GGUF."""


class MemoryFitError(LoadError):
    """The model would not fit into memory."""

    def __init__(self, *, needed_bytes: int, free_bytes: int, parts: str) -> None:
        self.needed_bytes, self.free_bytes = needed_bytes, free_bytes
        super().__init__(
            f"needs {needed_bytes / 2**30:.1f} GiB ({parts}) and {free_bytes / 2**30:.1f} GiB are free: "
            "lower CTX_SIZE or WORKER_CONCURRENCY, unload another model, or load with force"
        )


class DownloadError(LoadError):
    """A model's file cannot be fetched; the sentence is the reason shown beside its `failed` state."""


class NoSource(DownloadError):
    """The file is absent and the worker file does not say where it comes from."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{path} is missing, and the worker file names no source: put the file there, "
            "or set MODEL_REPO and MODEL_FILE, or MODEL_URL"
        )


class DiskFull(DownloadError):
    """A download needs more room than its disk has."""

    def __init__(self, *, folder: str, needed_bytes: int, free_bytes: int) -> None:
        self.folder, self.needed_bytes, self.free_bytes = folder, needed_bytes, free_bytes
        super().__init__(
            f"{human_bytes(needed_bytes)} are still to come and {human_bytes(free_bytes)} are free in {folder}: "
            "make room and pull again, or name a path on another disk with MODEL_PATH"
        )


class DownloadStopped(DownloadError):
    """Someone stopped the download."""

    def __init__(self) -> None:
        super().__init__("the download was stopped; what has come is kept for the next one")


class RequestError(InfsvcError):
    """One request cannot be served."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)

    @property
    def headers(self) -> dict[str, str]:
        """Extra HTTP headers of the answer."""
        return {}

    def native(self, req_id: str | None) -> dict[str, Any]:
        """The body of a native error answer, over HTTP and NATS."""
        body: dict[str, Any] = {"req_id": req_id, "error": str(self), "code": self.code, "status": self.status}
        if self.param is not None:
            body["param"] = self.param
        return body

    def openai(self) -> dict[str, Any]:
        """The body of an error answer in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def rebuilt(body: Mapping[str, Any]) -> RequestError:
    """The error that a native error answer tells of, for whoever reads answers.

    A code that this version does not know becomes a `RequestError` with that code and status, so that
    `except RequestError` catches whatever a node may say.
    """
    code, status = str(body.get("code") or "error"), body.get("status")
    kind = _kinds().get(code)
    if kind is None:
        kind = _foreign(code, status if isinstance(status, int) else 500)
    error = kind.__new__(kind)
    param = body.get("param")
    # Not the class's own constructor, which would make the sentence anew from figures that the answer lacks.
    RequestError.__init__(error, str(body.get("error") or code), param=param if isinstance(param, str) else None)
    if isinstance(error, QueueFull):
        error.n_waiting = error.capacity = _number(body.get("queue_depth"))
        error.retry_after_s = _number(body.get("retry_after_s")) or 1
    elif isinstance(error, ModelNotLoaded):
        error.model = error.state = ""
    elif isinstance(error, NodeLost):
        error.node = ""
    elif isinstance(error, EngineLost):
        error.model = error.why = ""
    return error


def _kinds() -> dict[str, type[RequestError]]:
    found: dict[str, type[RequestError]] = {}
    open_kinds: list[type[RequestError]] = [RequestError]
    while open_kinds:
        kind = open_kinds.pop()
        open_kinds += kind.__subclasses__()
        if "code" in vars(kind) and kind.__module__ == __name__:
            found[kind.code] = kind
    return found


@lru_cache(maxsize=256)
def _foreign(code: str, status: int) -> type[RequestError]:
    return type("RequestError", (RequestError,), {"code": code, "status": status, "__module__": "infsvc"})


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


class BadRequest(RequestError):
    status = 400
    code = "bad_request"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"

    def __init__(self, *, n_prompt_tokens: int, n_ctx: int) -> None:
        self.n_prompt_tokens, self.n_ctx = n_prompt_tokens, n_ctx
        super().__init__(
            f"the prompt has {n_prompt_tokens} tokens and the context of one sequence is {n_ctx} tokens, "
            "one of them for the answer: shorten the input or raise CTX_SIZE",
            param="input",
        )


class TextTooLong(ContextLengthExceeded):
    """A text to embed, or a document with its query, has more tokens than the model reads at once."""

    def __init__(
        self,
        *,
        index: int,
        n_prompt_tokens: int,
        n_ctx: int,
        n_ctx_train: int,
        what: Literal["input", "document"] = "input",
    ) -> None:
        self.index, self.n_prompt_tokens, self.n_ctx = index, n_prompt_tokens, n_ctx
        mend = "shorten or split it" if n_ctx >= n_ctx_train else "shorten or split it, or raise CTX_SIZE"
        told = f"input {index}" if what == "input" else f"document {index}, with the query,"
        param = "input" if what == "input" else "documents"
        RequestError.__init__(
            self, f"{told} has {n_prompt_tokens} tokens and one text may have {n_ctx}: {mend}", param=param
        )


class Unsupported(BadRequest):
    code = "unsupported"

    def __init__(self, param: str, hint: str = "") -> None:
        super().__init__(f"{param} is not supported{': ' + hint if hint else ''}", param=param)


class UnknownModel(RequestError):
    status = 404
    code = "model_not_found"

    def __init__(self, model: str, known: list[str]) -> None:
        self.model = model
        super().__init__(f"no model {shown(model)!r}; there are: {', '.join(known) or 'none'}", param="model")


class UnknownRequest(RequestError):
    status = 404
    code = "request_not_found"


class UnknownGrammar(RequestError):
    status = 404
    code = "grammar_not_found"

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"no grammar {shown(name)!r} is stored: GET /grammars lists them; "
            "a text with ::= is taken as a grammar itself"
        )


class NotFound(RequestError):
    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class GrammarConflict(RequestError):
    status = 409
    code = "grammar_conflict"


class TooLarge(RequestError):
    status = 413
    code = "too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the body is larger than {limit_bytes / 2**20:.0f} MiB")


class ConstraintError(RequestError):
    """A grammar or schema that no answer can be constrained to."""

    status = 422
    code = "constraint_invalid"


class GrammarInvalid(ConstraintError):
    """A grammar that does not compile. `line` and `column` count from 1; None where it is the grammar as a whole."""

    code = "grammar_invalid"

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None) -> None:
        self.line, self.column = line, column
        super().__init__(message)

    def native(self, req_id: str | None) -> dict[str, Any]:
        place = {} if self.line is None else {"line": self.line, "column": self.column}
        return super().native(req_id) | place


class SchemaInvalid(ConstraintError):
    """A JSON Schema that cannot be enforced in full. `path` is a JSON pointer, as in `#/properties/age`."""

    code = "schema_invalid"

    def __init__(self, message: str, *, path: str) -> None:
        self.path = path
        super().__init__(f"{path}: {message}")

    def native(self, req_id: str | None) -> dict[str, Any]:
        return super().native(req_id) | {"path": self.path}


class QueueFull(RequestError):
    status = 429
    code = "queue_full"

    def __init__(self, *, model: str, n_waiting: int, capacity: int, retry_after_s: int) -> None:
        self.n_waiting, self.capacity, self.retry_after_s = n_waiting, capacity, retry_after_s
        super().__init__(
            f"{model} has {n_waiting} requests waiting and room for {capacity}: try again in {retry_after_s} s"
        )

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s), "X-Queue-Depth": str(self.n_waiting)}

    def native(self, req_id: str | None) -> dict[str, Any]:
        return super().native(req_id) | {"queue_depth": self.n_waiting, "retry_after_s": self.retry_after_s}


class Conflict(RequestError):
    status = 409
    code = "req_id_conflict"

    def __init__(self, req_id: str) -> None:
        self.req_id = req_id
        super().__init__(
            f"req_id {shown(req_id)} belongs to another request of the last minutes, with another body: "
            "use a new req_id",
            param="req_id",
        )


class ClientGone(RequestError):
    status = 499
    code = "client_gone"


class Removed(RequestError):
    status = 410
    code = "removed"


class GivenUp(RequestError):
    status = 500
    code = "dead_letter"


class Cancelled(RequestError):
    """Someone cancelled it, and a part of its answer is of no use."""

    status = 499
    code = "cancelled"


class EngineFailed(RequestError):
    status = 500
    code = "engine_failed"


class EngineLost(EngineFailed):
    """The process that a model runs in has ended, and this request with it."""

    status = 503
    code = "engine_lost"

    def __init__(self, model: str, why: str) -> None:
        self.model, self.why = model, why
        super().__init__(f"the process that {model} runs in is gone ({why}): ask again, it is started anew")

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "2"}


class NodeLost(RequestError):
    """The node that a request was forwarded to does not answer, or went in the middle of its answer."""

    status = 502
    code = "node_lost"

    def __init__(self, node: str, why: str) -> None:
        self.node = node
        super().__init__(f"{node}, which serves the model, {why}: ask again")

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class ModelNotLoaded(RequestError):
    status = 503
    code = "model_not_loaded"

    def __init__(self, model: str, state: str, reason: str | None = None) -> None:
        self.model, self.state = model, state
        hint = f" ({reason})" if reason else ""
        super().__init__(
            f"{model} is {state}{hint}: load it with POST /api/models/{model}/load or on the screen", param="model"
        )

    @property
    def headers(self) -> dict[str, str]:
        seconds = {"loading": "2", "downloading": "10", "verifying": "5"}.get(self.state)
        return {"Retry-After": seconds} if seconds else {}


class CannotEmbed(RequestError):
    """The model runs, but what it needs to embed cannot be had."""

    status = 503
    code = "cannot_embed"


class Draining(RequestError):
    status = 503
    code = "draining"

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "5"}


class QueueUnavailable(RequestError):
    status = 503
    code = "queue_unavailable"

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "5"}


class AuditUnavailable(RequestError):
    status = 503
    code = "audit_unavailable"


class DeadlineExceeded(RequestError):
    status = 504
    code = "deadline_exceeded"
