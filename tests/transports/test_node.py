"""The whole node on real parts: HTTP and NATS in, the engine, the audit file out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import nats
import pytest

from infsvc.errors import ConfigError, HomeError, StartError, UnknownModel
from infsvc.events import BrokerStateChanged, Event, LogLine, ModelStateChanged, RequestFinished
from infsvc.types import ModelState
from tests.nodes import ENDLESS, add_worker, build
from transports.node import Node


async def until(node: Node, wanted: Callable[[Event], bool], *, replay: bool = False) -> Event:
    """The next event that is wanted."""
    events = node.events.subscribe(replay=replay)
    try:
        async with asyncio.timeout(20):
            async for event in events:
                if wanted(event):
                    return event
    finally:
        events.close()
    raise AssertionError("the bus closed")


def is_broker(state: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, BrokerStateChanged) and event.state == state


async def begun(node: Node, n: int = 1) -> None:
    """Waits until `n` requests have drawn a token."""
    while sum(generation.tokens_out > 0 for generation in node.service.live()) < n:
        await asyncio.sleep(0)


def rows(node: Node, sql: str, model: str = "tiny") -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(node.home.root / f"data/logs/{model}.sqlite")) as db:
        return db.execute(sql).fetchall()


async def audited(node: Node, model: str = "tiny") -> None:
    await node.fleet.get(model).audit.flush()  # type: ignore[attr-defined]


def stream_events(body: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]


async def test_messages_are_a_chat(node: Node, http: httpx2.AsyncClient) -> None:
    params = {"max_tokens": 5, "temperature": 0}
    whole = await http.post("/v1/completions", json={"input": "hello", "params": params})
    turns = [{"role": "user", "content": "hello"}]
    chat = await http.post("/v1/completions", json={"req_id": "c", "messages": turns, "params": params})
    assert chat.json()["text"] == whole.json()["text"]
    await audited(node)
    assert rows(node, "SELECT raw_input FROM requests WHERE req_id = 'c'") == [(json.dumps(turns),)]


async def test_a_request_is_answered_and_audited(node: Node, http: httpx2.AsyncClient) -> None:
    body = {"req_id": "r1", "input": "hello", "params": {"max_tokens": 5, "temperature": 0}}
    reply = (await http.post("/v1/completions", json=body, headers={"X-Trace-ID": "t1"})).json()
    assert reply["req_id"] == "r1"
    assert reply["tokens_out"] == 5
    assert reply["finish_reason"] == "length"
    assert reply["ms"] == reply["duration_ms"]
    await audited(node)
    # The seed's statements, as printed.
    latest = rows(
        node,
        "SELECT req_id, worker_id, raw_input, formatted_input, dur_ms, status, datetime(ts, 'unixepoch') as time "
        "FROM requests ORDER BY ts DESC LIMIT 5",
    )
    assert latest[0][:4] == ("r1", "alpha-0", "hello", "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert latest[0][5] == "ok"
    assert rows(node, "SELECT worker_id, COUNT(*) as request_count, AVG(dur_ms) FROM requests GROUP BY worker_id")
    codes = [row[0] for row in rows(node, "SELECT code FROM events ORDER BY id")]
    expected = ["startup", "services.init", "model.loading", "health.started", "monitoring.started", "server.ready"]
    assert [code for code in codes if code in expected] == expected
    assert "model.loaded" in codes
    assert rows(node, "SELECT trace_id, source FROM requests") == [("t1", "http")]


async def test_a_stream_adds_up_to_the_reply(http: httpx2.AsyncClient) -> None:
    body = {"input": "hello", "params": {"max_tokens": 30, "seed": 7}}
    alone = (await http.post("/v1/completions", json=body)).json()
    response = await http.post("/v1/completions", json=body | {"stream": True})
    *chunks, last = stream_events(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert [chunk["index"] for chunk in chunks] == list(range(len(chunks)))
    assert "".join(chunk["text"] for chunk in chunks) == last["text"] == alone["text"]
    assert last["done"] is True


async def test_eight_requests_are_decoded_in_one_batch(tmp_path: Path, long_model: Path) -> None:
    add_worker(tmp_path, "tiny", long_model, WORKER_CONCURRENCY=8)
    async with build(tmp_path, "tiny", embedded_nats="off") as node:
        worker = await node.fleet.settled("tiny")
        async with httpx2.AsyncClient(base_url=node.gateway_url, trust_env=False, timeout=30) as http:
            body = {"input": "hello", "params": {"max_tokens": 200, "ignore_eos": True, "temperature": 0}}
            replies = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(8)))
        assert len({reply.json()["text"] for reply in replies}) == 1
        assert worker.counters.max_batch_sequences == 8


async def test_a_burst_beyond_the_queue_is_refused_with_figures(node: Node, http: httpx2.AsyncClient) -> None:
    body = {"input": "hello", "params": ENDLESS | {"max_tokens": 200}}
    limits = httpx2.Limits(max_connections=300)
    async with httpx2.AsyncClient(base_url=node.gateway_url, limits=limits, timeout=60, trust_env=False) as many:
        answers = await asyncio.gather(*(many.post("/v1/completions", json=body) for _ in range(200)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len([answer for answer in answers if answer.status_code == 200]) == 200 - len(refused)
    assert refused, "a queue of 16 and 4 slots cannot take 200 at once"
    assert int(refused[0].headers["retry-after"]) >= 1
    assert refused[0].json()["code"] == "queue_full"
    assert refused[0].json()["queue_depth"] == 16
    await audited(node)
    assert rows(node, "SELECT status, COUNT(*) FROM requests GROUP BY status ORDER BY status") == [
        ("ok", 200 - len(refused)),
        ("rejected", len(refused)),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_its_own_request_and_no_other(
    node: Node, http: httpx2.AsyncClient, stream: bool
) -> None:
    async def leave() -> None:
        async with http.stream(
            "POST", "/v1/completions", json={"req_id": "gone", "input": "hello", "params": ENDLESS, "stream": stream}
        ) as response:
            await response.aread()

    other = asyncio.create_task(
        http.post("/v1/completions", json={"req_id": "stays", "input": "x", "params": ENDLESS | {"max_tokens": 2000}})
    )
    gone = asyncio.create_task(leave())
    await begun(node, 2)
    finished = asyncio.create_task(until(node, lambda event: isinstance(event, RequestFinished)))
    await asyncio.sleep(0)
    gone.cancel()
    ended = await finished
    assert isinstance(ended, RequestFinished)
    assert (ended.req_id, ended.finish_reason) == ("gone", "cancelled")
    assert (await other).json()["tokens_out"] == 2000
    await audited(node)
    assert rows(node, "SELECT status FROM requests WHERE req_id='gone'") == [("cancelled",)]


async def test_a_client_that_leaves_in_prefill_stops_it(node: Node, http: httpx2.AsyncClient) -> None:
    finished = asyncio.create_task(until(node, lambda event: isinstance(event, RequestFinished)))
    text = "long " * 3000
    leaving = asyncio.create_task(http.post("/v1/completions", json={"input": text, "params": ENDLESS}))
    while not any(generation.running for generation in node.service.live()):
        await asyncio.sleep(0)
    leaving.cancel()
    ended = await finished
    assert isinstance(ended, RequestFinished)
    assert (ended.finish_reason, ended.tokens_out) == ("cancelled", 0)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "bad_request", None),
        (b"[]", 400, "bad_request", None),
        (b"\xff\xfe{}", 400, "bad_request", None),
        ({"model": "tiny"}, 400, "bad_request", "input"),
        ({"input": ""}, 400, "bad_request", "input"),
        ({"input": 7}, 400, "bad_request", "input"),
        ({"input": "x", "prompt": "y"}, 400, "bad_request", "input"),
        ({"input": "x", "surprise": 1}, 400, "bad_request", "surprise"),
        ({"input": "x", "reply_to": "a.b"}, 400, "unsupported", "reply_to"),
        ({"input": "x", "params": {"max_tokens": "5"}}, 400, "bad_request", "params.max_tokens"),
        ({"input": "x", "params": {"seed": True}}, 400, "bad_request", "params.seed"),
        ({"input": "x", "params": {"stop": ["a", 1]}}, 400, "bad_request", "params.stop.1"),
        ({"input": "x", "params": {"max_tokens": 0}}, 400, "bad_request", "params.max_tokens"),
        ({"input": "x", "params": {"temperature": -1}}, 400, "bad_request", "params.temperature"),
        (b'{"input": "x", "params": {"temperature": NaN}}', 400, "bad_request", None),
        ({"input": "x", "params": {"grammar": "nobody"}}, 404, "grammar_not_found", "params.grammar"),
        ({"input": "x", "params": {"grammar": "../envs/x"}}, 400, "bad_request", "params.grammar"),
        ({"input": "x", "params": {"grammar": "root ::= x"}}, 422, "grammar_invalid", "params.grammar"),
        ({"input": "x", "params": {"json_schema": {"not": {}}}}, 422, "schema_invalid", "params.json_schema"),
        ({"input": "x", "model": "nobody"}, 404, "model_not_found", "model"),
        ({"input": "x" * 20_000}, 400, "context_length_exceeded", "input"),
        ({"input": "x" * (9 * 2**20)}, 413, "too_large", None),
    ],
)
async def test_bad_input_has_a_clear_error(
    http: httpx2.AsyncClient, body: Any, status: int, code: str, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await http.post("/v1/completions", content=content)
    told = answer.json()
    assert (answer.status_code, told["code"], told.get("param")) == (status, code, param), told
    assert told["status"] == status
    assert told["error"]


async def test_a_long_input_names_both_counts_and_a_large_body_passes(http: httpx2.AsyncClient) -> None:
    told = (await http.post("/v1/completions", json={"input": "x" * 5 * 2**20})).json()
    assert told["code"] == "context_length_exceeded"
    assert "16384 tokens" in told["error"]
    assert str(5 * 2**20 + 29) in told["error"] or "52428" in told["error"]


async def test_max_tokens_beyond_the_context_ends_with_length(tmp_path: Path, long_model: Path) -> None:
    add_worker(tmp_path, "tiny", long_model, CTX_SIZE=256)
    async with build(tmp_path, "tiny", embedded_nats="off") as node:
        await node.fleet.settled("tiny")
        async with httpx2.AsyncClient(base_url=node.gateway_url, trust_env=False, timeout=30) as http:
            reply = (await http.post("/v1/completions", json={"input": "hello", "params": ENDLESS})).json()
    assert reply["finish_reason"] == "length"
    assert reply["tokens_in"] + reply["tokens_out"] == 256


async def test_a_model_that_cannot_load_fails_alone(
    tmp_path: Path, long_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transports.http.health.BUS_PATIENCE_S", 0)
    add_worker(tmp_path, "good", long_model)
    add_worker(tmp_path, "missing", None)
    add_worker(tmp_path, "cut", long_model)
    add_worker(tmp_path, "text", long_model)
    add_worker(tmp_path, "huge", long_model, WORKER_CONCURRENCY=64, CTX_SIZE=0)
    models = tmp_path / "data/models"
    (models / "cut/model.gguf").write_bytes(long_model.read_bytes()[:50_000])
    (models / "text/model.gguf").write_bytes(b"no model at all")
    names = ("good", "missing", "cut", "text", "huge")
    async with build(tmp_path, *names, embedded_nats="off", memory_limit="500M") as node:
        workers = {name: await node.fleet.settled(name) for name in names}
        assert workers["good"].state is ModelState.READY
        reasons = {name: worker.reason or "" for name, worker in workers.items() if worker.state is ModelState.FAILED}
        assert "is missing" in reasons["missing"]
        assert "truncated" in reasons["cut"]
        assert "not a GGUF" in reasons["text"]
        assert "GiB" in reasons["huge"]
        async with httpx2.AsyncClient(base_url=node.gateway_url, trust_env=False) as http:
            assert (await http.post("/v1/completions", json={"input": "x", "params": {"max_tokens": 1}})).is_success
            refused = await http.post("/v1/completions", json={"input": "x", "model": "cut"})
            assert (refused.status_code, refused.json()["code"]) == (503, "model_not_loaded")
            assert "truncated" in refused.json()["error"]
            await until(node, is_broker("down"), replay=True)
            assert (await http.get("/healthz")).status_code == 200


async def test_load_and_unload_over_http(node: Node, http: httpx2.AsyncClient) -> None:
    port = node.fleet.get("tiny").endpoint
    assert (await http.get(f"{port}/healthz")).json()["status"] == "ok"
    assert (await http.post("/api/models/tiny/unload")).status_code == 200
    assert node.fleet.get("tiny").state is ModelState.ON_DISK
    with pytest.raises(httpx2.ConnectError):
        await http.get(f"{port}/healthz")
    ready = asyncio.create_task(
        until(node, lambda event: isinstance(event, ModelStateChanged) and event.state is ModelState.READY)
    )
    await asyncio.sleep(0)
    assert (await http.post("/api/models/tiny/load")).status_code == 202
    await ready
    assert (await http.post("/v1/completions", json={"input": "x", "params": {"max_tokens": 1}})).is_success


async def test_the_end_of_a_node_ends_streams_with_a_final_event(home: Path) -> None:
    node = build(home, "tiny", embedded_nats="off")
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(node)
        await node.fleet.settled("tiny")
        async with httpx2.AsyncClient(base_url=node.gateway_url, trust_env=False, timeout=30) as http:
            body = {"input": "x", "params": ENDLESS, "stream": True}
            answer = asyncio.create_task(http.post("/v1/completions", json=body))
            await begun(node)
            await stack.aclose()
            last = stream_events((await answer).text)[-1]
    assert last["done"] is True
    assert last["finish_reason"] == "cancelled"


async def test_one_node_a_home(node: Node) -> None:
    with pytest.raises(HomeError, match=r"a node already runs .*node alpha, pid \d+"):
        async with build(node.home.root, "tiny", embedded_nats="off"):
            pass


async def test_a_taken_port_ends_the_start_and_gives_the_home_back(home: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(StartError, match=str(taken)):
            async with build(home, "tiny", gateway=f":{taken}", embedded_nats="off"):
                pass
    async with build(home, "tiny", embedded_nats="off"):
        pass


async def test_a_worker_file_is_read_when_its_model_is_loaded(home: Path, long_model: Path) -> None:
    """One that is put there, or changed, while the node runs."""
    async with (
        build(home, embedded_nats="off") as node,
        httpx2.AsyncClient(base_url=node.gateway_url, trust_env=False, timeout=30) as http,
    ):

        async def load(name: str) -> tuple[int, str]:
            answer = await http.post(f"/api/models/{name}/load")
            return answer.status_code, answer.json().get("error", "")

        assert await load("mine") == (404, "no model 'mine'; there are: tiny")
        add_worker(home, "mine", long_model, CTX_SIZE="many")
        file = home / "envs/worker.mine.env"
        status, said = await load("mine")
        assert (status, "worker.mine.env:4: CTX_SIZE: " in said) == (409, True), said
        file.write_text("CTX_SIZE=256\nHTTP_ADDR=:0\n")
        assert await load("mine") == (202, "")
        worker = await node.fleet.settled("mine")
        assert (worker.state, worker.n_ctx) == (ModelState.READY, 256)
        assert (await http.post("/v1/completions", json={"input": "x", "params": {"max_tokens": 1}})).is_success
        # What runs is left as it is; what rests is read again.
        file.write_text("CTX_SIZE=512\n")
        assert await load("mine") == (202, "")
        assert worker.n_ctx == 256
        assert (await http.post("/api/models/mine/unload")).is_success
        assert await load("mine") == (202, "")
        assert (await node.fleet.settled("mine")) is worker
        assert (worker.n_ctx, worker.endpoint) == (512, "")
        assert (await http.post("/api/models/mine/unload")).is_success
        file.write_text("DB_PATH=elsewhere.sqlite\n")
        status, said = await load("mine")
        assert (status, "it was data/logs/mine.sqlite when the node started" in said) == (409, True)
        file.unlink()
        assert await load("mine") == (202, "")
        assert (await node.fleet.settled("mine")).n_ctx == 512


async def test_a_failed_model_is_loaded_with_what_was_mended(home: Path) -> None:
    async with build(home, embedded_nats="off", memory_limit="500M") as node:
        await node.fleet.settled("tiny")  # its header is read
        file = home / "envs/worker.tiny.env"
        text = file.read_text()
        file.write_text(text + "MODEL_PATH=data/models/nobody.gguf\n")
        await node.load("tiny")
        worker = await node.fleet.settled("tiny")
        assert "nobody.gguf is missing" in (worker.reason or "")
        file.write_text(text.replace("HTTP_ADDR=:0", "HTTP_ADDR=:1"))
        with pytest.raises(ConfigError, match="unload it first"):
            await node.load("tiny")
        file.write_text(text)
        await node.load("tiny")
        assert (await node.fleet.settled("tiny")).state is ModelState.READY
        await worker.audit.flush()
        codes = [code for (code,) in rows(node, "SELECT code FROM events ORDER BY id")]
    # What the node as a whole did before anybody asked for the model stands in its file too.
    before = ["startup", "services.init", "health.started", "monitoring.started", "server.ready"]
    assert codes == [*before, "model.loading", "model.failed", "model.loading", "model.loaded"]


def test_wrong_choices_are_told_before_anything_starts(home: Path, long_model: Path) -> None:
    with pytest.raises(UnknownModel, match="nobody"):
        build(home, "nobody")
    add_worker(home, "first", long_model, HTTP_ADDR=":7001")
    add_worker(home, "second", long_model, HTTP_ADDR=":7001")
    with pytest.raises(ConfigError, match="both want port 7001"):
        build(home, "first", "second")
    with pytest.raises(ConfigError, match="INFSVC_API_KEYS is empty"):
        build(home, "tiny", bind="0.0.0.0")


async def test_a_nats_request_receives_the_answer(home: Path) -> None:
    async with build(home, "tiny") as node:
        await node.fleet.settled("tiny")
        await until(node, is_broker("connected"), replay=True)
        client = await nats.connect(node.settings.nats_url)
        try:
            body = {"req_id": "n1", "input": "hello", "params": {"max_tokens": 6, "temperature": 0}}
            answer = await client.request("inference.request.tiny", json.dumps(body).encode(), timeout=20)
            reply = json.loads(answer.data)
            assert (reply["req_id"], reply["tokens_out"]) == ("n1", 6)

            inbox = client.new_inbox()
            stream = await client.subscribe(inbox)
            await client.publish(
                "inference.request.tiny", json.dumps(body | {"stream": True, "req_id": "n2"}).encode(), reply=inbox
            )
            text = ""
            while True:
                event = json.loads((await stream.next_msg(timeout=20)).data)
                if event.get("done"):
                    break
                text += event["text"]
            assert text == event["text"] == reply["text"]

            health = json.loads((await client.request("models.tiny.health", b"{}", timeout=20)).data)
            assert (health["status"], health["nats_topic"]) == ("online", "inference.request.tiny")
            refused = json.loads((await client.request("inference.request.tiny", b"{", timeout=20)).data)
            assert (refused["status"], refused["code"]) == (400, "bad_request")
        finally:
            await client.close()
        await audited(node)
        assert rows(node, "SELECT req_id, source, status FROM requests ORDER BY id")[:2] == [
            ("n1", "nats", "ok"),
            ("n2", "nats", "ok"),
        ]


async def test_http_goes_on_without_the_broker_and_nats_comes_back(home: Path) -> None:
    async with build(home, "tiny") as node:
        await node.fleet.settled("tiny")
        await until(node, is_broker("connected"), replay=True)
        down = asyncio.create_task(until(node, is_broker("down")))
        await asyncio.sleep(0)
        started = await until(node, lambda event: getattr(event, "code", "") == "broker.started", replay=True)
        assert isinstance(started, LogLine)
        assert started.meta is not None
        os.kill(started.meta["pid"], signal.SIGKILL)
        await down
        back = asyncio.create_task(until(node, is_broker("connected")))
        async with httpx2.AsyncClient(base_url=node.gateway_url, trust_env=False) as http:
            body = {"input": "x", "params": {"max_tokens": 1}}
            assert (await http.post("/v1/completions", json=body)).is_success
        await back
        client = await nats.connect(node.settings.nats_url)
        try:
            answer = await client.request("inference.request.tiny", json.dumps(body).encode(), timeout=20)
            assert json.loads(answer.data)["tokens_out"] == 1
        finally:
            await client.close()


async def test_the_log_shows_a_request_as_soon_as_it_is_answered(http: httpx2.AsyncClient) -> None:
    for number in range(20):
        body = {"req_id": f"r{number}", "input": "x", "params": {"max_tokens": 1}}
        await http.post("/v1/completions", json=body)
        newest = (await http.get("/logs", params={"model": "tiny", "limit": 1})).json()["rows"][0]
        assert newest["req_id"] == f"r{number}"


async def test_the_logger_is_left_as_it_was_found(home: Path) -> None:
    logger = logging.getLogger("infsvc")
    before = (logger.level, logger.propagate, list(logger.handlers))
    async with build(home, embedded_nats="off", log_level="error"):
        assert (logger.level, logger.propagate) == (logging.ERROR, False)
    assert (logger.level, logger.propagate, logger.handlers) == before


async def test_the_metrics_of_a_request(http: httpx2.AsyncClient) -> None:
    body = {"input": "hello", "params": {"max_tokens": 5, "temperature": 0}}
    reply = (await http.post("/v1/completions", json=body)).json()
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    told = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert told['infsvc_request_success_total{finished_reason="length",model="tiny"}'] == "1.0"
    assert told['infsvc_generation_tokens_total{model="tiny"}'] == "5.0"
    assert float(told['infsvc_prompt_tokens_total{model="tiny"}']) == reply["tokens_in"]
    assert told['infsvc_time_to_first_token_seconds_count{model="tiny"}'] == "1.0"
    assert told['infsvc_model_state{model="tiny",state="ready"}'] == "1.0"
    assert told['infsvc_num_requests_running{model="tiny"}'] == "0.0"
