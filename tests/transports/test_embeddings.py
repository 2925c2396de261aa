"""Embeddings the whole way: real clients over HTTP and NATS, a node with an encoder and a generating model."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gguf
import httpx2
import nats
import numpy as np
import openai
import pytest
from nats.aio.client import Client

from infsvc.events import RequestFinished
from tests.bert_files import Bert, random_bert, write_bert
from tests.nodes import ENDLESS, add_worker, build, connected
from transports.node import Node

SUBJECT = "embedding.request.bert-v1.5"


@pytest.fixture(scope="module")
def bert() -> Bert:
    return random_bert()


@pytest.fixture(scope="module")
def files(bert: Bert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder / "bert.gguf", bert)
    write_bert(folder / "rank.gguf", bert, pooling=gguf.PoolingType.RANK)
    return folder


@pytest.fixture
async def node(tmp_path: Path, files: Path, long_model: Path) -> AsyncIterator[Node]:
    embedding = {"MODEL_FORMAT": "embedding", "QUEUE_MAX_MSGS": 2, "WORKER_CONCURRENCY": 1}
    add_worker(tmp_path, "bert-v1.5", files / "bert.gguf", **embedding)
    add_worker(tmp_path, "rank", files / "rank.gguf", **embedding)
    add_worker(tmp_path, "tiny", long_model, CTX_SIZE=16384)
    async with build(tmp_path, "bert-v1.5", "tiny") as node:
        for name in ("bert-v1.5", "tiny"):
            worker = await node.fleet.settled(name)
            assert worker.state == "ready", worker.reason
        yield node


@pytest.fixture
async def http(node: Node) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=node.gateway_url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
async def bus(node: Node) -> AsyncIterator[Client]:
    async with asyncio.timeout(20):
        await connected(node.events)
    client = await nats.connect(node.settings.nats_url)
    yield client
    await client.close()


def unit(bert: Bert, *ids: int, n: int = 64) -> np.ndarray:
    vector = bert.embed(ids)[:n]
    return vector / np.linalg.norm(vector)


HELLO_WORLD = ("[CLS]", "hello", "world", "[SEP]")


async def rows(node: Node, model: str = "bert-v1.5") -> list[dict[str, Any]]:
    await node._audits[model].flush()
    return list(await node.logs.rows(model, limit=100))


# -- answers -------------------------------------------------------------------------------------------------------


async def test_openais_client_gets_the_references_vectors(node: Node, bert: Bert) -> None:
    ids = [bert.tokens.index(token) for token in HELLO_WORLD]
    async with openai.AsyncOpenAI(base_url=f"{node.gateway_url}/v1", api_key="none", max_retries=0) as client:
        one = await client.embeddings.create(model="bert-v1.5", input="hello world")
        assert (one.object, one.model, one.usage.prompt_tokens, one.usage.total_tokens) == ("list", "bert-v1.5", 4, 4)
        assert np.array(one.data[0].embedding) @ unit(bert, *ids) > 0.9995
        as_float = await client.embeddings.create(model="bert-v1.5", input="hello world", encoding_format="float")
        assert as_float.data[0].embedding == one.data[0].embedding
        many = await client.embeddings.create(model="bert-v1.5", input=["hello", "hello world", "the world"], user="me")
        assert [item.index for item in many.data] == [0, 1, 2]
        assert np.array(many.data[1].embedding) @ np.array(one.data[0].embedding) > 0.9999
        of_tokens = await client.embeddings.create(model="bert-v1.5", input=ids)
        assert np.array(of_tokens.data[0].embedding) @ np.array(one.data[0].embedding) > 0.9999
        lists = await client.embeddings.create(model="bert-v1.5", input=[ids, ids[:2]])
        assert (len(lists.data), lists.usage.prompt_tokens) == (2, 6)
        short = await client.embeddings.create(model="bert-v1.5", input="hello world", dimensions=10)
        assert len(short.data[0].embedding) == 10
        assert np.array(short.data[0].embedding) @ unit(bert, *ids, n=10) > 0.9995
        with pytest.raises(openai.BadRequestError, match="dimensions") as refused:
            await client.embeddings.create(model="bert-v1.5", input="hello", dimensions=65)
        assert (refused.value.param, refused.value.code) == ("dimensions", "bad_request")
        with pytest.raises(openai.NotFoundError, match="no model"):
            await client.embeddings.create(model="nobody", input="hello")


async def test_a_row_and_events_for_each(node: Node, http: httpx2.AsyncClient) -> None:
    body = {"model": "bert-v1.5", "input": ["hello", "world"], "req_id": "e1", "trace_id": "t1", "dimensions": 8}
    answer = await http.post("/v1/embeddings", json=body)
    assert (answer.status_code, answer.headers["x-req-id"]) == (200, "e1")
    refused = await http.post("/v1/embeddings", json=body | {"req_id": "e2", "dimensions": 100})
    assert refused.status_code == 400
    second, first = await rows(node)
    assert (first["req_id"], first["trace_id"], first["source"], first["status"]) == ("e1", "t1", "http", "ok")
    assert (json.loads(first["raw_input"]), first["tokens_in"], first["tokens_out"]) == (["hello", "world"], 6, 0)
    assert json.loads(first["params_json"]) == {"dimensions": 8}
    assert (second["req_id"], second["status"]) == ("e2", "rejected")
    assert second["error"].startswith("bad_request: dimensions")
    health = (await http.get("/api/services/bert-v1.5")).json()
    assert health["capabilities"] == ["embeddings"]
    assert health["queue_metrics"]["total_processed"] == 1
    assert health["model_info"]["modalities"] == ["embeddings"]


async def test_a_generating_model_embeds_beside_its_stream(node: Node, http: httpx2.AsyncClient) -> None:
    """The mean of its hidden states; its context is made at the first request, and goes with the model."""
    worker = node.fleet.get("tiny")
    assert worker.embedder is None
    endless = asyncio.create_task(
        http.post("/v1/completions", json={"model": "tiny", "input": "hi", "params": ENDLESS})
    )
    answers = await asyncio.gather(
        *(http.post("/v1/embeddings", json={"model": "tiny", "input": ["one", "two words"]}) for _ in range(4))
    )
    vectors = np.array([[item["embedding"] for item in answer.json()["data"]] for answer in answers])
    assert vectors.shape == (4, 2, 64)
    assert np.allclose(np.linalg.norm(vectors, axis=2), 1, atol=1e-5)
    assert (vectors * vectors[0]).sum(axis=2).min() > 0.999
    assert worker.embedder is not None
    endless.cancel()
    await node.unload("tiny")
    assert worker.embedder is None
    assert worker.state == "on_disk"


async def test_base64_is_the_same_numbers(http: httpx2.AsyncClient) -> None:
    body = {"model": "bert-v1.5", "input": "hello"}
    plain = (await http.post("/v1/embeddings", json=body)).json()["data"][0]["embedding"]
    coded = (await http.post("/v1/embeddings", json=body | {"encoding_format": "base64"})).json()["data"][0][
        "embedding"
    ]
    assert np.frombuffer(base64.b64decode(coded), dtype="<f4").tolist() == plain


# -- refusals ------------------------------------------------------------------------------------------------------

BAD = [
    ({}, "input", "the body has no input"),
    ({"input": ""}, "input", "an empty text"),
    ({"input": []}, "input", "an empty list"),
    ({"input": ["a", ""]}, "input", "text 1 is empty"),
    ({"input": [[]]}, "input", "item 0 is an empty list"),
    ({"input": [[1], []]}, "input", "item 1 is an empty list"),
    ({"input": None}, "input", "not null"),
    ({"input": 5}, "input", "not a number"),
    ({"input": {"text": "a"}}, "input", "not an object"),
    ({"input": ["a", 5]}, "input", "item 1 is a number"),
    ({"input": [5, "a"]}, "input", "item 1 is a text"),
    ({"input": [True]}, "input", "item 0 is a boolean"),
    ({"input": [1.5]}, "input", "item 0 is a number"),
    ({"input": [[1, "a"]]}, "input", "item 0 holds a text"),
    ({"input": [-1]}, "input", "the token id -1"),
    ({"input": [[1], [99999]]}, "input", "input 1 holds the token id 99999, and the vocabulary has"),
    ({"input": ["a"] * 2049}, "input", "2049 texts; one request may have 2048"),
    ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
    ({"input": "a", "dimensions": 65}, "dimensions", "vectors of 64 values"),
    ({"input": "a", "dimensions": "8"}, "dimensions", "valid integer"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
    ({"input": "a", "truncate": True}, "truncate", "there is no such field"),
    ({"input": "a", "stream": True}, "stream", "there is no such field"),
    ({"input": "a", "params": {}}, "params", "there is no such field"),
    ({"input": "a", "reply_to": "x"}, "reply_to", "not supported"),
    ({"input": "a", "priority": 1000}, "priority", "less than or equal to 9"),
]


async def test_every_bad_input_has_its_sentence_in_openais_shape(http: httpx2.AsyncClient) -> None:
    for body, param, sentence in BAD:
        answer = await http.post("/v1/embeddings", json={"model": "bert-v1.5"} | body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), body
        assert sentence in error["message"], (body, error)
        assert error["code"] in ("bad_request", "unsupported")


async def test_a_text_is_never_cut(node: Node, http: httpx2.AsyncClient) -> None:
    body = {"model": "bert-v1.5", "input": ["hello", "hello " * 63]}
    answer = await http.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
    assert error["message"] == "input 1 has 65 tokens and one text may have 64: shorten or split it"
    assert (await http.post("/v1/embeddings", json={"model": "bert-v1.5", "input": "hello " * 62})).status_code == 200
    first = (await rows(node))[-1]
    assert (first["status"], first["tokens_in"]) == ("rejected", 65)


async def test_the_wrong_kind_of_model(node: Node, http: httpx2.AsyncClient) -> None:
    text = await http.post("/v1/completions", json={"model": "bert-v1.5", "input": "hello"})
    assert (text.status_code, text.json()["code"], text.json()["param"]) == (400, "bad_request", "model")
    assert "is an embedding model (pooling type mean) and generates no text" in text.json()["error"]
    unloaded = await http.post("/v1/embeddings", json={"model": "rank", "input": "hello"})
    assert (unloaded.status_code, unloaded.json()["error"]["code"]) == (503, "model_not_loaded")
    node.fleet.load("rank")
    worker = await node.fleet.settled("rank")
    assert worker.state == "failed"
    assert "a reranker" in (worker.reason or "")
    method = await http.get("/v1/embeddings")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_too_little_memory_for_the_second_context(node: Node, http: httpx2.AsyncClient) -> None:
    node.fleet._memory_limit_bytes = 1
    answer = await http.post("/v1/embeddings", json={"model": "tiny", "input": "hello"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (503, "cannot_embed", "server_error")
    assert "GiB are free" in error["message"]
    node.fleet._memory_limit_bytes = None
    assert (await http.post("/v1/embeddings", json={"model": "tiny", "input": "hello"})).status_code == 200


# -- the end of a request ------------------------------------------------------------------------------------------


async def held(node: Node, http: httpx2.AsyncClient, n: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`n` requests that wait for a pack which is held."""
    from tests.engine.test_embedder import Gate

    gate = Gate(monkeypatch)
    running = [
        asyncio.create_task(
            http.post("/v1/embeddings", json={"model": "bert-v1.5", "input": "hello", "req_id": f"h{index}"})
        )
        for index in range(n)
    ]
    assert await asyncio.to_thread(gate.reached.wait, 30)
    worker = node.fleet.get("bert-v1.5")
    async with asyncio.timeout(20):
        while len(worker.requests) < n:
            await asyncio.sleep(0.01)
    return gate, running


