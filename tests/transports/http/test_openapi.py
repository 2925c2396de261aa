"""`/openapi.json`: every route is in it, it is OpenAPI 3.1, and it says what the routes take and answer."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.applications import Starlette
from starlette.routing import Route

from tests.transports.http.conftest import MakeNode, ScriptedNode, Serve
from transports.http.app import build_app
from transports.http.openapi import methods


async def described(client: httpx2.AsyncClient, **headers: str) -> dict[str, Any]:
    answer = await client.get("/openapi.json", headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    document: dict[str, Any] = answer.json()
    return document


@pytest.mark.parametrize("model", [None, "demo"])
async def test_every_route_is_described_and_the_document_is_valid(
    node: ScriptedNode, serve: Serve, model: str | None
) -> None:
    document = await described(await serve(node, model))
    OpenAPIV31SpecValidator(document).validate()
    app = build_app(node, model)  # type: ignore[arg-type]
    assert isinstance(app, Starlette)
    served = {
        (route.path_format, method) for route in app.routes if isinstance(route, Route) for method in methods(route)
    }
    told = {(path, method.upper()) for path, operations in document["paths"].items() for method in operations}
    assert told == served
    assert len(served) == len(app.routes) + 3  # /grammars has two methods, /grammars/{name} three


async def test_what_it_says_of_a_route(gateway: httpx2.AsyncClient) -> None:
    document = await described(gateway)
    schemas = document["components"]["schemas"]
    create = document["paths"]["/v1/completions"]["post"]
    assert [each["name"] for each in create["parameters"]] == ["X-Trace-ID"]
    body = create["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert [each["$ref"].rpartition("/")[2] for each in body] == ["CompletionRequest", "TextRequest"]
    assert set(create["responses"]) == {
        "200", "400", "403", "404", "413", "415", "422", "429", "499", "500", "503",
    }  # fmt: skip
    assert set(create["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "reply_to" not in schemas["CompletionRequest"]["properties"]
    assert schemas["TextRequest"]["properties"].keys() >= {"temperature", "grammar", "user", "max_completion_tokens"}
    assert schemas["Params"]["properties"]["temperature"]["maximum"] == 2
    assert "Stop" not in schemas
    listed = document["paths"]["/logs"]["get"]
    assert {each["name"] for each in listed["parameters"]} == {"model", "limit", "status", "since"}
    assert listed["summary"] == "Audit rows, newest first."
    sentences = [each["summary"] for path in document["paths"].values() for each in path.values()]
    assert not [each for each in sentences if len(each) < 15 or each.startswith("`")]


async def test_keys_are_asked_for_where_there_are_some(
    gateway: httpx2.AsyncClient, make_node: MakeNode, serve: Serve
) -> None:
    assert (await described(gateway))["security"] == []
    keyed = await serve(make_node(api_keys="first"))
    assert (await keyed.get("/openapi.json")).status_code == 401
    document = await described(keyed, authorization="Bearer first")
    OpenAPIV31SpecValidator(document).validate()
    assert document["security"] == [{"bearer": []}, {"key": []}]
    assert set(document["components"]["securitySchemes"]) == {"bearer", "key"}
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert "401" in document["paths"]["/api/services"]["get"]["responses"]
