"""A model's weights and vocabulary."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.llama.native import lib
from engine.model_info import read_model_info
from infsvc.errors import LlamaError, LoadError

_HANGUL = re.compile("[\uac00-\ud7a3]+")


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
        self.adds_eos: bool = bool(lib.llama_vocab_get_add_eos(self._vocab))
        self.adds_sep: bool = bool(lib.llama_vocab_get_add_sep(self._vocab))
        self.sep: int = lib.llama_vocab_sep(self._vocab)
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
