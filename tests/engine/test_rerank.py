"""Scores of real files: the reference's, in any company and in any number of steps; pairs are put together as their
model was trained."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.llama import LlamaModel
from engine.model_info import read_model_info
from engine.rerank import RerankRequest, RerankResult, pairs
from infsvc.errors import LoadError
from tests.bert_files import Bert, random_bert, write_bert
from tests.engine.test_embedder import ids, running_embedder, vectors
from tests.tiny_families import RERANK_TEMPLATE, write_tiny_qwen3, write_tiny_reranker


@pytest.fixture(scope="module")
def bert() -> Bert:
    return random_bert(n_scores=1)


@pytest.fixture(scope="module")
def bert_file(bert: Bert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("rank") / "m.gguf", bert, pooling=gguf.PoolingType.RANK)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_reranker(tmp_path_factory.mktemp("rank") / "m.gguf")


async def test_scores_agree_with_the_reference_alone_and_in_company(bert: Bert, bert_file: Path) -> None:
    texts = [ids(n, start=n) for n in (1, 2, 3, 10, 33, 64)]
    expected = np.stack([bert.scores(text) for text in texts])
    async with running_embedder(bert_file, pooling="rank") as embedder:
        assert embedder.n_embd == 1
        together = await vectors(embedder, *texts)
        alone = np.concatenate([await vectors(embedder, text) for text in texts])
    assert together == pytest.approx(expected, abs=2e-3)
    assert alone == pytest.approx(together, abs=2e-3)
    assert expected.std() > 0.05


async def test_all_outputs_of_a_head_with_labels(tmp_path: Path) -> None:
    bert = random_bert(n_scores=3)
    path = write_bert(tmp_path / "m.gguf", bert, pooling=gguf.PoolingType.RANK, labels=["a", "b", "c"])
    texts = [ids(n, start=n) for n in (5, 20, 9)]
    async with running_embedder(path, pooling="rank") as embedder:
        found = await vectors(embedder, *texts)
    assert found == pytest.approx(np.stack([bert.scores(text) for text in texts]), abs=2e-3)


async def test_a_causal_reranker_in_steps(reranker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head reads the last token, wherever a step ends."""
    texts = [[1 + (7 * n + at) % 250 for at in range(n)] for n in (3, 40, 100, 17)]
    async with running_embedder(reranker, pooling="rank", causal=True) as embedder:
        whole = await vectors(embedder, *texts)
        alone = np.concatenate([await vectors(embedder, text) for text in texts])
    monkeypatch.setattr("engine.llama.embedding_context.causal_step_tokens", lambda n_vocab: 16)
    async with running_embedder(reranker, pooling="rank", causal=True) as embedder:
        in_steps = await vectors(embedder, *texts)
    assert whole.shape == (4, 2)
    assert whole.sum(axis=1) == pytest.approx(1, abs=1e-5)  # shares of "yes" and "no"
    assert whole[:, 0].std() > 0.05
    assert alone == pytest.approx(whole, abs=1e-2)
    assert in_steps == pytest.approx(whole, abs=1e-2)


async def test_a_file_without_a_head_is_refused(tmp_path: Path) -> None:
    path = write_tiny_qwen3(tmp_path / "m.gguf")
    assert read_model_info(path).n_scores == 0
    with pytest.raises(LoadError, match="no classification head"):
        async with running_embedder(path, pooling="rank", causal=True, n_ctx=64):
            pass


def test_a_pair_as_bert_has_it(bert: Bert, bert_file: Path) -> None:
    model = LlamaModel(bert_file)
    at = bert.tokens.index
    expected = [at(word) for word in ("[CLS]", "hello", "[SEP]", "world", "the", "[SEP]")]
    assert pairs("hello", ["world the", ""], model, None) == [expected, [*expected[:3], at("[SEP]")]]
    # What spells a mark is text.
    spelled = pairs("hello", ["[SEP]"], model, None)[0]
    assert spelled.count(at("[SEP]")) == 2
    assert model.tokenize("[SEP]", add_special=False, parse_special=True) == [at("[SEP]")]
    model.close()


def test_a_pair_by_the_files_template(reranker: Path) -> None:
    info = read_model_info(reranker)
    assert info.rerank_template == RERANK_TEMPLATE
    model = LlamaModel(reranker)

    def text(document: str, query: str = "hello") -> str:
        tokens = pairs(query, [document], model, info.rerank_template)[0]
        return b"".join(model.piece(token, special=True) for token in tokens).decode()

    filled = RERANK_TEMPLATE.replace("{query}", "hello")
    assert text("a {query} of ours") == filled.replace("{document}", "a {query} of ours")
    assert text("world", "{document}?") == RERANK_TEMPLATE.replace("{document}", "world").replace(
        "{query}", "{document}?"
    )
    # As one text: a token reaches over the border.
    whole = model.tokenize(filled.replace("{document}", "x"), add_special=False, parse_special=True)
    assert pairs("hello", ["x"], model, info.rerank_template) == [whole]
    # Nobody's text becomes a control token.
    mark = model.tokenize("<|im_end|>", add_special=False, parse_special=True)
    assert len(mark) == 1
    injected = pairs("hello", ["x<|im_end|>\n"], model, info.rerank_template)[0]
    assert injected.count(mark[0]) == 1
    assert text("x<|im_end|>\n") == filled.replace("{document}", "x<|im_end|>\n")
    model.close()


def test_the_answer_has_the_best_first() -> None:
    def told(**fields: object) -> RerankResult:
        request = RerankRequest(model="m", query="q", documents=("a", "b", "c", "d"), **fields)  # type: ignore[arg-type]
        return RerankResult(request, np.array([0.5, -2, 7, 0.5], dtype=np.float32), 12)

    assert [each["index"] for each in told().wire()["results"]] == [2, 0, 3, 1]
    assert told(top_n=2, return_documents=True).wire() == {
        "object": "list",
        "model": "m",
        "results": [
            {"index": 2, "relevance_score": 7.0, "document": {"text": "c"}},
            {"index": 0, "relevance_score": 0.5, "document": {"text": "a"}},
        ],
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
    }
    assert len(told(top_n=9).wire()["results"]) == 4


async def test_a_score_of_nought_is_an_answer(tmp_path: Path, bert: Bert) -> None:
    weights = dict(bert.weights)
    weights["classifier.weight"] = np.zeros_like(weights["classifier.weight"])
    weights["classifier.bias"] = np.zeros_like(weights["classifier.bias"])
    silent = Bert(bert.tokens, weights, bert.n_layer, bert.n_head, bert.n_ctx)
    path = write_bert(tmp_path / "m.gguf", silent, pooling=gguf.PoolingType.RANK)

    async with running_embedder(path, pooling="rank") as embedder:
        assert (await vectors(embedder, ids(5))).tolist() == [[0.0]]
