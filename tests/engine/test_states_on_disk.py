"""States on disk, with real engines: what a restarted one goes on from changes nothing, and what is damaged is read
anew.

Restarts are engines one after another over one folder; answers are held against a cold engine's, as in
`test_prefix_sharing`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.engine import Engine
from engine.llama import LlamaContext
from engine.prefix_cache import MIN_SHARED, Costs
from engine.service import InferenceRequest
from engine.state_folder import StateFolder
from infsvc.types import Params
from tests.engine.parts import run, running_node, worker_settings
from tests.engine.test_prefix_sharing import SYSTEM, Answer, answer_of, asked, cold, compare_all, engine_on, made_up
from tests.tiny_families import FAMILIES, write_tiny_qwen3

MIB = 2**20


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write(root / f"{name}.gguf") for name, write in FAMILIES.items()}


@pytest.fixture(autouse=True)
def files_always_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model reads faster than any disk, and what is measured on a busy machine is no matter here; the end of an
    engine waits until all is written."""
    monkeypatch.setattr(Costs, "pays", lambda self, n_gained, n_moved: n_gained >= MIN_SHARED)
    monkeypatch.setattr(Costs, "fetching_pays", lambda self, n_gained, n_moved: n_gained >= MIN_SHARED)
    monkeypatch.setattr("engine.engine._LEAVE_S", 30.0)


@asynccontextmanager
async def engine_over(path: Path, folder: Path, **options: Any) -> AsyncIterator[Engine]:
    async with engine_on(path, **{"state_folder": folder, "state_folder_bytes": 64 * MIB} | options) as engine:
        assert engine._folder is not None
        assert await asyncio.to_thread(engine._folder.looked.wait, 20)
        yield engine


