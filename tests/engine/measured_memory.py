"""A child process that loads a model, fills every slot and prints by how many bytes its resident memory grew.

python -m tests.engine.measured_memory FILE N_CTX N_SLOTS FLASH
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

import engine.engine  # noqa: F401  what a node has imported before its first load
from engine.llama import Batch, LlamaContext, LlamaModel, return_memory
from engine.scheduler import N_BATCH


def resident_bytes() -> int:
    return_memory()
    return int(psutil.Process().memory_info().rss)


def main(path: Path, n_ctx: int, n_slots: int, *, flash_attention: bool) -> int:
    before = resident_bytes()
    model = LlamaModel(path, n_gpu_layers=0, use_extra_bufts=True)
    context = LlamaContext(
        model, n_ctx=n_ctx, n_slots=n_slots, n_batch=N_BATCH, n_threads=1, flash_attention=flash_attention
    )
    batch = Batch(N_BATCH, n_slots)
    for start in range(0, n_ctx, N_BATCH):
        for slot in range(n_slots):
            batch.clear()
            batch.add([1 + i % 200 for i in range(min(N_BATCH, n_ctx - start))], start=start, slot=slot, draws=True)
            assert context.decode(batch) == 0
    return resident_bytes() - before


if __name__ == "__main__":
    file, n_ctx_text, n_slots_text, flash = sys.argv[1:]
    print(main(Path(file), int(n_ctx_text), int(n_slots_text), flash_attention=flash == "flash"))
