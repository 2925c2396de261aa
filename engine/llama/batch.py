"""What one step evaluates."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from engine.llama.native import lib
from infsvc.errors import LlamaError


class Batch:
    """A llama_batch over numpy memory: at most `n_max` tokens, each of one sequence."""

    def __init__(self, n_max: int, n_slots: int) -> None:
        self.n_max, self._n_slots = n_max, n_slots
        self.n = 0
        self.starts: list[tuple[int, int]] = []
        self._tokens = np.zeros(n_max, dtype=np.int32)
        self._positions = np.zeros(n_max, dtype=np.int32)
        self._n_seq_id = np.ones(n_max, dtype=np.int32)
        self._logits = np.zeros(n_max, dtype=np.int8)
        # seq_id is an array of pointers; each points at one of these constants.
        self._slots = np.arange(n_slots, dtype=np.int32)
        self._slot_addresses = self._slots.ctypes.data + np.arange(n_slots, dtype=np.uintp) * self._slots.itemsize
        self._seq_ids = np.zeros(n_max, dtype=np.uintp)
        self.native = lib.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(lib.llama_token)),
            embd=None,
            pos=self._positions.ctypes.data_as(ctypes.POINTER(lib.llama_pos)),
            n_seq_id=self._n_seq_id.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._seq_ids.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(lib.llama_seq_id))),
            logits=self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        self.n = 0
        self.starts.clear()

    def add(self, tokens: Sequence[int], *, start: int, slot: int, draws: bool, every: bool = False) -> int:
        """Appends a sequence's tokens at positions from `start`; returns the index of the last one.

        Args:
            draws: whether the last token yields an output.
            every: whether each of them does.
        """
        end = self.n + len(tokens)
        if not tokens or end > self.n_max or not 0 <= slot < self._n_slots or start < 0:
            raise LlamaError(f"{len(tokens)} tokens at {start} of slot {slot} do not fit a batch of {self.n_max}")
        part = slice(self.n, end)
        try:
            self._tokens[part] = tokens
        except OverflowError:
            raise LlamaError("a token id outside of every vocabulary") from None
        self._positions[part] = np.arange(start, start + len(tokens), dtype=np.int32)
        self._seq_ids[part] = self._slot_addresses[slot]
        self._logits[part] = every
        self._logits[end - 1] = draws or every
        self.starts.append((slot, start))
        self.n = end
        return end - 1

    def seal(self, n_vocab: int) -> None:
        """Checks what llama.cpp would abort on and sets the count."""
        if self.n == 0:
            raise LlamaError("an empty batch")
        used = self._tokens[: self.n]
        if int(used.min()) < 0 or int(used.max()) >= n_vocab:
            raise LlamaError(f"a token id outside the vocabulary of {n_vocab}")
        self.native.n_tokens = self.n
