"""Reads what a client sent, strictly: a JSON body, and query strings whose every parameter is known.

Each complaint is a `BadRequest` in one sentence that says where: those who read it often wrote the request by hand.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from starlette.requests import Request

from infsvc.errors import BadRequest, shown
from infsvc.wire_input import parse_object
from transports.http.refusals import WrongMediaType

_TYPES = frozenset({"application/json", "text/plain", "text/json", "application/x-www-form-urlencoded"})
"""What a JSON body may call itself: its own name, and what curl's `-d` and a browser's `fetch` say of themselves."""


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        WrongMediaType: its Content-Type says that it is no JSON.
        BadRequest: compressed, or as `wire_input.parse_object`.
        TooLarge: from the body limit, while it is read.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BadRequest(f"Content-Encoding {shown(encoding)} is not supported: send the body as it is")
    kind, _, rest = request.headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    charset = rest.lower().partition("charset=")[2].partition(";")[0].strip(" \"'")
    if (kind and kind not in _TYPES and not kind.endswith("+json")) or charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise WrongMediaType(request.headers["content-type"])
    return parse_object(await request.body())


async def no_fields(request: Request) -> None:
    """Refuses a body with fields in it; none at all is welcome."""
    for key in await read_object(request) if await request.body() else ():
        raise BadRequest(f"{shown(key)}: there is no such field", param=shown(key))


def query(request: Request, known: Set[str] = frozenset()) -> dict[str, str]:
    """The query string's parameters, each given at most once.

    Raises:
        BadRequest: one that is not `known`, or given twice.
    """
    found: dict[str, str] = {}
    for key, value in request.query_params.multi_items():
        if key not in known:
            there_are = f"there are: {', '.join(sorted(known))}" if known else "there are none here"
            raise BadRequest(f"{shown(key)} is no query parameter; {there_are}", param=shown(key))
        if key in found:
            raise BadRequest(f"{key} is given twice", param=key)
        found[key] = value
    return found
