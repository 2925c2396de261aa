"""What a model will take, from its header."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from engine import memory_fit
from engine.memory_fit import MemoryEstimate
from engine.model_info import read_model_info
from infsvc.errors import MemoryFitError
from tests.bert_files import random_bert, write_bert

HUGE = 2**60


def test_the_parts_of_an_estimate(tiny_model: Path) -> None:
    info = read_model_info(tiny_model)
    need = memory_fit.estimate(info, n_ctx=512, n_slots=3, n_batch=512)
    assert need.weight_bytes == info.weight_bytes
    # 2 bytes, keys and values of 16 for 2 heads in 2 layers, 512 tokens of 3 sequences.
    assert need.kv_bytes == 2 * (16 + 16) * 2 * 2 * 512 * 3
    assert need.total_bytes == need.weight_bytes + need.kv_bytes + need.compute_bytes
    assert "KV" in str(need)


@pytest.mark.parametrize(("n_ctx", "counted"), [(0, 2048), (1, 256), (257, 512), (2048, 2048), (100_000, 2048)])
def test_the_context_counts_as_the_engine_will_make_it(tiny_model: Path, n_ctx: int, counted: int) -> None:
    info = read_model_info(tiny_model)
    need = memory_fit.estimate(info, n_ctx=n_ctx, n_slots=1, n_batch=512)
    assert need.kv_bytes == 2 * (16 + 16) * 2 * 2 * counted


def test_what_embedding_takes(tiny_model: Path, tmp_path: Path) -> None:
    """Where attention looks both ways the logits of the longest text count, although nobody reads them; where it looks
    back only, those of one step, and a cache."""
    encoder = read_model_info(write_bert(tmp_path / "m.gguf", random_bert(n_ctx=1024)))
    need = memory_fit.estimate_embedding(encoder, n_ctx=0, weights=True)
    assert (need.weight_bytes, need.kv_bytes) == (encoder.weight_bytes, 0)
    assert need.compute_bytes > 1024 * (encoder.n_vocab + 64) * 4
    causal = read_model_info(tiny_model)
    need = memory_fit.estimate_embedding(causal, n_ctx=1024, weights=False)
    assert (need.weight_bytes, need.kv_bytes) == (0, 2 * (16 + 16) * 2 * 2 * 1024)
    assert need.compute_bytes < 16 * 2**20


def test_more_than_the_machine_has_is_refused_with_figures() -> None:
    with pytest.raises(MemoryFitError, match=r"needs 1073741824\.0 GiB .* are free: lower CTX_SIZE") as caught:
        memory_fit.check(MemoryEstimate(HUGE, 0, 0), limit_bytes=None, used_bytes=0)
    assert caught.value.needed_bytes == HUGE
    assert 0 < caught.value.free_bytes < HUGE


def test_the_limit_counts_all_models_of_the_node() -> None:
    need = MemoryEstimate(600, 0, 0)
    memory_fit.check(need, limit_bytes=1000, used_bytes=400)
    with pytest.raises(MemoryFitError) as caught:
        memory_fit.check(need, limit_bytes=1000, used_bytes=401)
    assert caught.value.free_bytes == 599
    with pytest.raises(MemoryFitError) as caught:
        memory_fit.check(need, limit_bytes=1000, used_bytes=5000)
    assert caught.value.free_bytes == 0


def test_what_is_being_loaded_is_not_free_any_more() -> None:
    free = psutil.virtual_memory().available
    need = MemoryEstimate(1000, 0, 0)
    memory_fit.check(need, limit_bytes=None, used_bytes=0)
    with pytest.raises(MemoryFitError):
        memory_fit.check(need, limit_bytes=None, used_bytes=0, pending_bytes=2 * free)
