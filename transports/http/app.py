"""The route table of a node's ports, and the boundary where every error becomes an answer.

A model's own port and the gateway serve the same routes; the gateway picks the model by what the request names.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import TYPE_CHECKING, Any, NoReturn

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infsvc import __version__
from infsvc.errors import BadRequest, ClientGone, NotFound, RequestError, shown
from transports.http import dashboard
from transports.http.admin import Admin
from transports.http.body import query
from transports.http.choice import ModelChoice
from transports.http.dead_letters import DeadLetterRoutes
from transports.http.elsewhere import fleet_wide, node_header
from transports.http.embeddings import Embeddings
from transports.http.grammars import GrammarRoutes
from transports.http.guards import ApiKeys, BodyLimit, LoopbackGuard
from transports.http.health import Health
from transports.http.native import Completions
from transports.http.openai import OpenAI
from transports.http.refusals import Internal, Json, Ready, WrongMethod, answer, dumps
from transports.http.rerank import Rerank

if TYPE_CHECKING:
    from transports.node import Node

log = logging.getLogger("infsvc.http")

OPENAI_PATHS = ("/v1/chat/completions", "/v1/models", "/v1/embeddings", "/v1/rerank")
"""Where errors have OpenAI's shape whatever the body holds."""


def build_app(node: Node, model: str | None, *, forwarded: bool = False) -> ASGIApp:
    """The ASGI app of one port.

    Args:
        node: whose models, service, events and logs are served.
        model: the model of its own port, or None for the gateway.
        forwarded: whether this is no port, but the gateway for requests that other nodes' gateways have let in: nobody
            is asked for a key, and nothing is forwarded again.
    """
    choice = ModelChoice(node, model, forwards=not forwarded)
    openai = OpenAI(node, choice)
    completions, health, admin = Completions(node, choice, openai), Health(node, model), Admin(node, model)
    embeddings, rerank = Embeddings(node, choice), Rerank(node, choice)
    durable = DeadLetterRoutes(node)
    grammars = GrammarRoutes(node)

    @functools.cache
    def description() -> bytes:
        # Here, because its types cost more than a start should.
        from transports.http.openapi import describe

        own = (route for route in app.routes if isinstance(route, Route))
        return dumps(describe(own, model=model, keyed=bool(keys)))

    async def described(request: Request) -> Ready:
        """`GET /openapi.json`: this description."""
        query(request)
        return Ready(await asyncio.to_thread(description))

    routes = [
        Route("/v1/completions", fleet_wide(node, completions.create), methods=["POST"]),
        Route("/v1/chat/completions", fleet_wide(node, openai.chat), methods=["POST"]),
        Route("/v1/embeddings", fleet_wide(node, embeddings.create), methods=["POST"]),
        Route("/v1/rerank", fleet_wide(node, rerank.create), methods=["POST"]),
        Route("/v1/models", openai.models),
        Route("/v1/models/{model}", openai.one_model),
        Route("/grammars", grammars.all, methods=["GET", "POST"]),
        Route("/grammars/{name:path}", grammars.one, methods=["GET", "PUT", "DELETE"]),
        Route("/healthz", health.show),
        Route("/logs", admin.logs),
        Route("/metrics", admin.metrics),
        Route("/api/services", admin.services),
        Route("/api/services/{model}", admin.service),
        Route("/api/events", admin.events),
        Route("/api/requests", admin.requests),
        Route("/api/requests/{req_id:path}", admin.cancel, methods=["DELETE"]),
        Route("/api/queue", durable.queues),
        Route("/api/queue/{model}", durable.purge, methods=["DELETE"]),
        Route("/api/dead", durable.letters),
        Route("/api/dead/{id}/replay", durable.replay, methods=["POST"]),
        Route("/api/dead/{id}", durable.delete, methods=["DELETE"]),
        Route("/api/models/{model}/load", admin.load, methods=["POST"]),
        Route("/api/models/{model}/unload", admin.unload, methods=["POST"]),
        Route("/api/models/{model}/pull", admin.pull, methods=["POST"]),
        Route("/api/models/{model}/file", admin.remove_file, methods=["DELETE"]),
    ]
    routes.append(Route("/openapi.json", described))
    table = [
        f"{method} {route.path_format}" for route in routes for method in sorted((route.methods or set()) - {"HEAD"})
    ]

    async def index(request: Request) -> Response:
        query(request)
        if model is None and dashboard.wants_page(request.headers):
            return dashboard.page()
        return Json(
            {"service": "infsvc", "version": __version__, "node": node.name, "model": model, "routes": table},
            headers={"Vary": "Accept"},
        )

    keys = node.settings.keys
    guards = [Middleware(ApiKeys, keys=keys) if keys else Middleware(LoopbackGuard)] if not forwarded else []
    app = Starlette(
        routes=[*routes, Route("/", index), *(dashboard.routes() if model is None else ())],
        middleware=[
            Middleware(Boundary, model=model, node=node.name),
            *guards,
            Middleware(BodyLimit),
        ],
        exception_handlers={HTTPException: unrouted},
    )
    app.router.redirect_slashes = False
    return app


