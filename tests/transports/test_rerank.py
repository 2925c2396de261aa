"""`POST /v1/rerank` the whole way: real clients over HTTP, a node with two rerankers and one model that is none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gguf
import httpx2
import pytest

from tests.bert_files import Bert, random_bert, write_bert
from tests.nodes import add_worker, build
from tests.tiny_families import write_tiny_qwen3, write_tiny_reranker
from transports.http.answers import Ranking
from transports.node import Node


@pytest.fixture(scope="module")
def bert() -> Bert:
    return random_bert(n_scores=1)


@pytest.fixture
async def node(tmp_path: Path, bert: Bert) -> AsyncIterator[Node]:
    add_worker(tmp_path, "rank", write_bert(tmp_path / "r", bert, pooling=gguf.PoolingType.RANK), QUEUE_MAX_MSGS=2)
    add_worker(tmp_path, "judge", write_tiny_reranker(tmp_path / "j"), CTX_SIZE=0, MODEL_FORMAT="embedding")
    add_worker(tmp_path, "tiny", write_tiny_qwen3(tmp_path / "t"), CTX_SIZE=64)
    async with build(tmp_path, "rank", "judge", "tiny", embedded_nats="off") as node:
        for name in ("rank", "judge", "tiny"):
            worker = await node.fleet.settled(name)
            assert worker.state == "ready", worker.reason
        yield node


@pytest.fixture
async def http(node: Node) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=node.gateway_url, timeout=30, trust_env=False) as client:
        yield client


async def rows(node: Node) -> list[dict[str, Any]]:
    await node._audits["rank"].flush()
    return list(await node.logs.rows("rank", limit=100))


DOCUMENTS = ["world", "the world", {"text": "hello"}, "abc"]


async def ask(http: httpx2.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await http.post("/v1/rerank", json={"model": "rank", "query": "hello", "documents": DOCUMENTS} | body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    Ranking.model_validate(told)
    return told


async def test_the_order_is_the_models_own(node: Node, http: httpx2.AsyncClient, bert: Bert) -> None:
    answer = await ask(http, req_id="mine", trace_id="t1")
    words = (["world"], ["the", "world"], ["hello"], ["a", "##b", "##c"])
    pairs = [[bert.tokens.index(word) for word in ("[CLS]", "hello", "[SEP]", *each, "[SEP]")] for each in words]
    scores = [float(bert.scores(pair)[0]) for pair in pairs]
    found = {each["index"]: each["relevance_score"] for each in answer["results"]}
    assert [found[index] for index in range(4)] == pytest.approx(scores, abs=2e-3)
    assert list(found) == sorted(found, key=lambda index: -found[index])
    n_tokens = sum(map(len, pairs))
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    assert (answer["object"], answer["model"]) == ("list", "rank")
    (row,) = await rows(node)
    assert (row["req_id"], row["trace_id"], row["status"], row["tokens_in"]) == ("mine", "t1", "ok", n_tokens)
    assert '"query": "hello"' in row["raw_input"]


async def test_the_best_with_their_texts(http: httpx2.AsyncClient) -> None:
    whole = await ask(http)
    answer = await ask(http, top_n=2, return_documents=True)
    assert [each["index"] for each in answer["results"]] == [each["index"] for each in whole["results"][:2]]
    for each in answer["results"]:
        given = DOCUMENTS[each["index"]]
        assert each["document"]["text"] == (given["text"] if isinstance(given, dict) else given)
    assert "document" not in whole["results"][0]
    assert len((await ask(http, top_n=99))["results"]) == 4


async def test_a_generating_architecture_that_ranks(http: httpx2.AsyncClient) -> None:
    answer = await ask(http, model="judge", documents=["one", "another one", ""])
    assert len(answer["results"]) == 3
    assert all(0 < each["relevance_score"] < 1 for each in answer["results"])


async def test_what_a_reranker_is_and_is_not(node: Node, http: httpx2.AsyncClient) -> None:
    models = {each["id"]: each["capabilities"] for each in (await http.get("/v1/models")).json()["data"]}
    assert models["rank"] == models["judge"] == ["reranking"]
    assert "reranking" not in models["tiny"]
    for path, body, says in (
        ("/v1/rerank", {"model": "tiny", "query": "q", "documents": ["d"]}, "tiny is no reranker: no pooling type"),
        ("/v1/embeddings", {"model": "rank", "input": "x"}, "it answers with a score, at /v1/rerank"),
        ("/v1/chat/completions", {"model": "rank", "messages": [{"role": "user", "content": "x"}]}, "generates no"),
    ):
        answer = await http.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "bad_request", "model")
        assert says in error["message"]
    assert [row["status"] for row in await rows(node)] == ["rejected", "rejected"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "query", "the body has no query: send a text"),
        ({"query": "q"}, "documents", "the body has no documents: send a list of texts"),
        ({"query": "", "documents": ["d"]}, "query", "query: String should have at least 1 character"),
        ({"query": 1, "documents": ["d"]}, "query", "query: Input should be a valid string"),
        ({"query": "q", "documents": []}, "documents", "documents: a list of at least one text"),
        ({"query": "q", "documents": "d"}, "documents", "documents: a list of at least one text"),
        ({"query": "q", "documents": ["d", 1]}, "documents", "document 1 is no text"),
        ({"query": "q", "documents": [{"text": "d", "id": 1}]}, "documents", "document 0 is no text"),
        ({"query": "q", "documents": ["d"] * 2049}, "documents", "2049 documents; one request may have 2048"),
        ({"query": "q", "documents": ["d"], "top_n": 0}, "top_n", "top_n: Input should be greater than or equal to 1"),
        ({"query": "q", "documents": ["d"], "texts": ["d"]}, "texts", "texts: there is no such field"),
    ],
)
async def test_wrong_requests(http: httpx2.AsyncClient, body: dict[str, Any], param: str, says: str) -> None:
    answer = await http.post("/v1/rerank", json={"model": "rank"} | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "bad_request", param)
    assert says in error["message"]


async def test_a_pair_is_never_cut(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/v1/rerank", json={"model": "rank", "query": "hello", "documents": ["a", "the " * 61]})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "documents")
    assert error["message"] == (
        "document 1, with the query, has 65 tokens and one text may have 64: shorten or split it"
    )


async def test_a_client_that_leaves_stops_its_own(node: Node, http: httpx2.AsyncClient) -> None:
    many = ["the world of hello " * 10] * 2048
    with pytest.raises(httpx2.ReadTimeout):
        await http.post("/v1/rerank", json={"model": "rank", "query": "hello", "documents": many}, timeout=0.3)
    assert len((await ask(http))["results"]) == 4
    assert sorted(row["status"] for row in await rows(node)) == ["cancelled", "ok"]
