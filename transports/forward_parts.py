"""A forwarded HTTP request as NATS messages: which parts there are, and how each is marked.

| part | to | is |
|---|---|---|
| `open` | owner | method, path and headers, and the body's first piece; its reply subject gets the answer |
| `body` | owner, then caller | a further piece of the request's body, or of the answer's |
| `ask` | owner | "are you at work on it?", once a second, so that each side knows that the other is there |
| `alive`, `unknown` | caller | the answer to that |
| `stop` | owner | the client has gone |
| `head` | caller | the answer's status and headers |
| `end` | caller | the answer is complete |

Pieces are numbered, in each direction from 0: one that is missing ends the request, and no answer has holes. A broker
takes messages of a megabyte or less in its own configuration, so that bodies go in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from infsvc import subjects

ASK_S = 1.0
"""How often the caller asks whether the owner is at work on its request."""

SILENT_S = 10.0
"""Who has not heard of the other side for this long takes it for gone."""

_PIECE_BYTES = 256 * 1024
_HEADERS_BYTES = 16 * 1024

Kind = Literal["open", "body", "ask", "alive", "unknown", "stop", "head", "end"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One message.

    Attributes:
        id: the request's among all that are forwarded.
        seq: a piece's number; `open` and `head` are 0.
        more: whether pieces of the request's body follow.
        method, path, status, headers: of `open` and `head`.
    """

    kind: Kind
    id: str
    seq: int = 0
    more: bool = False
    method: str = ""
    path: str = ""
    status: int = 0
    headers: list[list[str]] = field(default_factory=list)

    def marks(self) -> dict[str, str]:
        """The NATS headers that carry it."""
        told = {key: value for key, value in asdict(self).items() if value}
        return {subjects.PART_HEADER: json.dumps(told, separators=(",", ":"))}

    @classmethod
    def read(cls, headers: Mapping[str, str] | None) -> Part | None:
        """The part that a message's headers tell of; None when they tell of none."""
        try:
            told = json.loads((headers or {})[subjects.PART_HEADER])
            part = cls(**told)
        except (KeyError, ValueError, TypeError):
            return None
        texts = (part.kind, part.id, part.method, part.path, *(text for pair in part.headers for text in pair))
        fits = part.kind in get_args(Kind) and all(isinstance(text, str) for text in texts)
        fits = fits and all(len(pair) == 2 for pair in part.headers)
        return part if fits and isinstance(part.seq, int) and isinstance(part.status, int) else None


def pieces(data: bytes, *, max_payload: int) -> Iterator[bytes]:
    """The body in pieces that this broker takes; one at least, which may be empty."""
    size = max(1024, min(_PIECE_BYTES, max_payload - _HEADERS_BYTES))
    for begin in range(0, len(data) or 1, size):
        yield data[begin : begin + size]
