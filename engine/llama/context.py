"""Where a model generates: the KV cache of its sequences, and the step."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.llama.batch import Batch
from engine.llama.model import LlamaModel
from engine.llama.native import (
    DECODE_ABORTED,
    DECODE_NO_KV,
    DECODE_OK,
    FLASH_ATTN_OFF,
    FLASH_ATTN_ON,
    POOLING_NONE,
    AbortFlag,
    lib,
)
from engine.llama.thread_pool import ThreadPool
from infsvc.errors import LlamaError, LoadError


class LlamaContext:
    """KV cache and compute buffers for `n_slots` sequences of `n_ctx` tokens each. One thread, the engine's; `abort`
    from any."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        n_slots: int,
        n_batch: int,
        n_threads: int,
        flash_attention: bool = False,
        swa_full: bool = True,
    ) -> None:
        """Raises `LoadError` when the memory cannot be had.

        Args:
            swa_full: whether layers with a sliding window keep the cells that have left it.
        """
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * n_slots
        params.n_seq_max = n_slots
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = False
        params.swa_full = swa_full
        params.flash_attn_type = FLASH_ATTN_ON if flash_attention else FLASH_ATTN_OFF
        params.pooling_type = POOLING_NONE
        params.embeddings = False
        params.no_perf = True
        self._flag = AbortFlag()
        self._flag.watch(params)
        self._model = model
        self.cache_types = (int(params.type_k), int(params.type_v))
        """What keys and values are kept as, by ggml's numbers."""
        self._n_slots = n_slots
        if n_ctx < 1 or n_slots < 1 or n_batch < 1:
            raise LoadError(f"no context of {n_ctx} tokens for {n_slots} sequences: set CTX_SIZE")
        self._handle = lib.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise LoadError(
                "llama.cpp cannot make the context: too little memory for the KV cache, or an unknown architecture"
            )
        self._pool = ThreadPool(n_threads)
        self._pool.attach(self._handle)
        self._memory = lib.llama_get_memory(self._handle)
        self.n_ctx: int = lib.llama_n_ctx_seq(self._handle)
        self.n_batch: int = lib.llama_n_batch(self._handle)

    def close(self) -> None:
        """Frees the context. Safe to call twice."""
        if self._handle:
            lib.llama_free(self._handle)
            self._handle = None
            self._pool.close()

    @property
    def handle(self) -> Any:
        if not self._handle:
            raise LlamaError("the context is closed")
        return self._handle

    def abort(self) -> None:
        """Makes a running `decode` end early with DECODE_ABORTED. Any thread; holds until `rearm`."""
        self._flag.hoist()

    def rearm(self) -> None:
        """Takes an earlier `abort` back."""
        self._flag.lower()

    def decode(self, batch: Batch) -> int:
        """Evaluates the batch. Returns DECODE_OK, DECODE_NO_KV or DECODE_ABORTED; after the latter two the batch may be
        tried again.

        Raises:
            LlamaError: anything else; the context must not be used again.
        """
        if batch.n > self.n_batch:
            raise LlamaError(f"{batch.n} tokens for a batch of {self.n_batch}")
        batch.seal(self._model.n_vocab)
        self._model.handle  # noqa: B018
        rc = int(lib.llama_decode(self.handle, batch.native))
        if rc == DECODE_OK:
            return rc
        if rc in (DECODE_NO_KV, DECODE_ABORTED):
            # Sequences of unequal length are evaluated in several parts, and those before the failure stay in the
            # cache.
            for slot, start in batch.starts:
                lib.llama_memory_seq_rm(self._memory, slot, start, -1)
            return rc
        raise LlamaError(f"llama_decode failed with {rc}: the log's lines of `llama` say why")

    def logits(self, index: int) -> npt.NDArray[np.float32]:
        """The logits (n_vocab,) of a batch position that was asked to draw: llama.cpp's own memory, valid until the
        next decode."""
        pointer = lib.llama_get_logits_ith(self.handle, index)
        if not pointer:
            raise LlamaError(f"no logits at batch position {index}")
        address = ctypes.addressof(pointer.contents)
        memory = (ctypes.c_float * self._model.n_vocab).from_address(address)
        return np.frombuffer(memoryview(memory).cast("B"), dtype=np.float32)

    def forget(self, slot: int) -> None:
        """Empties a slot's KV cache."""
        self._check(slot)
        lib.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def cut(self, slot: int, n: int) -> bool:
        """Drops a slot's tokens from position `n` on; False when this kind of memory cannot, and nothing is
        changed."""
        self._check(slot)
        return bool(lib.llama_memory_seq_rm(self._memory, slot, n, -1))

    def first_position(self, slot: int) -> int:
        """The first position whose cells a slot still holds: over 0 once a sliding window has moved on; −1 when it is
        empty."""
        self._check(slot)
        return int(lib.llama_memory_seq_pos_min(self._memory, slot))

    def last_position(self, slot: int) -> int:
        """The last position that a slot holds; −1 when it is empty."""
        self._check(slot)
        return int(lib.llama_memory_seq_pos_max(self._memory, slot))

    def state_bytes(self, slot: int) -> int:
        """How large `save` would be."""
        self._check(slot)
        return int(lib.llama_state_seq_get_size(self.handle, slot))

    def save(self, slot: int) -> npt.NDArray[np.uint8]:
        """A slot's whole state as bytes, in llama.cpp's form; its size follows the tokens held, not the context.

        The way from slot to slot too: `llama_memory_seq_cp` copies every cell of the context, is put off to the next
        decode, where it may come too late for what was written meanwhile, and has the graph built anew.
        """
        self._check(slot)
        blob = np.empty(self.state_bytes(slot), dtype=np.uint8)
        address = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if int(lib.llama_state_seq_get_data(self.handle, address, blob.nbytes, slot)) != blob.nbytes:
            raise LlamaError(f"the state of slot {slot} cannot be read: the log's lines of `llama` say why")
        return blob

    def restore(self, slot: int, blob: npt.NDArray[np.uint8]) -> bool:
        """Replaces a slot's state by one that `save` of this context gave; False when it cannot, and the slot is
        empty."""
        self._check(slot)
        address = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if int(lib.llama_state_seq_set_data(self.handle, address, blob.nbytes, slot)) == blob.nbytes:
            return True
        self.forget(slot)
        return False

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self._n_slots or not self.handle:
            raise LlamaError(f"no slot {slot}")