async def test_a_full_queue_a_cancel_and_a_client_that_left(
    node: Node, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, running = await held(node, http, 3, monkeypatch)
    full = await http.post("/v1/embeddings", json={"model": "bert-v1.5", "input": "x"})
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert full.headers["retry-after"]
    listed = (await http.get("/api/requests")).json()["requests"]
    assert {each["req_id"] for each in listed} == {"h0", "h1", "h2"}
    ended = node.events.subscribe()
    running[1].cancel()
    assert (await http.delete("/api/requests/h2")).status_code == 200
    worker = node.fleet.get("bert-v1.5")
    async with asyncio.timeout(20):
        while not worker.requests["h1"]._asked_to_stop:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
    gate.opened.set()
    cancelled = await running[2]
    assert (cancelled.status_code, cancelled.json()["error"]["code"]) == (499, "cancelled")
    assert (await running[0]).status_code == 200
    reasons: dict[str, str] = {}
    async with asyncio.timeout(20):
        async for event in ended:
            if isinstance(event, RequestFinished):
                reasons[event.req_id] = event.finish_reason
            if len(reasons) == 3:
                break
    assert reasons == {"h0": "stop", "h1": "cancelled", "h2": "cancelled"}
    statuses = {row["req_id"]: row["status"] for row in await rows(node)}
    assert statuses.items() >= {"h0": "ok", "h1": "cancelled", "h2": "cancelled"}.items()


async def test_an_unload_in_the_middle_says_draining(
    node: Node, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, running = await held(node, http, 2, monkeypatch)
    embedder = node.fleet.get("bert-v1.5").embedder
    assert embedder is not None
    embedder.close()
    gate.opened.set()
    codes = {
        (answer.status_code, answer.json().get("error", {}).get("code")) for answer in await asyncio.gather(*running)
    }
    assert codes <= {(503, "draining"), (200, None)}
    await node.unload("bert-v1.5")
    assert node.fleet.get("bert-v1.5").state == "on_disk"


# -- NATS ----------------------------------------------------------------------------------------------------------


async def asked(bus: Client, body: Any, subject: str = SUBJECT) -> dict[str, Any]:
    message = await bus.request(subject, json.dumps(body).encode(), timeout=20)
    answer: dict[str, Any] = json.loads(message.data)
    return answer


async def test_over_nats_the_reply_is_openais_list_with_its_req_id(
    node: Node, bus: Client, http: httpx2.AsyncClient
) -> None:
    copies = await bus.subscribe("copies.here")
    await bus.flush()
    body = {"req_id": "n1", "input": "hello world", "model": "bert-v1.5", "reply_to": "copies.here"}
    answer = await asked(bus, body)
    over_http = (await http.post("/v1/embeddings", json={"model": "bert-v1.5", "input": "hello world"})).json()
    assert answer == {"req_id": "n1"} | over_http
    assert json.loads((await copies.next_msg(timeout=10)).data) == answer
    row = (await rows(node))[-1]
    assert (row["req_id"], row["source"], row["reply_to"], row["status"]) == ("n1", "nats", "copies.here", "ok")
    for wrong, param in (
        ({"input": ""}, "input"),
        ({}, "input"),
        ({"input": "a", "model": "tiny"}, "model"),
        ({"input": "a", "params": {"max_tokens": 5}}, "params"),
        ({"input": "a", "reply_to": "a.*", "req_id": "x"}, "reply_to"),
        ({"input": "hello " * 63}, "input"),
    ):
        refused = await asked(bus, wrong)
        assert (refused["status"], refused["param"]) == (400, param), refused
