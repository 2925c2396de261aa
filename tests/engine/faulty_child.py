"""A model's process (`engine.child`) with a forced fault: a prompt that ends with a certain token makes its step abort
in llama.cpp, or hang. Run in its place by tests that set `engine.model_process.COMMAND`."""

from __future__ import annotations

import sys
import threading

import llama_cpp as lib

from engine import child, llama, step_watch

ABORTS, HANGS = 65, 72  # "A" and "H" of the tiny model's vocabulary

_decode = llama.LlamaContext.decode


def faulty(context: llama.LlamaContext, batch: llama.Batch) -> int:
    tokens = batch.native.token[: batch.n]
    if ABORTS in tokens:
        # Sampling where there is no sampler is one of the calls that llama.cpp answers with an abort.
        empty = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        _decode(context, batch)
        lib.llama_sampler_sample(empty, context.handle, -1)
    if HANGS in tokens:
        threading.Event().wait()
    return _decode(context, batch)


if __name__ == "__main__":
    llama.LlamaContext.decode = faulty  # type: ignore[method-assign]
    step_watch.HUNG_AFTER_S = 0.4
    sys.exit(child.main(sys.argv[1:]))
