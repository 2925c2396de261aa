"""The web dashboard: `GET /` for a browser, and the files beside it; a program that asks for `/` gets the JSON index.

The page is four static files without a build: its data come from `/api/services` and `/api/events` like anyone's. Its
policy lets it load and talk to this origin alone, with nothing inline, so that no name of a model can become markup or
script. The files hold nothing of the node, so they are served without a key, and the page asks for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from transports.http.body import query

STATIC = Path(__file__).with_name("static")
PREFIX = "/dashboard/"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {
    "dashboard.html": "text/html; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OPEN_PATHS = frozenset(f"{PREFIX}{name}" for name in _TYPES)
"""What a page is made of; `/` beside them when a browser asks."""


def wants_page(headers: Mapping[str, str]) -> bool:
    """Whether `Accept` names HTML before JSON. curl and libraries, which take anything, do not."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in headers.get("accept", "").split(",")]
    if "text/html" not in kinds:
        return False
    return "application/json" not in kinds or kinds.index("text/html") < kinds.index("application/json")


def is_free(method: str, path: str, headers: Headers) -> bool:
    """Whether a request is for the page alone, which needs no key."""
    return method in ("GET", "HEAD") and (path in OPEN_PATHS or (path == "/" and wants_page(headers)))


def page() -> Response:
    """The page itself."""
    return _file("dashboard.html", {"Vary": "Accept"})


def routes() -> list[Route]:
    """The files that the page names."""

    def served(name: str) -> Route:
        async def show(request: Request) -> Response:
            query(request)
            return _file(name, {})

        return Route(f"{PREFIX}{name}", show)

    return [served(name) for name in _TYPES]


def _file(name: str, headers: Mapping[str, str]) -> Response:
    return Response((STATIC / name).read_bytes(), headers={**_HEADERS, "Content-Type": _TYPES[name], **headers})
