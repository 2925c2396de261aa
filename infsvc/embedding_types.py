"""What a request for embeddings and its answer look like on the wire: OpenAI's shape, over HTTP and NATS alike."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, WithJsonSchema, field_validator

from infsvc.errors import shown
from infsvc.types import Priority, Wire

MAX_TEXTS = 2048
"""Texts in one request, as in OpenAI's API."""

EmbeddingInput = str | list[str] | list[list[int]]
"""A text, several, or several lists of token ids."""


_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
_MANY = Field(min_length=1, max_length=MAX_TEXTS)
_INPUT_SCHEMA = TypeAdapter(_Text | Annotated[list[_Text], _MANY] | _Ids | Annotated[list[_Ids], _MANY]).json_schema()


class EmbeddingBody(Wire):
    """The request. `req_id`, `trace_id`, `priority` and `reply_to` are this project's; `user`, `metadata` and `store`
    change nothing."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    req_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    trace_id: Annotated[str, Field(max_length=200)] | None = None
    priority: Priority = 0
    reply_to: Annotated[str, Field(min_length=1, max_length=255)] | None = None

    @field_validator("input")
    @classmethod
    def _texts(cls, value: Any) -> EmbeddingInput:
        """One list of token ids becomes a list of one such list."""
        if isinstance(value, str):
            if not value:
                raise ValueError("an empty text has nothing to embed")
            return value
        if not isinstance(value, list):
            raise ValueError(f"a text, a list of texts, or token ids, not {_kind(value)}")
        if not value:
            raise ValueError("an empty list has nothing to embed")
        if all(_is_id(item) for item in value):
            return [_ids(value, "the list")]
        if len(value) > MAX_TEXTS:
            raise ValueError(f"{len(value)} texts; one request may have {MAX_TEXTS}")
        if all(isinstance(item, str) for item in value):
            for index, item in enumerate(value):
                if not item:
                    raise ValueError(f"text {index} is empty and has nothing to embed")
            return value
        if all(isinstance(item, list) for item in value):
            return [_ids(item, f"item {index}") for index, item in enumerate(value)]
        first = _kind(value[0])
        index, other = next(
            ((index, _kind(item)) for index, item in enumerate(value) if _kind(item) != first), (0, first)
        )
        raise ValueError(f"all texts, all token ids or all lists of token ids; item {index} is {other}")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(value: list[Any], what: str) -> list[int]:
    if not value:
        raise ValueError(f"{what} is an empty list of token ids")
    for item in value:
        if not _is_id(item):
            raise ValueError(f"{what} holds {_kind(item)} among its token ids")
        if not 0 <= item < 2**31:
            raise ValueError(f"{what} holds the token id {shown(str(item))}, and ids go from 0 to {2**31 - 1}")
    return value


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a text"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return "a number"
