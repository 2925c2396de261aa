"""`/grammars`: kept as sent, checked when stored, found by name in requests."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

COLOURS = {"name": "colours", "description": "two colours", "content": 'root ::= "red" | "blue"'}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}


async def test_create_read_replace_delete(gateway: httpx2.AsyncClient) -> None:
    created = await gateway.post("/grammars", json=COLOURS)
    told = {"name": "colours", "description": "two colours", "kind": "gbnf", "shipped": False}
    assert (created.status_code, created.json(), created.headers["Location"]) == (201, told, "/grammars/colours")
    assert (await gateway.get("/grammars")).json() == {"grammars": [told]}
    assert (await gateway.get("/grammars/colours")).json() == told | {"content": COLOURS["content"]}
    again = await gateway.post("/grammars", json=COLOURS)
    assert (again.status_code, again.json()["code"]) == (409, "grammar_conflict")
    replaced = await gateway.put("/grammars/colours", json={"content": SCHEMA})
    assert (replaced.status_code, replaced.json()["kind"]) == (200, "json_schema")
    gone = await gateway.delete("/grammars/colours")
    assert (gone.status_code, gone.json()) == (200, {"name": "colours", "deleted": True})
    for answer in (await gateway.get("/grammars/colours"), await gateway.delete("/grammars/colours")):
        assert (answer.status_code, answer.json()["code"]) == (404, "grammar_not_found")


async def test_folders_kinds_and_every_port(gateway: httpx2.AsyncClient, port: httpx2.AsyncClient) -> None:
    put = await port.put("/grammars/team/shape", json={"content": '{"type": "null"}', "name": "team/shape"})
    assert (put.status_code, put.json()["kind"]) == (201, "json_schema")
    assert (await gateway.get("/grammars/team/shape")).json()["content"] == '{"type": "null"}'
    as_said = await gateway.put("/grammars/g", json={"content": "{", "kind": "gbnf"})
    assert as_said.json()["code"] == "grammar_invalid"


@pytest.mark.parametrize(
    ("body", "status", "code", "place"),
    [
        ({"name": "a", "content": 'root ::= "x\n'}, 422, "grammar_invalid", {"line": 1, "column": 10}),
        ({"name": "a", "content": 'root ::= x\nx ::= "{" ws ...'}, 422, "grammar_invalid", {"line": 2, "column": 11}),
        ({"name": "a", "content": "x"}, 422, "grammar_invalid", {"param": "content"}),
        ({"name": "a", "content": ""}, 422, "grammar_invalid", {}),
        ({"name": "a", "content": {"not": {}}}, 422, "schema_invalid", {"path": "#/not", "param": "content"}),
        ({"name": "a", "content": "{]"}, 422, "schema_invalid", {"path": "#"}),
        ({"name": "a", "content": "[1]", "kind": "json_schema"}, 422, "schema_invalid", {"path": "#"}),
        ({"name": "a", "content": "[" * 20_000, "kind": "json_schema"}, 422, "schema_invalid", {"path": "#"}),
        ({"name": "a", "content": {}, "kind": "gbnf"}, 400, "bad_request", {"param": "kind"}),
        ({"name": "a", "content": "x", "kind": "lark"}, 400, "bad_request", {"param": "kind"}),
        ({"name": "../a", "content": 'root ::= "x"'}, 400, "bad_request", {"param": "name"}),
        ({"name": "a\u0000", "content": 'root ::= "x"'}, 400, "bad_request", {"param": "name"}),
        ({"content": 'root ::= "x"'}, 400, "bad_request", {"param": "name"}),
        ({"name": "a"}, 400, "bad_request", {"param": "content"}),
        ({"name": "a", "content": 3}, 400, "bad_request", {}),
        ({"name": "a", "content": 'root ::= "x"', "what": 1}, 400, "bad_request", {"param": "what"}),
        ({"name": "a", "content": 'root ::= "x"', "description": "a\nb"}, 400, "bad_request", {"param": "description"}),
        ({"name": "a", "content": "#" * 70_000}, 400, "bad_request", {"param": "content"}),
    ],
)  # fmt: skip
async def test_what_cannot_be_stored_says_why(
    gateway: httpx2.AsyncClient, body: dict[str, Any], status: int, code: str, place: dict[str, Any]
) -> None:
    answer = await gateway.post("/grammars", json=body)
    told = answer.json()
    assert (answer.status_code, told["code"]) == (status, code), told
    assert told | place == told
    assert (await gateway.get("/grammars")).json() == {"grammars": []}


@pytest.mark.parametrize(
    "path",
    [
        "..%2f..%2fetc%2fpasswd", "%2e%2e/x", "%2Fetc%2Fpasswd", "a%00", "a%5Cb", "%C3%A9", "x" * 300, "a/b/c", "con",
        "x.gbnf",
    ],
)  # fmt: skip
async def test_no_path_reaches_the_file_system(gateway: httpx2.AsyncClient, path: str) -> None:
    answers = [
        await gateway.get(f"/grammars/{path}"),
        await gateway.put(f"/grammars/{path}", json={"content": 'root ::= "x"'}),
        await gateway.delete(f"/grammars/{path}"),
    ]
    assert {(each.status_code, each.json()["code"]) for each in answers} <= {(400, "bad_request"), (404, "not_found")}


async def test_other_methods_and_a_body_that_names_another(gateway: httpx2.AsyncClient) -> None:
    wrong = await gateway.delete("/grammars")
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "GET, HEAD, POST")
    assert (await gateway.post("/grammars/a", json={})).status_code == 405
    other = await gateway.put("/grammars/a", json=COLOURS)
    assert (other.status_code, other.json()["param"]) == (400, "name")
    assert (await gateway.get("/grammars?x=1")).status_code == 400
