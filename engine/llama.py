"""The only room that touches llama_cpp: model, context, batch, sampler chain, and a guard for each thing that would
abort.

llama.cpp ends the whole process on a bad argument, so every method here checks what it hands over and raises
`LlamaError` instead. Importing this module imports llama_cpp (some 0.3 s) and gives C's own stderr logger back, because
the Python callback that llama_cpp installs takes the GIL for each line; `engine.native_log` keeps file descriptor 2 in
a file.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GGML_NO_BACKTRACE", "1")

import llama_cpp as lib
import numpy as np
import numpy.typing as npt

from engine.embedding_limits import PACK_TOKENS, causal_step_tokens, n_pack_texts
from engine.model_info import read_model_info
from engine.sampling import SamplerSpec
from infsvc.errors import LlamaError, LoadError

lib.llama_log_set(lib.llama_log_callback(0), ctypes.c_void_p(0))
lib.llama_backend_init()

VERSION: str = lib.__version__

DECODE_OK, DECODE_NO_KV, DECODE_ABORTED = 0, 1, 2

_POOLING_NONE = 0
_POOLING_TYPES = {"mean": 1, "cls": 2, "last": 3}
_FLASH_ATTN_AUTO, _FLASH_ATTN_OFF, _FLASH_ATTN_ON = -1, 0, 1

# The abort callback must not take the GIL in the middle of a step. C's atoi over a two-byte buffer is such a function:
# it answers 1 for "1" and 0 for "0", and ggml reads the answer as a bool.
_C = ctypes.CDLL(None) if os.name == "posix" else ctypes.cdll.msvcrt
_ABORT = ctypes.cast(_C.atoi, lib.ggml_abort_callback)

# Each load has threads of its own, and glibc gives each a heap that never shrinks as a whole: after 50 loads 8 MB were
# lost in them. M_ARENA_MAX (−8) of malloc.h; musl and others have no such heaps.
if hasattr(_C, "malloc_trim"):
    _C.mallopt(-8, 2)


_HANGUL = re.compile("[\uac00-\ud7a3]+")

_POLL = 50
"""How long a thread spins for the next graph before it sleeps, 0 to 100: ggml's own default."""


class _ThreadPoolParams(ctypes.Structure):
    """`struct ggml_threadpool_params` of ggml.h."""

    _fields_ = [
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    ]


class _ThreadPool:
    """Threads that stay between two graphs.

    Without one, a build without OpenMP starts and ends its threads for every graph: a tenth of a step on a quiet
    machine, and many steps beside busy neighbours, because a new thread waits for its first turn. llama_cpp binds none
    of these functions.
    """

    def __init__(self, n_threads: int) -> None:
        # Looked up through the library that llama_cpp has loaded, and so in the very ggml that it uses. Opened by path,
        # a file of the package is a second copy, whose threads know nothing of the first one's buffers.
        library = lib.llama_cpp._lib
        defaults = library.ggml_threadpool_params_default
        defaults.restype, defaults.argtypes = _ThreadPoolParams, [ctypes.c_int]
        make, self._free = library.ggml_threadpool_new, library.ggml_threadpool_free
        make.restype, make.argtypes = ctypes.c_void_p, [ctypes.POINTER(_ThreadPoolParams)]
        self._free.restype, self._free.argtypes = None, [ctypes.c_void_p]
        self._attach = library.llama_attach_threadpool
        self._attach.restype, self._attach.argtypes = None, [ctypes.c_void_p] * 3
        params = defaults(n_threads)
        params.poll = _POLL
        self._handle: int | None = make(ctypes.byref(params))
        if not self._handle:
            raise LlamaError(f"no memory for {n_threads} threads")

    def attach(self, context: Any) -> None:
        """Gives the threads to a context, for prefill and decode."""
        self._attach(context, self._handle, self._handle)

    def close(self) -> None:
        """Ends the threads; the context they were given to is freed before. Safe to call twice."""
        if self._handle:
            self._free(self._handle)
            self._handle = None


