"""What a model will take, from its header."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from gguf import GGMLQuantizationType

from engine import memory_fit
from engine.memory_fit import MemoryEstimate
from engine.model_info import read_model_info
from engine.scheduler import N_BATCH
from infsvc.errors import MemoryFitError
from tests.benchmarks.throughput import write_model
from tests.bert_files import random_bert, write_bert
from tests.tiny_families import write_tiny_gemma3, write_tiny_gpt_oss, write_tiny_lfm2, write_tiny_qwen3
from tests.tiny_models import write_large_model, write_tiny_model

HUGE = 2**60


def test_the_parts_of_an_estimate(tiny_model: Path) -> None:
    info = read_model_info(tiny_model)
    need = memory_fit.estimate(info, n_ctx=512, n_slots=3, n_batch=512)
    assert need.weight_bytes > info.weight_bytes
    # 2 bytes, keys and values of 16 for 2 heads in 2 layers, 512 tokens of 3 sequences.
    assert need.kv_bytes == 2 * (16 + 16) * 2 * 2 * 512 * 3
    assert need.total_bytes == need.weight_bytes + need.kv_bytes + need.compute_bytes
    assert "KV" in str(need)


@pytest.mark.parametrize(("n_ctx", "counted"), [(0, 2048), (1, 256), (257, 512), (2048, 2048), (100_000, 2048)])
def test_the_context_counts_as_the_engine_will_make_it(tiny_model: Path, n_ctx: int, counted: int) -> None:
    info = read_model_info(tiny_model)
    need = memory_fit.estimate(info, n_ctx=n_ctx, n_slots=1, n_batch=512)
    assert need.kv_bytes == 2 * (16 + 16) * 2 * 2 * counted


DEMO = Path(__file__).parents[2] / "data/models/demo/model.gguf"


def medium(path: Path, quantise: GGMLQuantizationType = GGMLQuantizationType.Q8_0) -> Path:
    return write_tiny_model(
        path, n_vocab=8000, n_embd=256, n_layer=4, n_head=4, n_head_kv=4, n_ff=512, n_ctx=4096, quantise=quantise
    )


def repacked(path: Path) -> Path:
    return write_tiny_model(
        path, n_embd=512, n_layer=8, n_head=8, n_head_kv=4, n_ff=1536, n_ctx=4096, quantise=GGMLQuantizationType.Q4_0
    )


def large_q4_k_m(path: Path) -> Path:
    return write_model(path.parent)


def long(write: Callable[..., Path]) -> Callable[[Path], Path]:
    return lambda path: write(path, n_ctx=4096)


@pytest.mark.parametrize(
    ("write", "n_ctx", "n_slots", "flash"),
    [
        pytest.param(None, 1024, 8, True, id="demo-flash"),
        pytest.param(long(write_tiny_gemma3), 2048, 2, True, id="window-flash"),
        pytest.param(long(write_tiny_lfm2), 2048, 2, False, id="hybrid"),
        pytest.param(
            repacked,
            512,
            2,
            True,
            id="repacked-flash",
            marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="what is repacked was measured on x86-64"),
        ),
        pytest.param(large_q4_k_m, 1024, 4, True, id="large-q4-k-m-flash", marks=pytest.mark.soak),
        pytest.param(None, 1024, 8, False, id="demo", marks=pytest.mark.soak),
        pytest.param(medium, 1024, 4, True, id="medium-flash", marks=pytest.mark.soak),
        pytest.param(medium, 1024, 4, False, id="medium", marks=pytest.mark.soak),
        pytest.param(long(write_tiny_qwen3), 4096, 4, True, id="full-flash", marks=pytest.mark.soak),
        pytest.param(long(write_tiny_qwen3), 4096, 4, False, id="full", marks=pytest.mark.soak),
        pytest.param(long(write_tiny_gemma3), 4096, 4, True, id="window-long-flash", marks=pytest.mark.soak),
        pytest.param(long(write_tiny_gemma3), 4096, 4, False, id="window-long", marks=pytest.mark.soak),
        pytest.param(long(write_tiny_gpt_oss), 4096, 4, True, id="sinks-flash", marks=pytest.mark.soak),
        pytest.param(long(write_tiny_gpt_oss), 4096, 4, False, id="sinks", marks=pytest.mark.soak),
        pytest.param(long(write_tiny_lfm2), 4096, 4, True, id="hybrid-flash", marks=pytest.mark.soak),
        pytest.param(long(write_tiny_lfm2), 4096, 4, False, id="hybrid-long", marks=pytest.mark.soak),
        pytest.param(write_large_model, 1024, 4, True, id="large-flash", marks=pytest.mark.soak),
        pytest.param(write_large_model, 1024, 4, False, id="large", marks=pytest.mark.soak),
    ],
)
def test_the_estimate_is_what_a_process_grows_by(
    tmp_path: Path, write: Callable[[Path], Path] | None, n_ctx: int, n_slots: int, flash: bool
) -> None:
    """Within 15 %, every slot full, in a process of its own."""
    path = DEMO if write is None else write(tmp_path / "m.gguf")
    arguments = [str(path), str(n_ctx), str(n_slots), "flash" if flash else "none"]
    child = subprocess.run(
        [sys.executable, "-m", "tests.engine.measured_memory", *arguments], capture_output=True, text=True, check=True
    )
    grown = int(child.stdout)
    need = memory_fit.estimate(
        read_model_info(path), n_ctx=n_ctx, n_slots=n_slots, n_batch=N_BATCH, flash_attention=flash
    )
    print(f"{grown / 2**20:.1f} MiB measured, {need.total_bytes / 2**20:.1f} estimated: {need.total_bytes / grown:.2f}")
    assert 0.85 * grown <= need.total_bytes <= 1.15 * grown


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