async def unrouted(request: Request, error: Exception) -> NoReturn:
    """Starlette's own 404 and 405 in this project's terms."""
    assert isinstance(error, HTTPException)
    path = shown(request.url.path)
    if error.status_code == 405:
        allowed = sorted(method.strip() for method in (error.headers or {})["Allow"].split(","))
        raise WrongMethod(request.method, path, allowed)
    if error.status_code == 404:
        raise NotFound(f"nothing is served at {path}: GET / lists what is")
    raise BadRequest(error.detail)


class Boundary:
    """The outermost layer: what is raised below becomes status, headers and a native body, here and nowhere else.

    It stands as the first middleware, inside Starlette's own last resort, which answers in plain text and raises again.
    """

    def __init__(self, app: ASGIApp, model: str | None, node: str | None = None) -> None:
        self._app, self._model = app, model
        self._signed = None if node is None else node_header(node)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun_s = time.perf_counter()
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers, signed = message["headers"], self._signed
                if signed is not None and all(name != signed[0] for name, _ in headers):  # else another node's answer
                    message = {**message, "headers": [*headers, signed]}
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except (ClientGone, ClientDisconnect):
            # There is nobody to answer; uvicorn knows that the connection is gone.
            status = ClientGone.status
        except RequestError as error:
            await self._refuse(error, status, scope, receive, noting)
        except Exception:
            log.exception(
                "a request failed", extra={"code": "http.failed", "meta": _facts(scope), "model": self._model}
            )
            await self._refuse(Internal(), status, scope, receive, noting)
        meta = _facts(scope) | {"status": status, "duration_ms": round((time.perf_counter() - begun_s) * 1000, 1)}
        # A 503 is a state that the log already tells of, and pollers repeat it.
        level = logging.WARNING if status >= 500 and status != 503 else logging.DEBUG
        log.log(
            level, "%s %s: %d", scope["method"], meta["path"], status,
            extra={"code": "http.request", "meta": meta, "model": self._model},
        )  # fmt: skip

    async def _refuse(self, error: RequestError, status: int, scope: Scope, receive: Receive, send: Send) -> None:
        # Once the head is sent there is no answer left to give; uvicorn then closes the connection.
        if status:
            return
        state = scope.get("state", {})
        shaped = state.get("openai_shaped", scope["path"].startswith(OPENAI_PATHS))
        response = answer(error, state.get("req_id"), openai_shaped=shaped)
        if any(name == b"expect" for name, _ in scope["headers"]):
            # Nobody can know whether a body that was announced with Expect follows its refusal.
            response.headers["Connection"] = "close"
        await response(scope, receive, send)


def _facts(scope: Scope) -> dict[str, Any]:
    """What the log says of a request. The query string stays out: people put secrets there."""
    return {"method": scope["method"], "path": shown(scope["path"]), "req_id": scope.get("state", {}).get("req_id")}
