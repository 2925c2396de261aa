"""Whose a request is, so that clients share a model's slots alike.

In this order: the API key it was let in with, the `X-Client-ID` header, the address it came from. One connection
carries one request at a time, so it says less than its address; programs on one machine tell themselves apart by the
header, as `infsvc.Client` does, or by their keys. The header is taken on trust: where that is not enough, give each
client a key.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Scope

from infsvc.errors import BadRequest
from infsvc.subjects import CLIENT_CHARACTERS, CLIENT_HEADER


def name_key(scope: Scope, number: int | None) -> None:
    """Notes which of the node's keys let a request in; the key itself is noted nowhere."""
    if number is not None:
        scope.setdefault("state", {})["api_key"] = number


def caller(request: Request) -> str:
    """The client's name; raises `BadRequest` for a header that is too long."""
    name = request.headers.get(CLIENT_HEADER, "")
    if len(name) > CLIENT_CHARACTERS:
        raise BadRequest(
            f"{CLIENT_HEADER} has {len(name)} characters: {CLIENT_CHARACTERS} are allowed", param=CLIENT_HEADER
        )
    number = getattr(request.state, "api_key", None)
    if number is not None:
        return f"key {number}"
    return f"id {name}" if name else f"address {request.client.host if request.client else ''}"
