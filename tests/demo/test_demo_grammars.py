"""The demo model with the grammars that ship and with schemas, through a whole node."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infsvc.home import Home
from infsvc.settings import load_node_settings, load_workers
from tests.nodes import add_worker, node_environ
from transports.node import Node

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """The gateway of a node whose home is empty and whose shipped files are the checkout's."""
    add_worker(tmp_path, "demo", ROOT / "data/models/demo/model.gguf", WORKER_CONCURRENCY=4)
    home = Home(tmp_path, ROOT)
    settings = load_node_settings(node_environ(tmp_path, embedded_nats="off"))
    workers = {"demo": load_workers(home, settings, {})["demo"]}
    async with Node(home, settings, workers, ["demo"]) as node:
        await node.fleet.settled("demo")
        async with httpx2.AsyncClient(base_url=node.gateway_url, timeout=60, trust_env=False) as client:
            yield client


async def ask(http: httpx2.AsyncClient, text: str, **params: Any) -> dict[str, Any]:
    body = {"input": text, "params": {"temperature": 0, "max_tokens": 300} | params}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def test_the_grammars_that_ship(http: httpx2.AsyncClient) -> None:
    listed = (await http.get("/grammars")).json()["grammars"]
    assert [each["name"] for each in listed] == ["default/code", "default/json", "default/yes_no"]
    assert (await http.delete("/grammars/yes_no")).status_code == 409
    for text in ("Is the sky blue?", "Is fire cold?"):
        assert (await ask(http, text, grammar="yes_no"))["text"] in ("yes", "no")
    reply = await ask(http, "Write a JSON object with the name Ada and the age 36.", grammar="json")
    assert reply["finish_reason"] == "stop"
    assert json.loads(reply["text"])
    reply = await ask(http, "Write code.", grammar="code")
    assert reply["text"].startswith("```")
    assert reply["finish_reason"] == "length" or re.fullmatch(r"```[a-z0-9+#-]*\n(.*\n)+```", reply["text"])
    rows = (await http.get("/logs?model=demo")).json()["rows"]
    assert [row["grammar_used"] for row in rows] == ["code", "json", "yes_no", "yes_no"]


async def test_an_own_grammar_and_a_schema(http: httpx2.AsyncClient) -> None:
    colours = {"name": "colours", "content": 'root ::= "red" | "green"'}
    assert (await http.post("/grammars", json=colours)).status_code == 201
    assert (await ask(http, "Name a colour.", grammar="colours"))["text"] in ("red", "green")
    person = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    reply = await ask(http, "Write a JSON object with the name Ada and the age 36.", json_schema=person)
    assert reply["finish_reason"] == "stop"
    assert list(json.loads(reply["text"])) == ["name", "age"]
