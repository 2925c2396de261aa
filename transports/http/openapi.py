"""`GET /openapi.json`: the API's description, OpenAPI 3.1, made from the route table, `operations` and the wire types.

Nothing in it is written twice: bodies and answers are pydantic's JSON Schemas of types that validate or that the tests
hold against a node, errors are the error classes, the sentences are the handlers' docstrings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from starlette.routing import Route

from infsvc import __version__
from infsvc.embedding_types import EmbeddingBody
from infsvc.errors import RequestError
from infsvc.openai_types import INERT, ChatRequest, TextRequest
from infsvc.types import CompletionRequest, Params
from transports.http.operations import (
    EVENTS,
    JSON,
    OPERATIONS,
    PATH_PARAMETERS,
    Answer,
    Operation,
    Parameter,
    common,
)
from transports.http.refusals import Unauthorized

_REFERENCE = "#/components/schemas/{model}"
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "one of INFSVC_API_KEYS"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "the same, in a header of its own"},
}
_NULL = {"type": "null"}

Schema = dict[str, Any]


def methods(route: Route) -> list[str]:
    """What the description tells of; HEAD goes with GET."""
    return sorted((route.methods or set()) - {"HEAD"})


def describe(routes: Iterable[Route], *, model: str | None, keyed: bool) -> dict[str, Any]:
    """The document. Raises `KeyError` for a route that `operations` does not know."""
    shapes = _Shapes()
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in methods(route):
            operation = OPERATIONS[f"{method} {route.path_format}"]
            told = _operation(operation, route, method, shapes, keyed=keyed)
            paths.setdefault(route.path_format, {})[method.lower()] = told
    where = f"the port of {model}" if model else "the gateway"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "infsvc",
            "version": __version__,
            "summary": f"Language models on this machine: {where}",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {"schemas": shapes.definitions, "securitySchemes": _SCHEMES},
        "security": [{"bearer": []}, {"key": []}] if keyed else [],
    }


def _operation(operation: Operation, route: Route, method: str, shapes: _Shapes, *, keyed: bool) -> dict[str, Any]:
    says = operation.says or _sentence(operation.handler or route.endpoint)
    told: dict[str, Any] = {
        "operationId": _identifier(method, route.path_format),
        "tags": [operation.tag],
        "summary": says,
        "responses": {str(status): _answer(answer, shapes) for status, answer in operation.answers.items()},
    }
    parameters = [_parameter(PATH_PARAMETERS[name], place="path") for name in route.param_convertors] + [
        _parameter(each, place=each.place) for each in operation.parameters
    ]
    if parameters:
        told["parameters"] = parameters
    if operation.bodies:
        schema = _one_of([shapes.body(shape) for shape in operation.bodies])
        told["requestBody"] = {"required": operation.needs_body, "content": {JSON: {"schema": schema}}}
    refusals: dict[int, list[type[RequestError]]] = {}
    for error in dict.fromkeys(common(operation)):
        if error is not Unauthorized or (keyed and not operation.open):
            refusals.setdefault(error.status, []).append(error)
    body = {JSON: {"schema": _one_of([shapes.answer(shape) for shape in operation.shaped])}}
    for status, found in sorted(refusals.items()):
        if str(status) not in told["responses"]:
            codes = ", ".join(dict.fromkeys(error.code for error in found))
            told["responses"][str(status)] = {"description": codes, "content": body}
    if operation.open and keyed:
        told["security"] = []
    return told


def _sentence(handler: Callable[..., Any]) -> str:
    """A handler's docstring without the route that it begins with."""
    text = " ".join((inspect.getdoc(handler) or "").split())
    told = text.partition(": ")[2] if text.startswith("`") else text
    return (told or text)[:1].upper() + (told or text)[1:]


def _identifier(method: str, path: str) -> str:
    words = path.replace("{", "").replace("}", "").replace(".", "/").replace("-", "_").split("/")
    return "_".join([method.lower(), *(word for word in words if word)])


def _parameter(parameter: Parameter, *, place: str) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": place,
        "required": place == "path",
        "description": parameter.says,
        "schema": dict(parameter.schema),
    }


def _answer(answer: Answer, shapes: _Shapes) -> dict[str, Any]:
    content: dict[str, Any] = {media: {"schema": {"type": "string"}} for media in answer.other}
    if answer.shapes:
        content[JSON] = {"schema": _one_of([shapes.answer(shape) for shape in answer.shapes])}
    if answer.events:
        # As OpenAPI 3.2 has it: the schema of one event, whose data are JSON in a text.
        of_event = _one_of([shapes.answer(shape) for shape in answer.events])
        data = {"type": "string", "contentMediaType": JSON, "contentSchema": of_event}
        content[EVENTS] = {
            "schema": {
                "type": "object",
                "properties": {"event": {"type": "string"}, "data": _one_of([data, *answer.last])},
                "required": ["data"],
            }
        }
    return {"description": answer.says, "content": content}


def _one_of(schemas: Sequence[Schema]) -> Schema:
    return dict(schemas[0]) if len(schemas) == 1 else {"anyOf": list(schemas)}


class _Shapes:
    """The document's schemas, each type's made when it is first asked for."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def answer(self, shape: Any) -> Schema:
        """A reference to what is sent."""
        return self._schema(shape, "serialization")

    def body(self, shape: Any) -> Schema:
        """A reference to what is taken, with what a door adds to the type."""
        reference = self._schema(shape, "validation")
        schema = self.definitions[shape.__name__]
        if shape in (ChatRequest, TextRequest):
            self._add_sampling(schema)
        elif shape is CompletionRequest:
            schema["anyOf"] = [{"required": ["input"]}, {"required": ["messages"]}]
            schema["properties"] |= {name: {} for name in INERT}
        if shape in (CompletionRequest, EmbeddingBody):
            # NATS's alone: over HTTP the response is the answer.
            schema["properties"].pop("reply_to", None)
        return reference

    def _schema(self, shape: Any, mode: JsonSchemaMode) -> Schema:
        schema = TypeAdapter(shape).json_schema(mode=mode, ref_template=_REFERENCE)
        for name, definition in schema.pop("$defs", {}).items():
            self._define(name, definition)
        if isinstance(shape, type) and issubclass(shape, BaseModel):
            self._define(shape.__name__, schema)
            return {"$ref": _REFERENCE.format(model=shape.__name__)}
        return schema

    def _define(self, name: str, schema: Schema) -> None:
        known = self.definitions.setdefault(name, schema)
        if known.get("title") != schema.get("title"):
            raise ValueError(f"two types are named {name}")

    def _add_sampling(self, schema: Schema) -> None:
        """OpenAI's bodies have the sampling parameters beside their own fields, nulls for what is not said, and fields
        that change nothing."""
        needed = schema.get("required", [])
        sampling = TypeAdapter(Params).json_schema(ref_template=_REFERENCE)
        for name, definition in sampling.pop("$defs", {}).items():
            self._define(name, definition)
        properties = sampling["properties"] | schema["properties"]
        properties["max_completion_tokens"] = properties["max_tokens"] = {
            key: value for key, value in properties["max_tokens"].items() if key != "default"
        }
        schema["properties"] = {
            name: each if name in needed else _or_null(each) for name, each in properties.items()
        } | {name: {} for name in INERT}


def _or_null(schema: Mapping[str, Any]) -> Schema:
    return dict(schema) if _NULL in schema.get("anyOf", ()) else {"anyOf": [dict(schema), _NULL]}
