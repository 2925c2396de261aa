"""What a request to order documents by a query looks like on the wire: the shape of Jina's API, which llama-server has
too."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, WithJsonSchema, field_validator

from infsvc.embedding_types import MAX_TEXTS
from infsvc.types import Priority, Wire


class DocumentText(Wire):
    """A document as an object."""

    text: str


_DOCUMENTS_SCHEMA = TypeAdapter(
    Annotated[list[str | DocumentText], Field(min_length=1, max_length=MAX_TEXTS)]
).json_schema()
_DOCUMENTS_SCHEMA["items"]["anyOf"][1] = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}
del _DOCUMENTS_SCHEMA["$defs"]


class RerankBody(Wire):
    """The request. `req_id`, `trace_id` and `priority` are this project's; `user`, `metadata` and `store` change
    nothing.

    Attributes:
        documents: texts, or objects with a `text`.
        top_n: how many of the best are told; all when not given.
        return_documents: whether each result has its document.
    """

    model_config = ConfigDict(strict=True)

    model: str | None = None
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[Any, WithJsonSchema(_DOCUMENTS_SCHEMA)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    user: Any = None
    metadata: Any = None
    store: Any = None
    req_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    trace_id: Annotated[str, Field(max_length=200)] | None = None
    priority: Priority = 0

    @field_validator("documents")
    @classmethod
    def _texts(cls, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError("a list of at least one text")
        if len(value) > MAX_TEXTS:
            raise ValueError(f"{len(value)} documents; one request may have {MAX_TEXTS}")
        texts = []
        for index, item in enumerate(value):
            text = item.get("text") if isinstance(item, dict) and item.keys() == {"text"} else item
            if not isinstance(text, str):
                raise ValueError(f'document {index} is no text, and no object with a text alone ({{"text": "…"}})')
            texts.append(text)
        return tuple(texts)