def supports_gpu() -> bool:
    """Whether this build can offload layers."""
    return bool(lib.llama_supports_gpu_offload())


def system_info() -> str:
    """The instruction sets this build uses, as llama.cpp prints them."""
    return str(lib.llama_print_system_info().decode())


def return_memory() -> None:
    """Has glibc give freed pages back to the system, which it otherwise keeps by the 10 MB; elsewhere nothing is
    done."""
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)


class LlamaModel:
    """A model's weights and vocabulary. Tokenising and pieces are safe from any thread while the model is open."""

    def __init__(
        self,
        path: Path,
        *,
        n_gpu_layers: int = 0,
        use_extra_bufts: bool = True,
        on_progress: Callable[[float], bool] | None = None,
    ) -> None:
        """Loads the file. Blocks for as long as that takes, without the GIL.

        Args:
            n_gpu_layers: layers to offload; −1 for all.
            use_extra_bufts: whether weights may be repacked for this CPU.
            on_progress: called with 0..1 on the loading thread; answering False stops the load.

        Raises:
            LoadError: the file is not a model that llama.cpp knows, or the load was stopped.
        """
        self.info = read_model_info(path)  # what it refuses, such as a model of no layers, llama.cpp may abort on
        params = lib.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = use_extra_bufts
        stopped = False

        def progress(fraction: float, _: Any) -> bool:
            nonlocal stopped
            stopped = on_progress is not None and not on_progress(fraction)
            return not stopped

        callback = lib.llama_progress_callback(progress)
        params.progress_callback = callback
        self._handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._handle:
            if stopped:
                raise LoadError("the load was stopped")
            raise LoadError(f"llama.cpp cannot load {path}: the log's lines of `llama` say why")
        self._vocab = lib.llama_model_get_vocab(self._handle)
        if lib.llama_vocab_type(self._vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            lib.llama_model_free(self._handle)
            self._handle = None
            raise LoadError(f"{path} has no vocabulary: text cannot be made into tokens")
        self._users = 0
        self._no_users = threading.Condition()
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self._handle)
        self.has_decoder: bool = bool(lib.llama_model_has_decoder(self._handle))
        self.has_encoder: bool = bool(lib.llama_model_has_encoder(self._handle))
        self.n_window: int = lib.llama_model_n_swa(self._handle)
        """Tokens of sliding window; 0 for full attention."""
        self.has_recurrence: bool = bool(
            lib.llama_model_is_recurrent(self._handle) or lib.llama_model_is_hybrid(self._handle)
        )
        """Whether a sequence's state holds what cannot be cut."""
        self.adds_bos: bool = bool(lib.llama_vocab_get_add_bos(self._vocab))
        self.bos: int = lib.llama_vocab_bos(self._vocab)
        self.eos: int = lib.llama_vocab_eos(self._vocab)
        self.eog: npt.NDArray[np.int64] = np.array(
            [token for token in range(self.n_vocab) if lib.llama_vocab_is_eog(self._vocab, token)], dtype=np.int64
        )
        self._eog = frozenset(self.eog.tolist())
        self._parts_hangul = self._strips_accents()
        self._pieces: dict[int, bytes] = {}
        self._special_pieces: dict[int, bytes] = {}

    def close(self) -> None:
        """Frees the weights, after those who are tokenising. Every context over them must be closed before; safe to
        call twice."""
        handle, self._handle = self._handle, None
        if handle:
            with self._no_users:
                self._no_users.wait_for(lambda: not self._users)
            lib.llama_model_free(handle)

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Keeps the vocabulary from being freed by another thread; raises `LlamaError` when it is already."""
        with self._no_users:
            self._users += 1
        try:
            self.handle  # noqa: B018
            yield
        finally:
            with self._no_users:
                self._users -= 1
                self._no_users.notify_all()

    @property
    def handle(self) -> Any:
        if not self._handle:
            raise LlamaError("the model is closed")
        return self._handle

    def is_eog(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return token in self._eog

    def _strips_accents(self) -> bool:
        """Whether this is a WordPiece vocabulary whose texts are decomposed (NFD). llama.cpp's table for that lacks the
        Korean syllables, which Unicode decomposes by rule."""
        if lib.llama_vocab_type(self._vocab) != lib.LLAMA_VOCAB_TYPE_WPM:
            return False
        lowercase = self._flag("tokenizer.ggml.normalizer.lowercase", default=True)
        return self._flag("tokenizer.ggml.normalizer.strip_accents", default=lowercase)

    def _flag(self, key: str, *, default: bool) -> bool:
        buffer = ctypes.create_string_buffer(16)
        n = lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return default if n < 0 else buffer.value == b"true"

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Text → token ids. Any thread.

        Args:
            add_special: whether the vocabulary's BOS (and EOS) is added, as its file says.
            parse_special: whether marks such as `<|im_start|>` in the text become their control tokens.
        """
        if self._parts_hangul:
            text = _HANGUL.sub(lambda found: unicodedata.normalize("NFD", found[0]), text)
        data = text.encode("utf-8", errors="replace")
        if len(data) > 2**30:
            raise LlamaError(f"a text of {len(data)} bytes is too long")
        with self._open():
            room = len(data) + 8
            tokens = (lib.llama_token * room)()
            n = lib.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, parse_special)
            if n < 0:
                room = -n
                tokens = (lib.llama_token * room)()
                n = lib.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, parse_special)
        if n < 0:
            raise LlamaError("llama.cpp cannot tokenise the text")
        return list(tokens[:n])

    def token_text(self, token: int) -> str:
        """The vocabulary's own spelling of a token, such as `<|im_end|>`; empty for none (−1)."""
        if not 0 <= token < self.n_vocab:
            return ""
        with self._open():
            return str(lib.llama_vocab_get_text(self._vocab, token).decode("utf-8", errors="replace"))

    def texts(self) -> list[bytes]:
        """Every token's bytes, in order of the ids; empty for control tokens and for marks such as `<think>`. Some
        100 ms for 152k tokens."""
        marks = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_UNUSED
        found = []
        for token in range(self.n_vocab):
            with self._open():
                attributes = lib.llama_vocab_get_attr(self._vocab, token)
            text = b"" if attributes & marks else self.piece(token, special=False)
            is_mark = attributes & lib.LLAMA_TOKEN_ATTR_USER_DEFINED and text[:1] == b"<" and text[-1:] == b">"
            found.append(b"" if is_mark else text)
        return found

    def piece(self, token: int, *, special: bool) -> bytes:
        """The bytes a token stands for; control tokens are empty unless `special`. Cached by id."""
        cache = self._special_pieces if special else self._pieces
        found = cache.get(token)
        if found is None:
            found = cache[token] = self._piece(token, special)
        return found

    def _piece(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self.n_vocab:
            raise LlamaError(f"no token {token} in a vocabulary of {self.n_vocab}")
        room = 64
        buffer = ctypes.create_string_buffer(room)
        with self._open():
            n = lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if n < 0:
                room = -n
                buffer = ctypes.create_string_buffer(room)
                n = lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
        return buffer.raw[: max(n, 0)]


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
        params.flash_attn_type = _FLASH_ATTN_ON if flash_attention else _FLASH_ATTN_OFF
        params.pooling_type = _POOLING_NONE
        params.embeddings = False
        params.no_perf = True
        self._flag = ctypes.create_string_buffer(b"0", 2)
        params.abort_callback = _ABORT
        params.abort_callback_data = ctypes.cast(self._flag, ctypes.c_void_p)
        self._model = model
        self._n_slots = n_slots
        if n_ctx < 1 or n_slots < 1 or n_batch < 1:
            raise LoadError(f"no context of {n_ctx} tokens for {n_slots} sequences: set CTX_SIZE")
        self._handle = lib.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise LoadError(
                "llama.cpp cannot make the context: too little memory for the KV cache, or an unknown architecture"
            )
        self._pool = _ThreadPool(n_threads)
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
        self._flag[0] = b"1"

    def rearm(self) -> None:
        """Takes an earlier `abort` back."""
        self._flag[0] = b"0"

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
            pooling: mean, cls or last.
            n_ctx: tokens of the longest text.
            causal: what the header says; llama.cpp's own word counts.

        Raises:
            LoadError: the memory cannot be had, or the model is of a kind that has no such vectors.
        """
        if pooling not in _POOLING_TYPES:
            raise LoadError(f"no pooling {pooling}: there are {', '.join(_POOLING_TYPES)}")
        if model.has_encoder or not model.has_decoder:
            raise LoadError("this kind of model (with an encoder and a decoder) is not served by this version")
        if n_ctx < 1 or (model.n_ctx_train and n_ctx > model.n_ctx_train):
            raise LoadError(f"no texts of {n_ctx} tokens: set CTX_SIZE to at most {model.n_ctx_train}")
        self._model, self._pooling = model, pooling
        self._flag = ctypes.create_string_buffer(b"0", 2)
        self._handle = None
        self._pool: _ThreadPool | None = None
        # A header may keep silent on what its architecture implies.
        for both_ways in (not causal, causal):
            self._handle = self._make(n_ctx, both_ways=both_ways, n_threads=n_threads)
            if not self._handle:
                raise LoadError("llama.cpp cannot make the context for embeddings: too little memory")
            if bool(lib.llama_get_causal_attn(self._handle)) is not both_ways:
                break
            self.close()
        self._pool = _ThreadPool(n_threads)
        self._pool.attach(self._handle)
        self.both_ways = both_ways
        self._memory = lib.llama_get_memory(self._handle)
        self.n_ctx = n_ctx
        self.n_pack_tokens = max(PACK_TOKENS, n_ctx)
        self.n_step: int = lib.llama_n_ubatch(self._handle)
        self.n_pack_texts: int = lib.llama_n_seq_max(self._handle)
        self.n_embd: int = lib.llama_model_n_embd_out(model.handle)
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
        params.flash_attn_type = _FLASH_ATTN_AUTO
        params.pooling_type = _POOLING_TYPES[self._pooling] if both_ways else _POOLING_NONE
        params.embeddings = True
        params.no_perf = True
        params.abort_callback = _ABORT
        params.abort_callback_data = ctypes.cast(self._flag, ctypes.c_void_p)
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
        self._flag[0] = b"1"

    def rearm(self) -> None:
        """Takes an earlier `abort` back."""
        self._flag[0] = b"0"

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
        if self._flag[0] == b"1":
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


class SamplerChain:
    """top_k, top_p, min_p, temperature and the draw, in llama.cpp's order and with its meaning. Engine thread."""

    def __init__(self, spec: SamplerSpec) -> None:
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if not self._chain:
            raise LlamaError("no memory for a sampler chain")
        parts = []
        if spec.top_k > 0:
            parts.append(lib.llama_sampler_init_top_k(spec.top_k))
        if spec.top_p < 1:
            parts.append(lib.llama_sampler_init_top_p(spec.top_p, 1))
        if spec.min_p > 0:
            parts.append(lib.llama_sampler_init_min_p(spec.min_p, 1))
        parts.append(lib.llama_sampler_init_temp(spec.temperature))
        parts.append(lib.llama_sampler_init_dist(spec.seed))
        for part in parts:
            if not part:
                raise LlamaError("no memory for a sampler")
            lib.llama_sampler_chain_add(self._chain, part)

    def draw(self, context: LlamaContext, index: int) -> int:
        """Draws a token from the logits of a batch position. Raises `LlamaError` where there are none."""
        if not self._chain:
            raise LlamaError("the sampler is closed")
        if not lib.llama_get_logits_ith(context.handle, index):
            raise LlamaError(f"no logits at batch position {index}")
        return int(lib.llama_sampler_sample(self._chain, context.handle, index))

    def close(self) -> None:
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None
