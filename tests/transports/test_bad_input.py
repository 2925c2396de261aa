"""Every way to ask wrongly, through every door, with the exact status, code and message: the rows of `bad_inputs`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import nats
import pytest
import pytest_asyncio
from nats.aio.client import Client

from tests.bert_files import random_bert, write_bert
from tests.nodes import add_worker, build, connected
from tests.transports.bad_inputs import CASES, Case
from transports.node import Node

DEMO = Path(__file__).resolve().parents[2] / "data/models/demo/model.gguf"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Doors:
    """One node and a client of each of its doors by the name that cases have for it; `keyed` is a second node's."""

    node: Node
    http: dict[str, httpx2.AsyncClient]
    bus: Client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    folder = tmp_path_factory.mktemp("bad")
    write_bert(folder / "bert.gguf", random_bert())
    home, other = folder / "home", folder / "keyed"
    add_worker(home, "demo", DEMO, CTX_SIZE=256)
    add_worker(home, "bert-v1.5", folder / "bert.gguf", MODEL_FORMAT="embedding")
    add_worker(home, "absent", None, MODEL_PATH="absent.gguf")
    shipped = home / "data/grammars/default"
    shipped.mkdir(parents=True)
    for name in ("json", "yes_no"):
        (shipped / f"{name}.gbnf").write_text('root ::= "yes" | "no"\n')
    other.mkdir()
    async with AsyncExitStack() as exits:
        node = await exits.enter_async_context(build(home, "demo", "bert-v1.5"))
        keyed = await exits.enter_async_context(build(other, embedded_nats="off", api_keys="first"))
        for name in ("demo", "bert-v1.5"):
            worker = await node.fleet.settled(name)
            assert worker.state == "ready", worker.reason
        await connected(node.events)
        urls = {
            "demo": node.fleet.get("demo").endpoint,
            "bert": node.fleet.get("bert-v1.5").endpoint,
            "gateway": node.gateway_url,
            "keyed": keyed.gateway_url,
        }
        http = {
            name: await exits.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=30, trust_env=False))
            for name, url in urls.items()
        }
        bus = await nats.connect(node.settings.nats_url)
        exits.push_async_callback(bus.close)
        while await node.durable.reason(node.fleet.get("demo")) or await node.durable.reason(
            node.fleet.get("bert-v1.5")
        ):
            await asyncio.sleep(0.02)
        yield Doors(node, http, bus)


async def answered(doors: Doors, case: Case) -> tuple[int, dict[str, Any]]:
    """The status and the body of an answer to a case; over NATS the body's own status."""
    door, *where = case.to.split()
    data = case.sent if isinstance(case.sent, bytes) else b"" if case.sent is None else json.dumps(case.sent).encode()
    if door == "nats":
        reply = await doors.bus.request(where[0], data, timeout=20, headers=dict(case.headers) or None)
        body = json.loads(reply.data)
        return body["status"], body
    headers = {"Content-Type": "application/json"} | dict(case.headers) if data else dict(case.headers)
    method, path = where
    answer = await doors.http[door].request(method, path, content=data, headers=headers)
    return answer.status_code, answer.json()


def told(body: dict[str, Any]) -> tuple[str, str, str | None]:
    """Code, message and field of an error in either shape."""
    error = body.get("error")
    if isinstance(error, dict):
        return error["code"], error["message"], error["param"]
    return body["code"], body["error"], body.get("param")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_a_wrong_request_is_told_what_is_wrong(doors: Doors, case: Case) -> None:
    status, body = await answered(doors, case)
    assert (status, *told(body)) == (case.status, case.code, case.message, case.param)
    assert len(case.message) < 400, "a sentence"


async def test_a_node_that_was_asked_all_that_still_answers(doors: Doors) -> None:
    """Behind all cases in this file: nothing runs, nothing is left in a queue, and good requests are served."""
    assert not list(doors.node.service.live())
    good = await doors.http["demo"].post("/v1/completions", json={"input": "hello", "params": {"temperature": 0}})
    assert (good.status_code, good.json()["finish_reason"]) == (200, "stop")
    reply = json.loads((await doors.bus.request("inference.request.demo", b'{"input": "hello"}', timeout=20)).data)
    assert reply["finish_reason"] in ("stop", "length")
    queues = (await doors.http["gateway"].get("/api/queue")).json()["queues"]
    assert {(each["model"], each["waiting"], each["taken"]) for each in queues} == {
        ("demo", 0, 0),
        ("bert-v1.5", 0, 0),
    }
    assert (await doors.http["gateway"].get("/api/dead")).json() == {"dead": [], "total": 0}


async def test_there_are_many() -> None:
    assert len(CASES) >= 120
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.to.split()[0] for case in CASES} == {"demo", "gateway", "bert", "keyed", "nats"}
