"""Bytes of a message → a validated native request, and an answer → bytes; pure, so that every malformed input is
tested alone.

Whatever is wrong with a message becomes a `RequestError` whose sentence names the field.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from infsvc.embedding_types import EmbeddingBody
from infsvc.errors import BadRequest, RequestError, TooLarge, shown
from infsvc.openai_types import INERT
from infsvc.subjects import CLIENT_CHARACTERS, CLIENT_HEADER
from infsvc.types import MAX_BODY_BYTES, CancelRequest, CompletionRequest
from infsvc.wire_input import complaint, parse_object

_MAX_SUBJECT = 255
_TOKEN = re.compile(r"[^\s.*>\x00-\x1f\x7f]+")


class AnswerTooLarge(RequestError):
    """The answer does not fit into one message of this broker."""

    status = 500
    code = "answer_too_large"

    def __init__(self, n_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"the answer has {n_bytes} bytes and the broker takes messages of at most {limit_bytes}: ask for fewer "
            "max_tokens, or raise max_payload in the broker's configuration"
        )


def read_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a message, or `BadRequest`, `TooLarge`."""
    if len(data) > MAX_BODY_BYTES:
        raise TooLarge(MAX_BODY_BYTES)
    return parse_object(data, what="message")


def named(body: dict[str, Any], key: str) -> str | None:
    """A field that is needed before, or without, the whole being valid: a non-empty string, else None."""
    value = body.get(key)
    return value if isinstance(value, str) and value else None


def validate(body: dict[str, Any], *, model: str, has_reply: bool) -> CompletionRequest:
    """The native request in a message on this model's subject.

    Args:
        model: the subject's model; the body may repeat it.
        has_reply: whether the message has a reply subject. `reply_to` then gets a copy, which only a `req_id` can name.

    Raises:
        BadRequest: with the field in `param`.
    """
    try:
        request = CompletionRequest.model_validate({key: value for key, value in body.items() if key not in INERT})
    except ValidationError as error:
        raise complaint(error) from None
    check_address(request, model=model, has_reply=has_reply)
    return request


def validate_cancel(body: dict[str, Any]) -> CancelRequest:
    """The request on `inference.cancel`. Raises `BadRequest`."""
    try:
        return CancelRequest.model_validate(body)
    except ValidationError as error:
        raise complaint(error) from None


def check_address(request: CompletionRequest | EmbeddingBody, *, model: str, has_reply: bool) -> None:
    """Refuses a request that names another model, or a `reply_to` where no answer can go; see `validate`."""
    if request.model is not None and request.model != model:
        raise BadRequest(
            f"this subject belongs to {model}, and the message names {shown(request.model)}", param="model"
        )
    if request.reply_to is not None:
        if not is_answerable(request.reply_to):
            raise BadRequest(
                "reply_to is no subject that an answer can be published on: no spaces, wildcards, empty tokens "
                "or a leading $",
                param="reply_to",
            )
        if has_reply and request.req_id is None:
            raise BadRequest("reply_to needs a req_id, so that its reader knows the answer", param="req_id")


def check_client(name: str | None) -> None:
    """Refuses the header that says whose a request is when it is too long."""
    if name is not None and len(name) > CLIENT_CHARACTERS:
        raise BadRequest(
            f"{CLIENT_HEADER} has {len(name)} characters: {CLIENT_CHARACTERS} are allowed", param=CLIENT_HEADER
        )


def is_answerable(subject: str) -> bool:
    """Whether an answer may be published there: literal tokens only, none of the broker's own `$` subjects."""
    return (
        0 < len(subject) <= _MAX_SUBJECT
        and not subject.startswith("$")
        and all(_TOKEN.fullmatch(token) for token in subject.split("."))
    )


def encode(answer: dict[str, Any]) -> bytes:
    """An answer as compact JSON."""
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def encode_final(answer: dict[str, Any], *, limit_bytes: int) -> bytes:
    """An answer that must fit into one message; what does not becomes an `answer_too_large` error."""
    data = encode(answer)
    if len(data) <= limit_bytes:
        return data
    return encode(AnswerTooLarge(len(data), limit_bytes).native(answer.get("req_id")))
