"""Where a model embeds: whole texts → one vector each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.embedding_limits import PACK_TOKENS, causal_step_tokens, n_pack_texts
from engine.llama.batch import Batch
from engine.llama.model import LlamaModel
from engine.llama.native import DECODE_ABORTED, DECODE_OK, FLASH_ATTN_AUTO, POOLING_NONE, AbortFlag, lib
from engine.llama.thread_pool import ThreadPool
from infsvc.errors import LlamaError, LoadError

_POOLING_TYPES = {"mean": 1, "cls": 2, "last": 3, "rank": 4}


class EmbeddingContext:
    """Turns whole texts into one vector each: a context of its own over a model's weights. One thread, the embedder's;
    `abort` from any.

    Where attention looks backwards only, a text is read in steps and its hidden states are pooled here, so that
    llama.cpp's buffer of `n_vocab` floats for each token of a step stays small. Where it looks both ways, a text must
    lie whole in one step (parted in two it yields another vector, silently), and llama.cpp pools.
    """

    def __init__(self, model: LlamaModel, *, pooling: str, n_ctx: int, causal: bool, n_threads: int) -> None:
        """Makes the context; the model must stay open for as long.

        Args:
            pooling: mean, cls or last; rank for a reranker, whose file must have the head for it.
            n_ctx: tokens of the longest text.
            causal: what the header says; llama.cpp's own word counts.

        Raises:
            LoadError: the memory cannot be had, or the model is of a kind that has no such vectors.
        """
        if pooling not in _POOLING_TYPES:
            raise LoadError(f"no pooling {pooling}: there are {', '.join(_POOLING_TYPES)}")
        if pooling == "rank" and not model.info.n_scores:
            # llama.cpp would take a hidden state's first value for a score.
            raise LoadError("the file has no classification head, which POOLING=rank needs")
        if model.has_encoder or not model.has_decoder:
            raise LoadError("this kind of model (with an encoder and a decoder) is not served by this version")
        if n_ctx < 1 or (model.n_ctx_train and n_ctx > model.n_ctx_train):
            raise LoadError(f"no texts of {n_ctx} tokens: set CTX_SIZE to at most {model.n_ctx_train}")
        self._model, self._pooling = model, pooling
        self._flag = AbortFlag()
        self._handle = None
        self._pool: ThreadPool | None = None
        # A header may keep silent on what its architecture implies.
        for both_ways in (not causal, causal):
            self._handle = self._make(n_ctx, both_ways=both_ways, n_threads=n_threads)
            if not self._handle:
                raise LoadError("llama.cpp cannot make the context for embeddings: too little memory")
            if bool(lib.llama_get_causal_attn(self._handle)) is not both_ways:
                break
            self.close()
        self._pool = ThreadPool(n_threads)
        self._pool.attach(self._handle)
        self.both_ways = both_ways
        self._memory = lib.llama_get_memory(self._handle)
        self.n_ctx = n_ctx
        self.n_pack_tokens = max(PACK_TOKENS, n_ctx)
        self.n_step: int = lib.llama_n_ubatch(self._handle)
        self.n_pack_texts: int = lib.llama_n_seq_max(self._handle)
        self.n_embd: int = model.info.n_scores if pooling == "rank" else lib.llama_model_n_embd_out(model.handle)
        self._batch = Batch(self.n_step, self.n_pack_texts)

    def _make(self, n_ctx: int, *, both_ways: bool, n_threads: int) -> Any:
        n_tokens = max(PACK_TOKENS, n_ctx)
        n_step = n_tokens if both_ways else min(n_tokens, causal_step_tokens(self._model.n_vocab))
        params = lib.llama_context_default_params()
        params.n_ctx = n_tokens
        params.n_seq_max = n_pack_texts(causal=not both_ways)
        params.n_batch = params.n_ubatch = n_step
        params.n_threads = params.n_threads_batch = n_threads
        # One cache for all: else llama.cpp parts texts of unequal length.
        params.kv_unified = True
        # Without it the cost of a pack grows with the square of its tokens, on CPUs too (measured: five times at 512);
        # automatic, because not every GPU has the kernel for a small encoder's heads.
        params.flash_attn_type = FLASH_ATTN_AUTO
        # A reranker's head is llama.cpp's, and reads the last token where attention looks back only.
        pooled = both_ways or self._pooling == "rank"
        params.pooling_type = _POOLING_TYPES[self._pooling] if pooled else POOLING_NONE
        params.embeddings = True
        params.no_perf = True
        self._flag.watch(params)
        return lib.llama_init_from_model(self._model.handle, params)

    def close(self) -> None:
        """Frees the context. Safe to call twice."""
        handle, self._handle = self._handle, None
        if handle:
            lib.llama_free(handle)
            if self._pool is not None:
                self._pool.close()

    @property
    def handle(self) -> Any:
        if not self._handle:
            raise LlamaError("the context is closed")
        return self._handle

    def abort(self) -> None:
        """Makes a running `embed` end early. Any thread; holds until `rearm`."""
        self._flag.hoist()

    def rearm(self) -> None:
        """Takes an earlier `abort` back."""
        self._flag.lower()

    def embed(self, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32] | None:
        """The pooled vectors (len(texts), n_embd) of a pack, as the model computes them; None when aborted.

        Args:
            texts: token ids; at most `n_pack_texts` of them, each of 1 to `n_ctx` tokens, together at most
                `n_pack_tokens`.

        Raises:
            LlamaError: a pack beyond these bounds, or a failure; after the latter the context must not be used again.
        """
        lengths = [len(text) for text in texts]
        if not 1 <= len(texts) <= self.n_pack_texts or sum(lengths) > self.n_pack_tokens:
            raise LlamaError(f"{len(texts)} texts of {sum(lengths)} tokens do not fit one pack")
        if not 1 <= min(lengths) <= max(lengths) <= self.n_ctx:
            raise LlamaError(f"a text of {min(lengths)} or {max(lengths)} tokens; 1 to {self.n_ctx} can be read")
        if self._memory:
            lib.llama_memory_clear(self._memory, False)
        return self._whole(texts) if self.both_ways else self._in_steps(texts)

    def _whole(self, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32] | None:
        self._batch.clear()
        for slot, tokens in enumerate(texts):
            self._batch.add(tokens, start=0, slot=slot, draws=True, every=True)
        if not self._evaluate():
            return None
        pointers = [lib.llama_get_embeddings_seq(self.handle, slot) for slot in range(len(texts))]
        return np.stack([self._rows(pointer, 1)[0] for pointer in pointers])

    def _in_steps(self, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32] | None:
        sums = np.zeros((len(texts), self.n_embd), dtype=np.float64)
        slot = n_read = 0
        while slot < len(texts):
            self._batch.clear()
            parts: list[tuple[int, int, int, int]] = []  # slot, position of its first token, and where it lies
            while slot < len(texts) and self._batch.n < self.n_step:
                tokens = texts[slot][n_read : n_read + self.n_step - self._batch.n]
                begin = self._batch.n
                end = self._batch.add(tokens, start=n_read, slot=slot, draws=True, every=True) + 1
                parts.append((slot, n_read, begin, end))
                n_read += len(tokens)
                if n_read == len(texts[slot]):
                    slot, n_read = slot + 1, 0
            if not self._evaluate():
                return None
            if self._pooling == "rank":
                for each, start, begin, end in parts:
                    if start + end - begin == len(texts[each]):
                        sums[each] = self._rows(lib.llama_get_embeddings_seq(self.handle, each), 1)[0]
                continue
            states = self._rows(lib.llama_get_embeddings_ith(self.handle, 0), self._batch.n)
            for each, start, begin, end in parts:
                if self._pooling == "mean":
                    sums[each] += states[begin:end].sum(axis=0, dtype=np.float64)
                elif self._pooling == "last":
                    sums[each] = states[end - 1]
                elif start == 0:
                    sums[each] = states[begin]
        if self._pooling == "mean":
            sums /= np.array([[len(text)] for text in texts])
        return sums.astype(np.float32)

    def _evaluate(self) -> bool:
        """Evaluates the batch; False when aborted."""
        self._batch.seal(self._model.n_vocab)
        self._model.handle  # noqa: B018
        if self._flag.is_raised:
            return False
        evaluate = lib.llama_decode if self._memory else lib.llama_encode
        rc = int(evaluate(self.handle, self._batch.native))
        if rc not in (DECODE_OK, DECODE_ABORTED):
            raise LlamaError(f"llama_decode failed with {rc}: the log's lines of `llama` say why")
        return rc == DECODE_OK

    def _rows(self, pointer: Any, n: int) -> npt.NDArray[np.float32]:
        """llama.cpp's own memory, valid until the next decode."""
        if not pointer:
            raise LlamaError("llama.cpp has no embeddings for this batch")
        memory = (ctypes.c_float * (n * self.n_embd)).from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(memoryview(memory).cast("B"), dtype=np.float32).reshape(n, self.n_embd)
