"""llama.cpp ends the whole process on a bad argument: each guard must raise first, and leave what it guards usable."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from engine.llama import (
    DECODE_ABORTED,
    DECODE_NO_KV,
    DECODE_OK,
    Batch,
    LlamaContext,
    LlamaModel,
    SamplerChain,
)
from infsvc.errors import LlamaError, LoadError, ModelFileError
from tests.engine.gguf_files import rewrite
from tests.engine.parts import spec
from tests.tiny_models import byte_symbols


@pytest.fixture
def model(tiny_model: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(tiny_model)
    yield model
    model.close()


@pytest.fixture
def context(model: LlamaModel) -> Iterator[LlamaContext]:
    context = LlamaContext(model, n_ctx=256, n_slots=2, n_batch=64, n_threads=1)
    yield context
    context.close()


@pytest.fixture
def batch() -> Batch:
    return Batch(64, 2)


PROMPT = [10, 20, 30, 40, 50]


def test_a_prompt_is_decoded_and_has_logits_at_its_last_token(context: LlamaContext, batch: Batch) -> None:
    position = batch.add(PROMPT, start=0, slot=0, draws=True)
    assert context.decode(batch) == DECODE_OK
    logits = context.logits(position)
    assert logits.shape == (259,)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


def test_two_sequences_in_one_batch_get_what_each_gets_alone(model: LlamaModel, batch: Batch) -> None:
    prompts = [PROMPT, [7, 8, 9]]
    alone = []
    for prompt in prompts:
        context = LlamaContext(model, n_ctx=256, n_slots=2, n_batch=64, n_threads=1)
        batch.clear()
        position = batch.add(prompt, start=0, slot=0, draws=True)
        assert context.decode(batch) == DECODE_OK
        alone.append(context.logits(position).copy())
        context.close()
    context = LlamaContext(model, n_ctx=256, n_slots=2, n_batch=64, n_threads=1)
    batch.clear()
    positions = [batch.add(prompt, start=0, slot=slot, draws=True) for slot, prompt in enumerate(prompts)]
    assert context.decode(batch) == DECODE_OK
    for position, expected in zip(positions, alone, strict=True):
        np.testing.assert_allclose(context.logits(position), expected, atol=2e-2)
    context.close()


def test_an_empty_batch_is_refused(context: LlamaContext, batch: Batch) -> None:
    with pytest.raises(LlamaError, match="empty"):
        context.decode(batch)
    with pytest.raises(LlamaError):
        batch.add([], start=0, slot=0, draws=True)


def test_more_tokens_than_the_batch_holds_are_refused(context: LlamaContext, batch: Batch) -> None:
    with pytest.raises(LlamaError, match="65 tokens"):
        batch.add([1] * 65, start=0, slot=0, draws=True)
    large = Batch(1000, 2)
    large.add([1] * (context.n_batch + 1), start=0, slot=0, draws=True)
    with pytest.raises(LlamaError, match=f"a batch of {context.n_batch}"):
        context.decode(large)


@pytest.mark.parametrize(("slot", "start"), [(-1, 0), (2, 0), (0, -1)])
def test_a_bad_slot_or_position_is_refused(batch: Batch, slot: int, start: int) -> None:
    with pytest.raises(LlamaError):
        batch.add(PROMPT, start=start, slot=slot, draws=True)


def test_a_slot_that_only_the_batch_has_is_refused(context: LlamaContext) -> None:
    larger = Batch(64, 8)
    larger.add(PROMPT, start=0, slot=7, draws=True)
    with pytest.raises(LlamaError):
        context.decode(larger)


@pytest.mark.parametrize("token", [-1, 259, 2**31 - 1, 2**31, -(2**40), 2**70])
def test_a_token_id_outside_the_vocabulary_is_refused(context: LlamaContext, batch: Batch, token: int) -> None:
    def decode() -> None:
        batch.add([1, token], start=0, slot=0, draws=True)
        context.decode(batch)

    with pytest.raises(LlamaError, match="token id"):
        decode()
    batch.clear()
    batch.add(PROMPT, start=0, slot=0, draws=True)
    assert context.decode(batch) == DECODE_OK


def test_a_gap_in_the_positions_is_refused(context: LlamaContext, batch: Batch) -> None:
    batch.add(PROMPT, start=0, slot=0, draws=True)
    assert context.decode(batch) == DECODE_OK
    batch.clear()
    batch.add([1], start=99, slot=0, draws=True)
    with pytest.raises(LlamaError):
        context.decode(batch)


def test_logits_where_none_were_asked_for_are_refused(context: LlamaContext, batch: Batch) -> None:
    with pytest.raises(LlamaError):
        context.logits(0)
    position = batch.add(PROMPT, start=0, slot=0, draws=True)
    silent = batch.add(PROMPT, start=0, slot=1, draws=False)
    assert context.decode(batch) == DECODE_OK
    for index in (0, silent, 64, 10**6, -100):
        with pytest.raises(LlamaError, match="no logits"):
            context.logits(index)
    chain = SamplerChain(spec(temperature=1.0))
    for index in (0, silent, 10**6):
        with pytest.raises(LlamaError, match="no logits"):
            chain.draw(context, index)
    assert 0 <= chain.draw(context, position) < 259
    chain.close()
    with pytest.raises(LlamaError, match="closed"):
        chain.draw(context, position)


def test_a_slot_that_does_not_exist_cannot_be_forgotten(context: LlamaContext) -> None:
    for slot in (-1, 2):
        with pytest.raises(LlamaError):
            context.forget(slot)


def test_a_saved_state_goes_on_as_its_slot_would(context: LlamaContext, batch: Batch) -> None:
    batch.add(PROMPT, start=0, slot=0, draws=True)
    assert context.decode(batch) == DECODE_OK
    blob = context.save(0)
    assert context.first_position(0) == 0
    assert context.first_position(1) == -1
    logits = []
    assert context.restore(1, blob)
    for slot in (0, 1):
        batch.clear()
        position = batch.add([9], start=len(PROMPT), slot=slot, draws=True)
        assert context.decode(batch) == DECODE_OK
        logits.append(context.logits(position).copy())
    np.testing.assert_array_equal(logits[0], logits[1])
    assert context.cut(1, 2)
    batch.clear()
    batch.add([9], start=2, slot=1, draws=True)
    assert context.decode(batch) == DECODE_OK


def test_a_state_that_is_none_leaves_the_slot_empty(context: LlamaContext, batch: Batch) -> None:
    batch.add(PROMPT, start=0, slot=0, draws=True)
    assert context.decode(batch) == DECODE_OK
    blob = context.save(0)
    for bad in (blob[: len(blob) // 2].copy(), np.zeros(100, dtype=np.uint8), np.zeros(1, dtype=np.uint8)):
        assert not context.restore(0, bad)
        assert context.first_position(0) == -1


def test_states_of_slots_that_do_not_exist_are_refused(context: LlamaContext) -> None:
    blob = context.save(0)
    for slot in (-1, 2):
        for use in (
            lambda slot=slot: context.save(slot),
            lambda slot=slot: context.restore(slot, blob),
            lambda slot=slot: context.cut(slot, 0),
            lambda slot=slot: context.first_position(slot),
        ):
            with pytest.raises(LlamaError, match="no slot"):
                use()


def test_a_closed_context_refuses_everything(model: LlamaModel, batch: Batch) -> None:
    context = LlamaContext(model, n_ctx=256, n_slots=2, n_batch=64, n_threads=1)
    batch.add(PROMPT, start=0, slot=0, draws=True)
    chain = SamplerChain(spec(temperature=1.0))
    context.close()
    context.close()
    for use in (
        lambda: context.decode(batch),
        lambda: context.logits(0),
        lambda: context.forget(0),
        lambda: chain.draw(context, 0),
    ):
        with pytest.raises(LlamaError, match="closed"):
            use()
    context.abort()
    chain.close()


def test_a_closed_model_refuses_everything(tiny_model: Path, batch: Batch) -> None:
    model = LlamaModel(tiny_model)
    model.close()
    model.close()
    for use in (
        lambda: model.tokenize("hello", add_special=False, parse_special=True),
        lambda: model.piece(200, special=False),
        lambda: model.token_text(1),
        lambda: LlamaContext(model, n_ctx=256, n_slots=1, n_batch=64, n_threads=1),
    ):
        with pytest.raises(LlamaError, match="closed"):
            use()


def test_closing_waits_for_those_who_tokenise(tiny_model: Path) -> None:
    """An engine may end at any moment, and prompts are tokenised on other threads."""
    model = LlamaModel(tiny_model)
    refused = threading.Event()
    begun = threading.Barrier(5)

    def tokenise() -> None:
        begun.wait()
        try:
            while True:
                assert len(model.tokenize("hello " * 2000, add_special=False, parse_special=True)) > 100
        except LlamaError:
            refused.set()

    threads = [threading.Thread(target=tokenise, name=f"tokenise-{n}") for n in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    model.close()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert refused.is_set()


def test_tokens_of_a_text_give_its_bytes_back(model: LlamaModel) -> None:
    for text in ("hello", "naïve 日本語 👩‍🚀", "a\x00b", ""):
        tokens = model.tokenize(text, add_special=False, parse_special=True)
        assert b"".join(model.piece(token, special=False) for token in tokens) == text.encode()


def test_a_lone_surrogate_does_no_harm(model: LlamaModel) -> None:
    assert model.tokenize("a\ud800b", add_special=False, parse_special=True)


def test_special_marks_are_tokens_only_when_parsed(model: LlamaModel) -> None:
    assert model.tokenize("<|im_end|>", add_special=False, parse_special=True) == [258]
    assert len(model.tokenize("<|im_end|>", add_special=False, parse_special=False)) > 1
    assert model.piece(258, special=True) == b"<|im_end|>"
    assert model.piece(258, special=False) == b""
    assert model.token_text(258) == "<|im_end|>"
    assert model.is_eog(258)
    assert not model.is_eog(5)


@pytest.mark.parametrize("token", [-1, 259, 2**31])
def test_a_missing_piece_is_refused(model: LlamaModel, token: int) -> None:
    with pytest.raises(LlamaError, match="no token"):
        model.piece(token, special=False)
    assert model.token_text(token) == ""


def test_a_file_of_garbage_does_not_load(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"GGUF" + bytes(range(256)) * 40)
    with pytest.raises(LoadError, match=r"garbage\.gguf"):
        LlamaModel(garbage)
    with pytest.raises(LoadError):
        LlamaModel(tmp_path / "missing.gguf")


def test_a_truncated_file_does_not_load(tiny_model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(tiny_model.read_bytes()[:-2000])
    with pytest.raises(LoadError):
        LlamaModel(half)


def test_a_load_can_be_stopped(tiny_model: Path) -> None:
    heard: list[float] = []

    def stop(fraction: float) -> bool:
        heard.append(fraction)
        return False

    with pytest.raises(LoadError, match="stopped"):
        LlamaModel(tiny_model, on_progress=stop)
    assert len(heard) == 1


@pytest.mark.parametrize("kind", ["none", "no_vocab"])
def test_a_model_without_a_vocabulary_is_refused(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """Tokenising with it would abort."""
    path = rewrite(
        tiny_model,
        tmp_path / "m.gguf",
        {"tokenizer.ggml.model": kind, "llama.vocab_size": (gguf.GGUFValueType.UINT32, 259)},
        drop=("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"),
    )
    with pytest.raises(LoadError, match="vocabulary"):
        LlamaModel(path)


def test_what_the_header_check_refuses_never_reaches_llama_cpp(tiny_model: Path, tmp_path: Path) -> None:
    path = rewrite(tiny_model, tmp_path / "m.gguf", {"llama.block_count": (gguf.GGUFValueType.UINT32, 0)})
    with pytest.raises(ModelFileError, match="block_count"):
        LlamaModel(path)


def test_a_context_of_no_tokens_is_refused(model: LlamaModel) -> None:
    with pytest.raises(LoadError, match="CTX_SIZE"):
        LlamaContext(model, n_ctx=0, n_slots=1, n_batch=64, n_threads=1)


def test_a_full_sequence_is_answered_and_its_batch_may_be_tried_again(model: LlamaModel) -> None:
    context = LlamaContext(model, n_ctx=256, n_slots=1, n_batch=200, n_threads=1)
    batch = Batch(200, 1)
    batch.add([1] * 200, start=0, slot=0, draws=True)
    assert context.decode(batch) == DECODE_OK
    batch.clear()
    batch.add([1] * 100, start=200, slot=0, draws=True)
    assert context.decode(batch) == DECODE_NO_KV
    batch.clear()
    batch.add([1] * 50, start=200, slot=0, draws=True)
    assert context.decode(batch) == DECODE_OK
    context.close()


def test_an_aborted_batch_can_be_decoded_afterwards_with_the_same_result(context: LlamaContext, batch: Batch) -> None:
    position = batch.add(PROMPT, start=0, slot=0, draws=True)
    context.abort()
    assert context.decode(batch) == DECODE_ABORTED
    assert context.decode(batch) == DECODE_ABORTED
    context.rearm()
    assert context.decode(batch) == DECODE_OK
    aborted_first = context.logits(position).copy()
    context.forget(0)
    assert context.decode(batch) == DECODE_OK
    np.testing.assert_array_equal(context.logits(position), aborted_first)


def test_a_batch_aborted_anywhere_leaves_nothing_behind(model: LlamaModel) -> None:
    """Sequences of unequal length are evaluated in several parts: those before the abort must not stay in the cache."""
    prompts = [PROMPT, [7] * 40, [9] * 3]
    n_calls, stop_at = 0, 10**9

    def stop(_: ctypes.c_void_p) -> bool:
        nonlocal n_calls
        n_calls += 1
        return n_calls >= stop_at

    callback = llama_cpp.ggml_abort_callback(stop)

    def fresh() -> tuple[LlamaContext, Batch, list[int]]:
        context = LlamaContext(model, n_ctx=256, n_slots=3, n_batch=64, n_threads=1)
        batch = Batch(64, 3)
        places = [batch.add(prompt, start=0, slot=slot, draws=True) for slot, prompt in enumerate(prompts)]
        llama_cpp.llama_set_abort_callback(context.handle, callback, None)
        return context, batch, places

    context, batch, places = fresh()
    assert context.decode(batch) == DECODE_OK
    expected = [context.logits(place).copy() for place in places]
    context.close()
    n_all = n_calls
    assert n_all > 3
    for at in range(1, n_all + 1, max(1, n_all // 12)):
        n_calls, stop_at = 0, at
        context, batch, places = fresh()
        assert context.decode(batch) == DECODE_ABORTED, at
        stop_at = 10**9
        assert context.decode(batch) == DECODE_OK, at
        for place, logits in zip(places, expected, strict=True):
            np.testing.assert_array_equal(context.logits(place), logits)
        context.close()


def test_byte_symbols_cover_every_byte(model: LlamaModel) -> None:
    """The tiny files spell each byte as a token, in byte order."""
    assert len(set(byte_symbols())) == 256
    assert [model.piece(token, special=False) for token in range(256)] == [bytes([n]) for n in range(256)]


def test_the_threads_are_of_the_one_ggml_in_the_process(model: LlamaModel) -> None:
    """A second copy of the library computes nothing wrong on most files, at half the speed."""
    context = LlamaContext(model, n_ctx=256, n_slots=1, n_batch=64, n_threads=2)
    context.close()
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert len({line.split()[-1] for line in mapped.read_text().splitlines() if "libggml-cpu" in line}) == 1
