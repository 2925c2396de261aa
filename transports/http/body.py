"""Reads what a client sent, strictly: a JSON body, and query strings whose every parameter is known.

Each complaint is a `BadRequest` in one sentence that says where: those who read it often wrote the request by hand.
"""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Any, NoReturn

from pydantic import ValidationError
from starlette.requests import Request

from infsvc.errors import BadRequest

_SHOWN_CHARACTERS = 120


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        BadRequest: compressed, empty, not UTF-8, not JSON (with line and column), or not an object.
        TooLarge: from the body limit, while it is read.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BadRequest(f"Content-Encoding {shown(encoding)} is not supported: send the body as it is")
    return parse_object(await request.body())


def parse_object(data: bytes) -> dict[str, Any]:
    """Bytes to a JSON object; see `read_object`. A key that comes twice counts with its last value."""
    if not data.strip():
        raise BadRequest("the body is empty: send a JSON object")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError:
        # An integer of thousands of digits, which Python refuses to convert.
        raise BadRequest("the body holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body is a JSON {_kind(value)}: send an object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest(f"the body is not JSON: {name} is no JSON number")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "number"


def bad_request(error: ValidationError) -> BadRequest:
    """The first complaint of pydantic as one sentence, its dotted path as `param`."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = shown(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        message = "there is no such field"
    else:
        message = str(first["msg"]).removeprefix("Value error, ")
    return BadRequest(f"{path}: {message}" if path else message, param=path or None)


def shown(text: str) -> str:
    """Client text as it may stand in an error: short, and without what a terminal or UTF-8 would stumble over."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return clean if len(clean) <= _SHOWN_CHARACTERS else clean[: _SHOWN_CHARACTERS - 1] + "…"


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
