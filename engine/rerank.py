"""Documents in order of how well they answer a query: each pair becomes one text, and the model's classification head
gives it a score.

A pair is put together as llama-server does it: by the file's template for it, else both texts with the vocabulary's
marks between them. The score is the head's first output as the model computes it, which for most models is a logit and
may be below 0. It runs where embeddings run, and is one to who waits for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.embedding import Embedding
from infsvc.rerank_types import RerankBody
from infsvc.types import new_req_id

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from engine.remote_model import Vocabulary


@dataclass(frozen=True, kw_only=True)
class RerankRequest:
    """A request as its door hands it in.

    Attributes:
        top_n: how many of the best are told; None for all.
        return_documents: whether each is told with its text.
    """

    model: str
    query: str
    documents: tuple[str, ...]
    top_n: int | None = None
    return_documents: bool = False
    req_id: str = field(default_factory=new_req_id)
    trace_id: str | None = None
    source: str = "http"
    reply_to: str | None = None
    priority: int = 0
    queued: bool = False

    @classmethod
    def from_wire(cls, body: RerankBody, *, model: str, source: str, trace_id: str | None = None) -> RerankRequest:
        """From a body; `trace_id` (a header's) counts where the body names none."""
        return cls(
            model=model,
            query=body.query,
            documents=body.documents,
            top_n=body.top_n,
            return_documents=body.return_documents,
            req_id=body.req_id or new_req_id(),
            trace_id=body.trace_id or trace_id,
            source=source,
            priority=body.priority,
        )

    @property
    def raw_input(self) -> str:
        """What the audit log keeps as the input."""
        return json.dumps({"query": self.query, "documents": self.documents}, ensure_ascii=False)

    @property
    def params_json(self) -> str:
        given: dict[str, Any] = {} if self.top_n is None else {"top_n": self.top_n}
        return json.dumps(given | ({"return_documents": True} if self.return_documents else {}))


@dataclass(frozen=True)
class RerankResult:
    """A score for each document, in the order of the request."""

    request: RerankRequest
    scores: npt.NDArray[np.float32]
    tokens_in: int

    def wire(self) -> dict[str, Any]:
        """Jina's answer: the best first, equals in the order of the request."""
        request = self.request
        order = sorted(range(len(self.scores)), key=lambda index: -self.scores[index])
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": float(self.scores[index])} for index in order[: request.top_n]
        ]
        if request.return_documents:
            results = [each | {"document": {"text": request.documents[each["index"]]}} for each in results]
        return {
            "object": "list",
            "model": request.model,
            "results": results,
            "usage": {"prompt_tokens": self.tokens_in, "total_tokens": self.tokens_in},
        }


class Reranking(Embedding):
    """A request for an order that is read, or waits to be."""

    async def order(self) -> RerankResult:
        """Waits for the scores; raises as `Embedding.vectors`."""
        request = self.request
        assert isinstance(request, RerankRequest)
        return RerankResult(request, (await self.vectors())[:, 0], self.tokens_in)


def pairs(query: str, documents: Sequence[str], model: Vocabulary, template: str | None) -> list[list[int]]:
    """Each document with the query, as token ids. Any thread, while the model is open.

    A control token that is spelled in a text stays text. Without a template a document ends with the mark that ends a
    query, which the models were trained with (llama-server leaves it out where the vocabulary is WordPiece).
    """
    if template is not None:
        return [_filled(template, query, document, model) for document in documents]
    begin = [model.bos] if model.adds_bos else []
    end = [model.eos] if model.adds_eos else []
    between = [*end, *([model.sep] if model.adds_sep else [])]
    asked = _plain(query, model)
    return [[*begin, *asked, *between, *_plain(document, model), *(end or between)] for document in documents]


def _plain(text: str, model: Vocabulary) -> list[int]:
    return model.tokenize(text, add_special=False, parse_special=False)


def _filled(template: str, query: str, document: str, model: Vocabulary) -> list[int]:
    """The template's tokens with both texts in it; a token may reach over the border of two."""
    texts = {"{query}": query, "{document}": document}
    parts = re.split(r"(\{query\}|\{document\})", template)
    if all(_plain(text, model) == _marked(text, model) for text in texts.values()):
        return _marked("".join(texts.get(part, part) for part in parts), model)
    return [
        token for part in parts for token in (_plain(texts[part], model) if part in texts else _marked(part, model))
    ]


def _marked(text: str, model: Vocabulary) -> list[int]:
    return model.tokenize(text, add_special=False, parse_special=True)