def goes_on(prompt: list[int], answer: Answer, seed: int) -> list[int]:
    """The next turn: what was asked and answered, and a message."""
    return [*prompt, *(step.drawn.token for step in answer), *made_up(seed, 15)]


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_restarted_engine_goes_on_and_draws_what_a_cold_one_draws(
    families: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """Three runs of conversations that go on and of prompts with one beginning, and a store of a few states only."""
    path = families[family]
    random = Random(family)
    prompts = [[*SYSTEM, *made_up(seed, 40)] for seed in range(4)] + [made_up(50 + seed, 200) for seed in range(4)]
    n_cached = []
    for turn in range(3):
        expected = await cold(path, prompts)
        async with engine_over(path, tmp_path, prefix_cache_bytes=400_000) as engine:
            order = random.sample(range(len(prompts)), len(prompts))
            groups = [order[:3], order[3:4], order[4:]]
            found = {}
            for group in groups:
                sequences = {at: asked(prompts[at]) for at in group}
                for each in sequences.values():
                    engine.submit(each)
                for at, each in sequences.items():
                    found[at] = await answer_of(each)
            compare_all([found[at] for at in range(len(prompts))], expected)
            counters = engine.counters
            n_cached.append(counters.n_cached_tokens)
            assert counters.n_states_damaged == 0
            assert counters.n_states_read == 0 if turn == 0 else counters.n_states_read > 0
        assert counters.n_states_written > 0 or turn  # a few more tokens are not worth another file
        n_known = sum(map(len, prompts))
        prompts = [goes_on(prompt, found[at], 1000 * turn + at) for at, prompt in enumerate(prompts)]
    # What was read before is there after a restart, save where a state was let go for a longer one.
    assert n_cached[2] > 0.7 * n_known


async def test_a_conversation_goes_on_after_a_restart(families: dict[str, Path], tmp_path: Path) -> None:
    for family, path in families.items():
        folder = tmp_path / family
        async with engine_over(path, folder) as engine:
            first = asked([*SYSTEM, 1, 2, 3])
            await run(engine, first)
            history = goes_on(first.prompt, await answer_of(first), 1)
        async with engine_over(path, folder) as engine:
            assert engine.counters.disk_bytes > 0
            again = asked(history)
            await run(engine, again)
            # A hybrid's store has the state of the prompt already, and does without the answer's few tokens.
            assert again.n_cached in (len(history) - 16, first.n_prompt - 1), family
            assert engine.counters.n_states_read == engine.counters.n_states_restored == 1
            assert engine.counters.n_prefill_tokens == again.n_prompt - again.n_cached
        compare_all([await answer_of(again)], await cold(path, [again.prompt]))


async def test_those_who_begin_alike_wait_for_one_file(families: dict[str, Path], tmp_path: Path) -> None:
    for family, path in families.items():
        folder = tmp_path / family
        async with engine_over(path, folder) as engine:
            first = asked(SYSTEM)
            await run(engine, first)
            history = SYSTEM[:-1] if family == "lfm2" else goes_on(SYSTEM, await answer_of(first), 1)[:-16]
        prompts = [[*history, *made_up(seed, 12)] for seed in range(1, 7)]
        expected = await cold(path, prompts)
        async with engine_over(path, folder, n_slots=3) as engine:
            together = [asked(prompt) for prompt in prompts]
            for each in together:
                engine.submit(each)
            compare_all([await answer_of(each) for each in together], expected)
            assert engine.counters.n_states_read == 1, family
            assert engine.counters.n_prefill_tokens == 6 * 12


async def test_one_that_waits_for_a_file_can_be_cancelled(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = families["qwen3"]
    async with engine_over(path, tmp_path) as engine:
        await run(engine, asked(SYSTEM))
    asking = asyncio.Event()
    loop = asyncio.get_running_loop()

    def forced_silence(folder: StateFolder, filed: object) -> None:
        loop.call_soon_threadsafe(asking.set)

    with monkeypatch.context() as patch:
        patch.setattr(StateFolder, "fetch", forced_silence)
        async with engine_over(path, tmp_path) as engine:
            leaving = asked(SYSTEM)
            engine.submit(leaving)
            await asking.wait()
            # Others are served beside it, and it holds up nobody.
            await run(engine, asked(made_up(5, 30)))
            engine.cancel(leaving)
            assert (await leaving.listener.finished()).reason == "cancelled"  # type: ignore[attr-defined]
            waiting = asked(SYSTEM)
            engine.submit(waiting)
        # The engine ends in spite of it.
        assert (await waiting.listener.finished()).reason == "cancelled"  # type: ignore[attr-defined]


async def test_a_file_that_does_not_come_is_not_waited_for(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = families["qwen3"]
    async with engine_over(path, tmp_path) as engine:
        await run(engine, asked(SYSTEM))
    async with engine_over(path, tmp_path) as engine:
        monkeypatch.setattr("engine.state_folder._LATE_S", -1.0)
        monkeypatch.setattr("engine.state_folder.StateFolder._read", lambda *_: None)
        each = asked(SYSTEM)
        await run(engine, each)
        compare_all([await answer_of(each)], await cold(path, [SYSTEM]))
        assert (each.n_cached, engine.counters.n_states_read) == (0, 0)


async def test_damaged_files_are_read_anew(families: dict[str, Path], tmp_path: Path) -> None:
    """Bits turned over, ends cut off, pages of zeros: llama.cpp gets none of them."""
    random = Random(7)
    expected: list[Answer] = []
    for family, path in families.items():
        folder = tmp_path / family
        for turn in range(4):
            async with engine_over(path, folder) as engine:
                first = asked([*SYSTEM, 1])
                await run(engine, first)
                history = goes_on(first.prompt, await answer_of(first), 1)
            expected = expected if turn else await cold(path, [history])
            files = list(folder.iterdir())
            assert files
            for file in files:
                data = bytearray(file.read_bytes())
                match random.randrange(3):
                    case 0:
                        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
                    case 1:
                        del data[random.randrange(len(data)) :]
                    case 2:
                        at = random.randrange(len(data) // 2)
                        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
                        data[0] ^= 1
                file.write_bytes(data)
            async with engine_over(path, folder) as engine:
                each = asked(history)
                await run(engine, each)
                compare_all([await answer_of(each)], expected)
                assert (each.n_cached, engine.counters.n_states_restored) == (0, 0)
                assert engine.counters.n_states_damaged == len(files)
            shutil.rmtree(folder)


async def test_a_state_that_llama_cpp_refuses_is_removed(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is whole, and all the same not of the length that its tokens say."""
    path = families["qwen3"]
    async with engine_over(path, tmp_path) as engine:
        await run(engine, asked(SYSTEM))
    (before,) = tmp_path.iterdir()
    last_position = LlamaContext.last_position
    with monkeypatch.context() as patch:
        patch.setattr(LlamaContext, "last_position", lambda context, slot: last_position(context, slot) - 1)
        async with engine_over(path, tmp_path) as engine:
            each = asked(SYSTEM)
            await run(engine, each)
            assert (each.n_cached, engine.counters.n_states_read) == (0, 1)
            assert not before.exists()
            compare_all([await answer_of(each)], await cold(path, [SYSTEM]))
    async with engine_over(path, tmp_path) as engine:
        again = asked(SYSTEM)
        await run(engine, again)
        assert again.n_cached == len(SYSTEM) - 1


async def test_another_model_or_context_finds_nothing(families: dict[str, Path], tmp_path: Path) -> None:
    """Of the same name, size and time, with other weights; then the same weights in another context."""
    path, folder = tmp_path / "model.gguf", tmp_path / "states"
    shutil.copy(families["qwen3"], path)
    async with engine_over(path, folder) as engine:
        await run(engine, asked(SYSTEM))
    (mine,) = folder.iterdir()
    stat = path.stat()
    other = write_tiny_qwen3(tmp_path / "other.gguf", seed=1)
    assert other.stat().st_size == stat.st_size
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    for options in ({}, {"n_ctx": 256}, {"n_slots": 2}, {"flash_attention": True}):
        prompt = SYSTEM[:200]
        expected = await cold(path, [prompt])
        async with engine_over(path, folder, **options) as engine:
            each = asked(prompt)
            each.n_ctx = 256
            await run(engine, each)
            compare_all([await answer_of(each)], expected)
            assert (each.n_cached, engine.counters.n_states_read, engine.counters.n_states_damaged) == (0, 0, 0)
    assert mine.exists()  # it may come back, and leaves by its age
    assert len(list(folder.iterdir())) == 5


async def test_a_model_replaced_while_it_is_loaded_keeps_none(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(families["qwen3"], path)

    def replacing(*facts: object) -> bytes:
        shutil.copy(families["qwen3"], tmp_path / "new")
        (tmp_path / "new").replace(path)
        return bytes(16)

    monkeypatch.setattr("engine.engine.origin_of", replacing)
    async with engine_on(path, state_folder=tmp_path / "states", state_folder_bytes=MIB) as engine:
        await run(engine, asked(SYSTEM))
    assert "was replaced while it was loaded" in caplog.text
    assert not (tmp_path / "states").exists()


async def test_it_is_off_unless_asked_for(families: dict[str, Path], tmp_path: Path) -> None:
    for options in (
        {"state_folder": tmp_path / "s"},
        {"state_folder_bytes": MIB},
        {"state_folder": tmp_path / "s", "state_folder_bytes": MIB, "share_prefixes": False},
        {"state_folder": tmp_path / "s", "state_folder_bytes": MIB, "prefix_cache_bytes": 0},
    ):
        async with engine_on(families["qwen3"], **options) as engine:
            await run(engine, asked(SYSTEM))
            assert engine._folder is None
        assert not (tmp_path / "s").exists()


async def test_a_node_keeps_prompts_over_an_unload(tmp_path: Path, families: dict[str, Path]) -> None:
    target = tmp_path / "data/models/a/model.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(families["qwen3"].read_bytes())
    folder = tmp_path / "data/prefixes/a"
    request = InferenceRequest(model="a", input="x" * 100, raw=True, params=Params(max_tokens=2, temperature=0))
    texts = []
    for n_cached in (0, 99):
        async with running_node(tmp_path, worker_settings("a", prefix_cache_disk_mb=8)) as node:
            await node.loaded("a")
            reply = await node.service.complete(request)
            texts.append(reply.text)
            assert reply.tokens_cached == n_cached
            assert [row.tokens_cached for row in node.sinks["a"].rows] == [n_cached]
    assert texts[0] == texts[1]
    assert list(folder.iterdir())
    async with running_node(tmp_path, worker_settings("a", prefix_cache_disk_mb=8)) as node:
        node.fleet.remove_file("a")
    assert not folder.exists()
