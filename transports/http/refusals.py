"""The errors that only HTTP has, and how any `RequestError` becomes an answer.

Apart from the rest because the boundary, the guards and the streams all need them, and none of those knows another.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from starlette.responses import Response

from infsvc.errors import MethodNotAllowed, RequestError, shown


class Unauthorized(RequestError):
    """401: no API key, or a wrong one."""

    status = 401
    code = "unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(RequestError):
    """403: a browser page of another site talks to this machine."""

    status = 403
    code = "forbidden"


class CannotLoad(RequestError):
    """409: a model's port cannot be opened, or its file not fetched or removed; the sentence says what to do."""

    status = 409
    code = "cannot_load"


class WrongMethod(MethodNotAllowed):
    """405 with the methods that the path has."""

    def __init__(self, method: str, path: str, allowed: list[str]) -> None:
        self.allowed = allowed
        super().__init__(f"{method} is not served at {path}: use {' or '.join(allowed)}")

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": ", ".join(self.allowed)}


class WrongMediaType(RequestError):
    """415: a body that says of itself that it is no JSON, or no UTF-8."""

    status = 415
    code = "unsupported_media_type"

    def __init__(self, content_type: str) -> None:
        super().__init__(
            f"Content-Type {shown(content_type)} is not served: send JSON in UTF-8 as application/json",
            param="Content-Type",
        )


class Internal(RequestError):
    """500: a fault of this program. The log has the traceback; the client gets no internals."""

    status = 500
    code = "internal"

    def __init__(self) -> None:
        super().__init__("an internal error; the node's log says more")


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)


def dumps(content: Any) -> bytes:
    """`content` as compact JSON. A lone surrogate, which UTF-8 cannot carry, becomes its JSON escape."""
    return _ENCODER.encode(content).encode("utf-8", "backslashreplace")


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


class Ready(Response):
    """A JSON answer that is bytes already."""

    media_type = "application/json"


def req_id_header(req_id: str) -> dict[str, str]:
    """`X-Req-ID`; what a header cannot carry is percent-encoded."""
    return {"X-Req-ID": quote(req_id, safe="!#$&'()*+,/:;=?@[]~ |^`{}\"<>\\")}


def answer(error: RequestError, req_id: str | None, *, openai_shaped: bool = False) -> Json:
    """The answer to a request that cannot be served, in the native shape or OpenAI's."""
    headers = dict(error.headers)
    if req_id is not None:
        headers |= req_id_header(req_id)
    return Json(error.openai() if openai_shaped else error.native(req_id), status_code=error.status, headers=headers)
