"""Threads of llama.cpp that stay between two graphs."""

from __future__ import annotations

import ctypes
from typing import Any

from engine.llama.native import lib
from infsvc.errors import LlamaError

_POLL = 50
"""How long a thread spins for the next graph before it sleeps, 0 to 100: ggml's own default."""


class _Params(ctypes.Structure):
    """`struct ggml_threadpool_params` of ggml.h."""

    _fields_ = [
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    ]


class ThreadPool:
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
        defaults.restype, defaults.argtypes = _Params, [ctypes.c_int]
        make, self._free = library.ggml_threadpool_new, library.ggml_threadpool_free
        make.restype, make.argtypes = ctypes.c_void_p, [ctypes.POINTER(_Params)]
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
