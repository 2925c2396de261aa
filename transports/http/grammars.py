"""`/grammars`: stored grammars and schemas, checked when they are stored. The same on every port of the node."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, ValidationError, field_validator
from starlette.requests import Request

from infsvc.errors import BadRequest, ConstraintError
from infsvc.types import Wire
from infsvc.wire_input import complaint
from storage.grammars import StoredGrammar, check_text, checked
from transports.http.body import query, read_object
from transports.http.refusals import Json

if TYPE_CHECKING:
    from transports.node import Node


class GrammarBody(Wire):
    """What POST and PUT take. `content` is GBNF text, or a JSON Schema as text or as the object itself.

    Attributes:
        kind: what the content is; left out, a content with `::=` is GBNF, and one that is an object a schema.
    """

    model_config = ConfigDict(strict=True)

    name: str | None = None
    description: str = ""
    content: str | dict[str, Any]
    kind: Literal["gbnf", "json_schema"] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_or_object(cls, value: Any) -> Any:
        if not isinstance(value, str | dict):
            raise ValueError("a text (GBNF, or a JSON Schema), or a JSON Schema as an object")
        return value

    def stored(self, name: str) -> StoredGrammar:
        """As it will be kept. Raises `BadRequest`."""
        is_object = isinstance(self.content, dict)
        text = self.content if isinstance(self.content, str) else json.dumps(self.content, ensure_ascii=False, indent=2)
        looks = "json_schema" if is_object or text.lstrip().startswith("{") else "gbnf"
        if is_object and self.kind == "gbnf":
            raise BadRequest("the content is an object, and kind says gbnf", param="kind")
        return StoredGrammar(name=name, kind=self.kind or looks, content=text, description=self.description)


class GrammarRoutes:
    """The routes under `/grammars`."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def all(self, request: Request) -> Json:
        """`/grammars`."""
        return await (self.create(request) if request.method == "POST" else self.list(request))

    async def one(self, request: Request) -> Json:
        """`/grammars/<name>`."""
        serve = {"PUT": self.replace, "DELETE": self.delete}.get(request.method, self.show)
        return await serve(request)

    async def list(self, request: Request) -> Json:
        """`GET /grammars`: all, without their contents."""
        query(request)
        found = await asyncio.to_thread(self._node.grammars.all)
        return Json({"grammars": [_facts(each) for each in found]})

    async def create(self, request: Request) -> Json:
        """`POST /grammars`: 201, or 409 where the name is taken."""
        query(request)
        body = _validated(await read_object(request))
        if body.name is None:
            raise BadRequest("name is needed", param="name")
        grammar = body.stored(body.name)
        await _check(grammar)
        await asyncio.to_thread(self._node.grammars.create, grammar)
        return Json(_facts(grammar), status_code=201, headers={"Location": f"/grammars/{grammar.name}"})

    async def show(self, request: Request) -> Json:
        """`GET /grammars/<name>`: one with its content."""
        query(request)
        found = await asyncio.to_thread(self._node.grammars.get, request.path_params["name"])
        return Json(_facts(found) | {"content": found.content})

    async def replace(self, request: Request) -> Json:
        """`PUT /grammars/<name>`: 201 for a new one, else 200. What ships is hidden by the own one, not changed."""
        query(request)
        name = request.path_params["name"]
        body = _validated(await read_object(request))
        if body.name is not None and body.name != name:
            raise BadRequest("the body names another grammar than the path: leave name out", param="name")
        grammar = body.stored(name)
        await _check(grammar)
        is_new = await asyncio.to_thread(self._node.grammars.put, grammar)
        return Json(_facts(grammar), status_code=201 if is_new else 200)

    async def delete(self, request: Request) -> Json:
        """`DELETE /grammars/<name>`: an own one; what ships stays."""
        query(request)
        gone = await asyncio.to_thread(self._node.grammars.delete, request.path_params["name"])
        return Json({"name": gone.name, "deleted": True})


def _validated(body: dict[str, Any]) -> GrammarBody:
    try:
        return GrammarBody.model_validate(body)
    except ValidationError as error:
        raise complaint(error) from None


async def _check(grammar: StoredGrammar) -> None:
    checked(grammar.name)
    check_text(grammar)
    # Here, because it takes llguidance along.
    from engine.constraint import check_stored

    try:
        await asyncio.to_thread(check_stored, grammar.content, schema=grammar.is_schema)
    except ConstraintError as error:
        error.param = "content"
        raise


def _facts(grammar: StoredGrammar) -> dict[str, Any]:
    return {
        "name": grammar.name,
        "description": grammar.description,
        "kind": grammar.kind,
        "shipped": grammar.shipped,
    }
